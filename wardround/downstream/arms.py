"""What is compared on the same images: the backbone, its random initialisation, and raw pixels."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from wardround import ssl as methods
from wardround.backbones import released_model
from wardround.downstream.load import load_backbone, protocol_of
from wardround.probe import features

__all__ = ["Arm", "protocol_of", "raw_pixels", "three_arms"]

Arm = Callable[[NDArray[np.uint8]], NDArray[np.float32]]  # images [N, C, S, S] -> features [N, D]
RAW_SIZE = 32


def three_arms(folder: Path, *, device: str = "cpu", autocast: bool = False) -> dict[str, Arm]:
    """Return the arms of a release by name; `random` is the encoder that the seed initialises.

    With batch normalisation, `random` takes its statistics from the very images that it is given, as
    it has no others; that can only flatter it.
    Raises CheckpointError for a release that does not say how it was trained.
    """
    recipe = protocol_of(folder)
    start = methods.get_state(methods.build(recipe))
    frozen = partial(features, mean=recipe.data.mean, std=recipe.data.std, device=device, autocast=autocast)
    return {
        "backbone": partial(frozen, load_backbone(folder)),
        "random": lambda images: frozen(released_model(recipe, start, images), images),
        "raw pixels": raw_pixels,
    }


def raw_pixels(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return images as 32 x 32 numbers a channel: the floor that any backbone should beat."""
    small = [
        interpolate(torch.from_numpy(np.array(part)).float(), (RAW_SIZE, RAW_SIZE), mode="bilinear", antialias=True)
        for part in np.array_split(images, len(images) // 1024 + 1)
    ]
    flat: NDArray[np.float32] = torch.cat(small).flatten(1).numpy()
    return flat
