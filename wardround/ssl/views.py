"""Augmentation of a whole batch at once: one affine warp does crop, flip and rotation together."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wardround.config.federation import DataConfig, Recipe, ViewsConfig


def view(
    images: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    size: int,
    *,
    intensities: bool = True,
    crop_scale: tuple[float, float] | None = None,
) -> Tensor:
    """Return one normalised view an image: [B, C, S, S] in [0, 1] -> [B, C, size, size].

    `intensities` also changes brightness and the like, as contrastive methods need; `crop_scale`
    stands in for the config's, as small crops need.
    """
    return normalise(augment(images, recipe.views, generator), recipe.data)


def augment(images: Tensor, views: ViewsConfig, generator: torch.Generator) -> Tensor:
    """Return one view an image: [B, C, S, S] float32 -> the same shape.

    The crop keeps a share of the area drawn from `crop_scale` and an aspect ratio drawn
    log-uniformly from [3/4, 4/3], as torchvision's RandomResizedCrop does. Beyond the border a view
    repeats the border's pixels.
    """
    theta = _affine(images.shape[0], views, generator).to(images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def normalise(images: Tensor, data: DataConfig) -> Tensor:
    """Return [0, 1] images minus the declared mean over the declared deviation, channel by channel."""
    shape = (1, data.channels, 1, 1)
    mean = torch.tensor(data.mean, device=images.device).view(shape)
    std = torch.tensor(data.std, device=images.device).view(shape)
    return (images - mean) / std


def _affine(batch: int, views: ViewsConfig, generator: torch.Generator) -> Tensor:
    """Return the maps from output to input coordinates, both in [-1, 1]: [B, 2, 3]."""
    uniform = torch.rand(batch, 7, generator=generator)
    low, high = views.crop_scale
    area = low + (high - low) * uniform[:, 0]
    stretch = torch.exp((uniform[:, 1] * 2 - 1) * math.log(4 / 3) / 2)
    width = (area.sqrt() * stretch).clamp(max=1.0)
    height = (area.sqrt() / stretch).clamp(max=1.0)
    centre_x = (uniform[:, 2] * 2 - 1) * (1 - width)
    centre_y = (uniform[:, 3] * 2 - 1) * (1 - height)
    flip_x = 1.0 - 2.0 * (uniform[:, 4] < 0.5).float() * views.horizontal_flip
    flip_y = 1.0 - 2.0 * (uniform[:, 5] < 0.5).float() * views.vertical_flip
    angle = (uniform[:, 6] * 2 - 1) * math.radians(views.rotation)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        width * flip_x * cos,
        -width * flip_y * sin,
        centre_x,
        height * flip_x * sin,
        height * flip_y * cos,
        centre_y,
    ]
    return torch.stack(rows, dim=1).view(batch, 2, 3)
