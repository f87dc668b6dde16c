"""Pictures of nearest images: of a round where a method reconstructs nothing, and of what an evaluation retrieved."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from wardround.backbones import released_model
from wardround.config.federation import Recipe
from wardround.data import LabelledImages
from wardround.probe.features import features
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


def draw_retrieved(images: LabelledImages, lines: Sequence[Sequence[int]], path: Path, title: str) -> None:
    """Write a PNG with a line a query: the image, then what came back, nearest first, each with its labels.

    `lines` are places in the set. What shares no label with the query is marked by a cross.
    """
    columns = max(map(len, lines))
    figure = Figure(figsize=(1.5 * columns, 1.75 * len(lines) + 0.5), dpi=110, layout="constrained")
    truth = images.one_hot
    for axes, line in zip(figure.subplots(len(lines), columns, squeeze=False), lines, strict=True):
        for axis in axes:
            axis.axis("off")
        for axis, place in zip(axes, line, strict=False):
            image = images.images[place]
            plane = image[:, image.shape[1] // 2] if image.ndim == 4 else image
            axis.imshow(plane.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)
            names = " + ".join(name for name, has in zip(images.classes, truth[place], strict=True) if has) or "none"
            alike = bool((truth[place] & truth[line[0]]).any() or truth[[place, line[0]]].sum() == 0)
            said = {"color": "black"} if alike else {"color": "firebrick", "weight": "bold"}
            axis.set_title(("query: " if axis is axes[0] else "") + ("" if alike else "✗ ") + names, fontsize=7, **said)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
