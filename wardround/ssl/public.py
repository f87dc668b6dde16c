"""Procedural images that nobody owns, for losses that compare an image with something public."""

from functools import lru_cache

import torch
from torch import Tensor

from wardround.config.federation import DataConfig, Recipe
from wardround.data.procedural import procedural_set
from wardround.errors import ConfigError


def public_bank(recipe: Recipe, count: int, key: str, instead: str) -> Tensor:
    """Return so many procedural images: [count, C, S, S] uint8.

    `key` is the method's setting that asks for them and `instead` what to take where they are of no
    use, which raises ConfigError.
    """
    found = ""
    if recipe.backbone.norm == "batch":
        found = "[backbone] norm = 'batch' mixes images all the same"
    if recipe.data.dimensions == 3:
        found = "[data] dimensions = 3, and procedural images are flat"
    if found:
        raise ConfigError(f"[method] {key} = 'public' keeps an image's loss to that image; {found}. Take {instead}.")
    return _drawn_once(count, recipe.seed, recipe.data)


@lru_cache(maxsize=2)
def _drawn_once(count: int, seed: int, data: DataConfig) -> Tensor:
    """Return the images, which take 3 ms each to draw, and are the same for all sites of one process."""
    return torch.from_numpy(procedural_set(count, seed, data).images)
