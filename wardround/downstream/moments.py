"""What goes into a network's layers, and what comes out of them, over images: means and second moments."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.config.federation import DataConfig
from wardround.probe.features import features

MOST = 512  # images: their patches or positions are many more than any layer has channels


@dataclass(frozen=True)
class Moments:
    """Sums over rows: one an image, a token, or a position of a map."""

    rows: int
    total: Tensor  # [C] float64
    squares: Tensor  # [C, C] float64

    @property
    def mean(self) -> Tensor:
        """[C]"""
        return self.total / self.rows

    @property
    def second(self) -> Tensor:
        """E[x x^T]: [C, C]"""
        return self.squares / self.rows

    def __add__(self, other: "Moments") -> "Moments":
        """Return the sums over the rows of both."""
        return Moments(self.rows + other.rows, self.total + other.total, self.squares + other.squares)


def moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    side: Literal["in", "out"],
    images: NDArray[np.uint8],
    data: DataConfig,
    device: str = "cpu",
) -> dict[str, Moments]:
    """Return the moments of what goes into layers or comes out of them, over at most 512 images [N, C, S, S].

    Takes 8 x C x C bytes a layer.
    """
    found: dict[str, Moments] = {}

    def add(name: str, layer: nn.Module, x: Tensor) -> None:
        rows = x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x
        rows = rows.reshape(-1, rows.shape[-1]).float()
        # The product of a batch in float32, the sum over batches in float64.
        sums = Moments(len(rows), rows.sum(0).double().cpu(), (rows.T @ rows).double().cpu())
        found[name] = found[name] + sums if name in found else sums

    def hook(name: str) -> Any:
        return lambda layer, given, out: add(name, layer, given[0] if side == "in" else out)

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        features(model, images[:MOST], data.mean, data.std, device=device)
    finally:
        for handle in handles:
            handle.remove()
    return found
