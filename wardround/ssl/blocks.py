"""I-JEPA's masks: target blocks, and a context block without them (Assran et al. 2023, section 3).

A grid has two dimensions, or three for volumes. The shapes of the blocks are drawn once a batch, as
in the published collator, and their places image by image. Here every shape keeps to the declared
ranges, where the collator rounds, and every place on the grid is possible, where it never takes the
last row and column.
"""

from functools import lru_cache
from itertools import pairwise, product
from math import prod

import torch
from torch import Tensor

from wardround.config.method import IJEPAConfig
from wardround.errors import ConfigError

Grid = tuple[int, ...]  # patches along each axis


@lru_cache
def block_shapes(grid: Grid, method: IJEPAConfig) -> tuple[list[Grid], list[Grid]]:
    """Return every shape that a target, and that the context, may have on a grid.

    Raises ConfigError where there is none, or where the targets might cover the whole context.
    """
    shapes = []
    for key, scale, aspect in (
        ("target", method.target_scale, method.target_aspect),
        ("context", method.context_scale, (1.0, 1.0)),
    ):
        shapes.append(_shapes_within(grid, scale, aspect))
        if not shapes[-1]:
            raise ConfigError(
                f"[method] {key}_scale = {list(scale)}: no block of whole patches on a {_written(grid)} grid has this "
                f"share and edges in a ratio within {list(aspect)}. Take a smaller patch_size, or a wider range."
            )
    hidden, seen = method.targets * max(map(prod, shapes[0])), min(map(prod, shapes[1]))
    if hidden >= seen:
        raise ConfigError(
            f"[method] targets = {method.targets}: on a {_written(grid)} grid they may hide {hidden} patches of a "
            f"context of {seen}. Take fewer or smaller targets, or a smaller patch_size."
        )
    return shapes[0], shapes[1]


def draw_blocks(
    count: int, declared: int, grid: Grid, method: IJEPAConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return what the encoder sees of each image, and what is predicted: [B, Nc] and [B, T, Nt] of indices.

    The targets are cut out of the context. Rows must stack, so contexts are shortened, at random, to
    the least of as many trial masks as a batch is declared to have images; an image that keeps fewer is
    drawn again. So its mask depends neither on the other images nor on how many there are: the
    published collator shortens to the least of the batch itself.
    """
    targets, contexts = block_shapes(grid, method)
    target, context = _one_of(targets, generator), _one_of(contexts, generator)

    def draw(images: int) -> tuple[Tensor, Tensor]:
        hidden = _placed(target, grid, images * method.targets, generator).view(images, method.targets, prod(grid))
        return hidden, _placed(context, grid, images, generator) & ~hidden.any(dim=1)

    least = int(draw(declared)[1].sum(dim=1).min())
    hidden, seen = draw(count)
    while (short := seen.sum(dim=1) < least).any():
        hidden[short], seen[short] = draw(int(short.sum()))
    order = torch.rand(seen.shape, generator=generator).masked_fill(~seen, 2.0).argsort(dim=1)
    return order[:, :least], hidden.nonzero()[:, 2].view(count, method.targets, prod(target))


def _shapes_within(grid: Grid, scale: tuple[float, float], aspect: tuple[float, float]) -> list[Grid]:
    """Return the shapes with a share of the grid in `scale` and each edge over the next in `aspect`."""
    return [
        shape
        for shape in product(*(range(1, edge + 1) for edge in grid))
        if scale[0] <= prod(shape) / prod(grid) <= scale[1]
        and all(aspect[0] <= edge / following <= aspect[1] for edge, following in pairwise(shape))
    ]


def _one_of(shapes: list[Grid], generator: torch.Generator) -> Grid:
    return shapes[int(torch.randint(len(shapes), (), generator=generator))]


def _placed(shape: Grid, grid: Grid, count: int, generator: torch.Generator) -> Tensor:
    """Return blocks at uniform places: [count, N] of which patches they cover, row by row."""
    inside = torch.ones(count, 1, dtype=torch.bool)
    for side, edge in zip(shape, grid, strict=True):
        first = torch.randint(edge - side + 1, (count, 1), generator=generator)
        places = torch.arange(edge)
        covered = (places >= first) & (places < first + side)  # [count, edge]
        inside = (inside.unsqueeze(2) & covered.unsqueeze(1)).flatten(1)
    return inside


def _written(grid: Grid) -> str:
    return " x ".join(map(str, grid))
