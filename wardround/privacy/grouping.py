"""Which rows of a tensor belong to one privacy unit.

A batch has B images, sorted by unit. Inside a network a tensor may have more rows: views, one view after
the other, and in each image parts that follow each other, such as windows. Row r then belongs to image
(r // inner) mod B.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grouping:
    """The units of a batch: `units` [B] of 0..count-1 in ascending order, one an image."""

    units: Tensor
    count: int

    def __post_init__(self) -> None:
        """Raise AssertionError for a unit without images: its neighbours' rows would be taken for its own."""
        steps = torch.cat([self.units.new_tensor([-1]), self.units, self.units.new_tensor([self.count])]).diff()
        if bool(((steps < 0) | (steps > 1)).any() | (steps[[0, -1]] != 1).any()):
            raise AssertionError("a batch's units are numbered from 0 without a gap, in ascending order")

    @property
    def images(self) -> int:
        """B, the number of images."""
        return len(self.units)

    @cached_property
    def most(self) -> int:
        """The largest number of images that a unit has here."""
        return max(self.sizes, default=0)

    @cached_property
    def sizes(self) -> list[int]:
        """How many images each unit has: U numbers."""
        found: list[int] = torch.bincount(self.units).tolist()
        return found

    @cached_property
    def places(self) -> Tensor:
        """Return each image's place among those of its unit: [B]."""
        first = torch.searchsorted(self.units, torch.arange(self.count, device=self.units.device))
        return torch.arange(self.images, device=self.units.device) - first[self.units]

    def by_image(self, x: Tensor, inner: int) -> Tensor:
        """Return all parts of all views of each image side by side: [v * B * inner, ...] -> [B, v * inner, ...]."""
        if len(x) == self.images * inner:
            return x.reshape(self.images, inner, *x.shape[1:])
        x = x.reshape(-1, self.images, inner, *x.shape[1:])
        return x.transpose(0, 1).flatten(1, 2)

    def by_unit(self, x: Tensor, inner: int) -> Tensor:
        """Return the rows of each unit side by side, zeros where a unit has fewer: -> [U, most * v * inner, ...]."""
        x = self.by_image(x, inner)
        if self.count == self.images:
            return x
        padded = x.new_zeros(self.count, self.most, *x.shape[1:])
        padded[self.units, self.places] = x
        return padded.flatten(1, 2)

    def each_unit(self, x: Tensor, inner: int) -> Iterator[Tensor]:
        """Yield the rows of each unit: [v * B * inner, ...] -> U times [v * k * inner, ...], k images in the unit."""
        for rows in torch.split(x.reshape(-1, self.images, inner, *x.shape[1:]), self.sizes, 1):
            yield rows.flatten(0, 2)

    def summed(self, x: Tensor, inner: int) -> Tensor:
        """Return each unit's sum over its rows: [v * B * inner, ...] -> [U, ...]."""
        x = self.by_image(x, inner).sum(1) if len(x) > self.images else x
        if self.count == self.images:
            return x
        return x.new_zeros(self.count, *x.shape[1:]).index_add_(0, self.units, x)

    def of_rows(self, values: Tensor, rows: int, inner: int) -> Tensor:
        """Return each row's share of one number a unit: [U] -> [rows]."""
        shares = values if self.count == self.images else values[self.units]
        return shares.view(1, -1, 1).expand(rows // (self.images * inner), -1, inner).flatten()
