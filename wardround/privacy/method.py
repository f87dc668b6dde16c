"""What the private engines need of a method: `ssl.Method` has it."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn


class Decomposing(Protocol):
    """A module whose loss is one number an image, of that image alone."""

    view_size: int

    @property
    def coupling(self) -> str | None:
        """Why an image's loss depends on other images, or None."""

    def prepare(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return the inputs of a forward pass, with all randomness in them: images in [0, 1]."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the parameters by name."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return each image's loss, [B]."""


def trained(method: Decomposing) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}
