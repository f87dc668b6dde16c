"""The picture of a round where a method reconstructs nothing: which images the backbone takes to be alike."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from wardround.backbones import released_model
from wardround.config.federation import Recipe
from wardround.probe import features
from wardround.report.sheet import draw_sheet
from wardround.update import State

IMAGES, QUERIES, NEAREST = 256, 8, 5


def draw_neighbours(recipe: Recipe, state: State, images: NDArray[np.uint8], path: Path, title: str) -> None:
    """Write a PNG of eight images, each with the five others that are nearest to it by cosine.

    images: [N, C, S, S], of which the first 256 are searched; of volumes, [N, C, S, S, S], the middle slice is drawn.
    """
    searched = images[:IMAGES]
    found = features(released_model(recipe, state, searched), searched, recipe.data.mean, recipe.data.std)
    found = found - found.mean(axis=0)  # without what all share, the cosines tell images apart
    found /= np.linalg.norm(found, axis=1, keepdims=True).clip(1e-12)
    alike = found @ found.T
    np.fill_diagonal(alike, -np.inf)
    queries = np.linspace(0, len(searched) - 1, min(QUERIES, len(searched)), dtype=int)
    nearest = np.argsort(-alike[queries], axis=1)[:, : min(NEAREST, len(searched) - 1)].T  # [rank, query]
    pixels = torch.from_numpy(np.array(searched)).float() / 255.0
    rows = {"image": queries, **{f"nearest {rank}": places for rank, places in enumerate(nearest, start=1)}}
    draw_sheet({name: pixels[places] for name, places in rows.items()}, path, title)
