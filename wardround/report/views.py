"""The picture of a recipe's views: what a method sees of some images."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from wardround.config.federation import Recipe
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
    figure = Figure(figsize=(1.3 * len(pixels), 1.35 * len(rows) + 0.4), dpi=110, layout="constrained")
    axes = figure.subplots(len(rows), len(pixels), squeeze=False)
    for line, (name, panel) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name)
        for axis, image in zip(line, panel, strict=True):
            plane = image[:, image.shape[1] // 2] if image.ndim == 4 else image
            axis.imshow(plane.permute(1, 2, 0).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
    figure.suptitle(f"{recipe.name}: views of {recipe.views.modality}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
