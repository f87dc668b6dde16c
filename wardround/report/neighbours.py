"""The picture of a round where a method reconstructs nothing: which images the backbone takes to be alike."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from wardround.backbones import released_model
from wardround.config.federation import Recipe
from wardround.probe import features
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
    nearest = np.argsort(-alike[queries], axis=1)[:, : min(NEAREST, len(searched) - 1)]
    figure = Figure(figsize=(1.3 * len(queries), 1.35 * (1 + nearest.shape[1]) + 0.4), dpi=110, layout="constrained")
    axes = figure.subplots(1 + nearest.shape[1], len(queries), squeeze=False)
    for column, query in enumerate(queries):
        for row, place in enumerate((query, *nearest[column])):
            axes[row, column].imshow(_flat(searched[place]), cmap="gray", vmin=0, vmax=255)
            axes[row, column].set(xticks=[], yticks=[])
    for row in range(1 + nearest.shape[1]):
        axes[row, 0].set_ylabel(f"nearest {row}" if row else "image")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _flat(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image with channels last: [C, S, S] or the middle slice of [C, S, S, S] -> [S, S, C]."""
    return np.moveaxis(image if image.ndim == 3 else image[:, image.shape[1] // 2], 0, -1)
