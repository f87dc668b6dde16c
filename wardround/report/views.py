"""The picture of a recipe's views: what a method sees of some images."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from wardround.config.federation import Recipe
from wardround.report.sheet import draw_sheet
from wardround.ssl.draws import generator
from wardround.ssl.views import view

VIEWS = 4  # of each image


def draw_views(recipe: Recipe, images: NDArray[np.uint8], path: Path) -> None:
    """Write a PNG with a column an image: the image, then four views of it, with the intensities changed.

    images: [N, C, S, S] or, of volumes, [N, C, S, S, S], whose middle slices are drawn; the first eight.
    """
    pixels = torch.from_numpy(np.array(images[:8])).float() / 255.0
    draws = generator(recipe.seed, "views")
    shape = (1, -1, *[1] * (pixels.ndim - 2))
    mean, std = (torch.tensor(values).view(shape) for values in (recipe.data.mean, recipe.data.std))
    rows = {"image": pixels}
    for number in range(1, VIEWS + 1):
        rows[f"view {number}"] = view(pixels, recipe, draws, recipe.data.image_size) * std + mean
    draw_sheet(rows, path, f"{recipe.name}: views of {recipe.views.modality}")
