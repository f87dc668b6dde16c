"""Which rows of a tensor belong to one privacy unit.

A batch has B images, sorted by unit. Inside a network a tensor may have more rows: views, one view after
the other, and in each image parts that follow each other, such as windows. Row r then belongs to image
(r // inner) mod B.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grouping:
    """The units of a batch: `units` [B] of 0..count-1 in ascending order, one an image."""

    units: Tensor
    count: int

    @property
    def images(self) -> int:
        """B, the number of images."""
        return len(self.units)

    @cached_property
    def most(self) -> int:
        """The largest number of images that a unit has here."""
        return int(torch.bincount(self.units).max()) if self.images else 0

    @cached_property
    def places(self) -> Tensor:
        """Return each image's place among those of its unit: [B]."""
        first = torch.searchsorted(self.units, torch.arange(self.count, device=self.units.device))
        return torch.arange(self.images, device=self.units.device) - first[self.units]

    def by_image(self, x: Tensor, inner: int) -> Tensor:
        """Return all parts of all views of each image side by side: [v * B * inner, ...] -> [B, v * inner, ...]."""
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

    def summed(self, x: Tensor, inner: int) -> Tensor:
        """Return each unit's sum over its rows: [v * B * inner, ...] -> [U, ...]."""
        x = self.by_image(x, inner).sum(1)
        if self.count == self.images:
            return x
        return x.new_zeros(self.count, *x.shape[1:]).index_add_(0, self.units, x)

    def of_rows(self, values: Tensor, rows: int, inner: int) -> Tensor:
        """Return each row's share of one number a unit: [U] -> [rows]."""
        return values[self.units].repeat_interleave(inner).repeat(rows // (self.images * inner))
