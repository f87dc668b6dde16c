"""Augmentation of a whole batch at once: one affine warp does crop, flip and rotation together.

All draws come from the given generator on the CPU, so that a GPU sees the same views; how many there are
depends on shapes and config alone, and a view of an image on no other image of its batch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wardround.config.federation import DataConfig, Recipe
from wardround.config.views import ViewsConfig
from wardround.ssl.intensities import draw, vary

CHUNK = 2**21  # pixels worked on at a time on a CPU: they stay in its cache, and their memory is used again


def view(
    images: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    size: int,
    *,
    intensities: bool = True,
    crop_scale: tuple[float, float] | None = None,
) -> Tensor:
    """Return one normalised view an image: [B, C, S, S] float32 in [0, 1] -> [B, C, size, size].

    Volumes: [B, C, S, S, S] of slices, rows and columns -> [B, C, size, size, size]. `intensities` also
    changes brightness and the like, as contrastive methods need; `crop_scale` stands in for the config's,
    as small crops need.
    """
    draw_maps = flat_maps if images.ndim == 4 else solid_maps
    maps = draw_maps(len(images), recipe.views, generator, crop_scale or recipe.views.crop_scale)
    views = images.new_empty(*images.shape[:2], *[size] * (images.ndim - 2))
    numbers, noise = draw(views.shape, recipe.views, generator) if intensities else (None, None)
    chunk = max(1, CHUNK // views[0].numel()) if images.device.type == "cpu" else len(images)
    for start in range(0, len(images), chunk):
        rows = slice(start, start + chunk)
        part = warp(images[rows], maps[rows], size)
        if numbers is not None:
            part = vary(part, recipe.views, numbers[rows], None if noise is None else noise[rows])
        views[rows] = normalise(part, recipe.data)
    return views


def normalise(images: Tensor, data: DataConfig) -> Tensor:
    """Return [0, 1] images minus the declared mean over the declared deviation, channel by channel."""
    shape = (1, data.channels, *[1] * (images.ndim - 2))
    mean = torch.tensor(data.mean, device=images.device).view(shape)
    std = torch.tensor(data.std, device=images.device).view(shape)
    return (images - mean).div_(std)


def warp(images: Tensor, maps: Tensor, size: int) -> Tensor:
    """Return the images seen through maps from output to input coordinates: [B, C, S, ...], [B, 2, 3] or [B, 3, 4].

    Bilinear; beyond the border a view repeats the border's pixels.
    """
    # Reading a row from right to left takes a CPU twice as long; mirroring what was read is the same.
    mirrored = (maps[:, 0, 0] < 0).nonzero().squeeze(1)
    maps = maps.clone()
    maps[mirrored, :, 0] *= -1.0
    views = _sampled(images, maps, size)
    mirrored = mirrored.to(images.device)
    views[mirrored] = views[mirrored].flip(-1)
    return views


def _sampled(images: Tensor, maps: Tensor, size: int) -> Tensor:
    """Return what `warp` returns. Where a view skips pixels its image is made smaller first.

    Bilinear sampling averages two neighbours an axis; beyond two input pixels an output pixel its error
    against an antialiased view of a chest X-ray was 1.2 to 3.5 times as large without the smaller image.
    """
    step = maps[:, :, :-1].norm(dim=1).amax(1) * images.shape[-1] / size  # input pixels an output pixel: [B]
    halvings = step.log2().ceil().sub(1).clamp(min=0).long()
    grid = sampling_grid(maps.to(images.device), size)
    if not halvings.any():
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    views = images.new_empty(*images.shape[:2], *[size] * (images.ndim - 2))
    for times in sorted(set(halvings.tolist())):
        rows = (halvings == times).nonzero().squeeze(1).to(images.device)
        smaller = F.interpolate(images[rows], [edge >> times for edge in images.shape[2:]], mode="area")
        views[rows] = F.grid_sample(smaller, grid[rows], padding_mode="border", align_corners=False)
    return views


def sampling_grid(maps: Tensor, size: int) -> Tensor:
    """Return where each pixel of a view lies in its image: [B, 2, 3] -> [B, size, size, 2], or one axis more.

    F.affine_grid's values, equal to the bit without rotation. That one takes four times as long as the
    sampling at 224 pixels; here x and y lie apart in memory, where sums and sampling are vectorised.
    """
    axes = maps.shape[1]
    centres = torch.linspace(-1.0, 1.0, size, device=maps.device) * (size - 1) / size
    columns = maps.view(*maps.shape, *[1] * axes).unbind(2)  # each [B, axes, 1, 1]
    grid = columns[-1]
    for axis in reversed(range(axes)):  # x, the first coordinate, runs along the last axis
        grid = grid + columns[axis] * centres.view([size if place == axis else 1 for place in reversed(range(axes))])
    return grid.movedim(1, -1)


def flat_maps(batch: int, views: ViewsConfig, generator: torch.Generator, crop_scale: tuple[float, float]) -> Tensor:
    """Return maps from output to input coordinates (x, y), both in [-1, 1]: [B, 2, 3].

    The crop keeps a share of the area drawn from `crop_scale` and an aspect ratio drawn log-uniformly
    from [3/4, 4/3], as torchvision's RandomResizedCrop does.
    """
    uniform = torch.rand(batch, 7, generator=generator)
    low, high = crop_scale
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


def solid_maps(batch: int, views: ViewsConfig, generator: torch.Generator, crop_scale: tuple[float, float]) -> Tensor:
    """Return maps from output to input coordinates (x, y, z) = (column, row, slice), all in [-1, 1]: [B, 3, 4].

    The crop keeps a share of the volume drawn from `crop_scale`: the three edges' stretches cancel, and
    any two edges are in a ratio within [3/4, 4/3].
    """
    uniform = torch.rand(batch, 13, generator=generator)
    low, high = crop_scale
    edge = (low + (high - low) * uniform[:, :1]) ** (1 / 3)
    stretch = (uniform[:, 1:4] - uniform[:, 1:4].mean(1, keepdim=True)) * math.log(4 / 3)
    edges = (edge * stretch.exp()).clamp(max=1.0)  # [B, 3]
    centre = (uniform[:, 4:7] * 2 - 1) * (1 - edges)
    allowed = torch.tensor([views.horizontal_flip, views.vertical_flip, views.vertical_flip])
    flips = 1.0 - 2.0 * ((uniform[:, 7:10] < 0.5) & allowed).float()
    angles = (uniform[:, 10:13] * 2 - 1) * math.radians(views.rotation)
    turns = rotation(angles[:, 0], 0) @ rotation(angles[:, 1], 1) @ rotation(angles[:, 2], 2)
    return torch.cat([edges.unsqueeze(2) * turns * flips.unsqueeze(1), centre.unsqueeze(2)], dim=2)


def rotation(angle: Tensor, axis: int) -> Tensor:
    """Return rotations about the x, y or z axis: [B] in radians -> [B, 3, 3]."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    turns = torch.eye(3).repeat(len(angle), 1, 1)
    turns[:, first, first] = turns[:, second, second] = angle.cos()
    turns[:, first, second], turns[:, second, first] = -angle.sin(), angle.sin()
    return turns
