"""What every self-supervised method is to the training loop and to an engine.

A row is an image: whatever `prepare` and `embed` return has one row an image, so that a batch can be
cut into micro-batches, spread over devices, and clipped unit by unit. Inside `embed`, tensors may
have k rows an image, view after view: row r then belongs to image r modulo the batch.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wardround.backbones import Backbone, build
from wardround.config.federation import Recipe
from wardround.ssl.teacher import Teacher


class Method(nn.Module):
    """A method's module: `backbone` is kept, `head` is thrown away, the state is both."""

    backbone: Backbone
    head: nn.Module
    teacher: Teacher | None  # follows the student and never leaves the site
    view_size: int  # edge of a view in pixels; early rounds may take smaller ones

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.backbone = build(recipe.backbone, recipe.data)
        self.view_size = recipe.data.image_size
        self.teacher = None  # no class attribute: it would hide the module that a method sets

    def prepare(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return the inputs of `embed`, with all randomness in them.

        images: [B, C, S, S] in [0, 1], or [B, C, S, S, S] for volumes.
        """
        raise NotImplementedError

    def embed(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what the loss compares, of each image by itself: the costly part of `forward`."""
        raise NotImplementedError

    def loss(self, *embedded: Tensor) -> Tensor:
        """Return the loss of each image, [B]; or, where images are compared, of the batch, []."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the loss: [B], or [] where coupled."""
        return self.loss(*self.embed(*inputs))

    def after_step(self, step: int) -> None:
        """Move what is no parameter, such as a teacher; `step` is the one just taken, over the federation."""

    def taught(self) -> dict[str, nn.Module]:
        """Return the parts of the student that the teacher copies, by name."""
        return {}

    def loss_coupling(self) -> str | None:
        """Return why an image's loss depends on other images, under these settings; None where it does not."""
        return None

    @property
    def coupling(self) -> str | None:
        """Why an image's loss term depends on other images of its batch, or None where it decomposes.

        Batch normalisation couples in every form, `affine=False` included: Opacus's validator, which
        passes several forms, is no guide here.
        """
        for name, layer in self.named_modules():
            if isinstance(layer, _BatchNorm):
                return f"batch normalisation shares statistics over the batch ('{name}')"
        return self.loss_coupling()
