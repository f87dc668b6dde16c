"""What every self-supervised method is to the training loop and to an engine."""

import torch
from torch import Tensor, nn


class Method(nn.Module):
    """A method's module: `backbone` is kept, `head` is thrown away, the state is both."""

    coupled: bool  # whether an image's loss depends on the rest of its batch, as the settings resolve
    backbone: nn.Module
    head: nn.Module

    def prepare(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return the inputs of `forward`, rows first, with all randomness in them.

        images: [B, C, S, S] in [0, 1].
        """
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the loss of each row, [B]; or, where coupled, of the batch, []."""
        raise NotImplementedError
