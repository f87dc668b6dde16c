"""What maps a network gives, found by running it once; what masked autoencoding cannot take is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wardround.backbones.sparse import POOLING, Mask, channels_last, fills_holes, masked_maps
from wardround.errors import ConfigError


@dataclass(frozen=True)
class Maps:
    """The maps that a decoder is built for."""

    widths: tuple[int, ...]  # channels, fine to coarse
    strides: tuple[int, ...]  # pixels an edge of a position; the last is the edge of a patch
    vector: int  # width of what layers behind the last map make of it; 0 where there are none
    axes: int  # 2 for images, 3 for volumes


def sparse_maps(net: Any, name: str, channels: int, size: int) -> Maps:
    """Return the maps of a convolutional network. Raises ConfigError where they do not keep to one grid.

    Two forward passes of two images; the second shows on this very network that hidden pixels reach
    no visible feature. On the meta device only shapes are looked at.
    """
    images = _probe(net, channels, size)
    sizes: dict[str, tuple[int, ...]] = {}
    with _undisturbed(net), _recorded(net, sizes):
        last: Tensor = net.forward_features(images)
    grid = tuple(last.shape[2:])
    _refuse_misaligned(net, name, sizes, grid, size)
    _refuse_small(name, grid, size)
    places = torch.meshgrid(*(torch.arange(g, device=images.device) for g in grid), indexing="ij")
    visible = (torch.stack(places).sum(0) % 2 == 0).expand(2, 1, *grid)  # a chessboard has the most borders
    mask = Mask(visible)
    images[1] = torch.where(mask.of(images)[0].bool(), images[0], images[1])
    with _undisturbed(net):
        maps = masked_maps(net, images, visible)
        vector = vector_behind(net, mask.fill(maps[-1])).shape[1] if _has_layers_behind(net, sizes) else 0
    if not images.is_meta:
        _refuse_leaks(name, maps, mask)
    return Maps(tuple(m.shape[1] for m in maps), tuple(size // m.shape[2] for m in maps), vector, len(grid))


def dense_maps(net: Any, name: str, channels: int, size: int) -> Maps:
    """Return the one map of a hierarchical transformer or a hybrid. Raises ConfigError where it is no grid."""
    images = _probe(net, channels, size)
    sizes: dict[str, tuple[int, ...]] = {}
    with _undisturbed(net), _recorded(net, sizes):
        last: Tensor = net.forward_features(images)
    with _undisturbed(net):
        vector = vector_behind(net, last).shape[1] if _has_layers_behind(net, sizes) else 0
    last = as_map(last, net.num_features, images.ndim - 2)
    grid = tuple(last.shape[2:])
    _refuse_small(name, grid, size)
    if any(size % g for g in grid):
        raise _misaligned(name, "its last layer", grid, grid, size)
    return Maps((last.shape[1],), (size // grid[0],), vector, len(grid))


def as_map(x: Tensor, width: int, axes: int) -> Tensor:
    """Return any of timm's layouts as a map: [B, C, *grid], [B, *grid, C] or [B, prefix + N, C] -> [B, C, *grid]."""
    if x.ndim == 3:
        side = int((x.shape[1] + 0.5) ** (1 / axes))  # the prefix is too short to be another row
        return x[:, -(side**axes) :].movedim(1, -1).reshape(len(x), -1, *[side] * axes)
    return x if x.shape[1] == width else x.movedim(-1, 1)


def vector_behind(net: Any, last: Tensor) -> Tensor:
    """Return what the layers behind the last map make of it, one vector an image: [B, D]."""
    vector: Tensor = net.forward_head(last)
    return vector


def _has_layers_behind(net: Any, sizes: dict[str, tuple[int, ...]]) -> bool:
    """Return whether some layer with parameters did not run up to the last map, such as MobileNetV3's last one."""
    idle = (module for name, module in net.named_modules() if name and name not in sizes)
    return hasattr(net, "forward_head") and any(True for module in idle for _ in module.parameters(recurse=False))


def _probe(net: nn.Module, channels: int, size: int) -> Tensor:
    """Return two images that differ at every pixel: [2, C, *size]."""
    kernel = next(p for p in net.parameters() if p.ndim >= 4)  # the first convolution's, [out, in, *kernel]
    shape = (2, channels, *[size] * (kernel.ndim - 2))
    return torch.arange(torch.Size(shape).numel(), device=kernel.device, dtype=kernel.dtype).sin().view(shape)


@contextmanager
def _undisturbed(net: nn.Module) -> Iterator[None]:
    """Run a network without a trace: no graph, no dropout, no running statistics moved."""
    training = {module: module.training for module in net.modules()}
    net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was in training.items():
            module.training = was


@contextmanager
def _recorded(net: nn.Module, sizes: dict[str, tuple[int, ...]]) -> Iterator[None]:
    """Record the shape without the batch of what each module gives, by name."""

    def record(name: str) -> Any:
        return lambda module, args, out: sizes.update({name: tuple(out.shape[1:]) if isinstance(out, Tensor) else ()})

    handles = [module.register_forward_hook(record(name)) for name, module in net.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_small(name: str, grid: tuple[int, ...], size: int) -> None:
    if min(grid) < 2:
        raise ConfigError(
            f"[backbone] name = '{name}': its last map of an image of {size} pixels is {_times(grid)}; masked "
            f"autoencoding needs at least two positions an edge. Set [data] image_size to {2 * size // min(grid)} "
            "or more, or take another backbone."
        )


def _refuse_misaligned(
    net: nn.Module, name: str, sizes: dict[str, tuple[int, ...]], grid: tuple[int, ...], size: int
) -> None:
    """Refuse maps that are not k times the last one, and layers that pool over holes unrecognised."""
    pooling = tuple(f"{place}." for place, module in net.named_modules() if isinstance(module, POOLING))
    whole = Mask(torch.ones(1, 1, *grid))
    for place, module in net.named_modules():
        masked = isinstance(module, nn.GroupNorm) or fills_holes(module)
        if place not in sizes or place.startswith(pooling) or not masked:
            continue
        out = sizes[place]
        found = out[:-1] if channels_last(module) else out[1:]
        if found == () or (max(found) == 1 < max(grid)):
            raise ConfigError(
                f"[backbone] name = '{name}': '{place}' works on the whole map at once, in a way that "
                "masked autoencoding does not know. Take another backbone, or another method than 'mae'."
            )
        if not whole.fits(found) or any(size % edge for edge in found):
            raise _misaligned(name, f"'{place}'", found, grid, size)


def _misaligned(name: str, place: str, found: tuple[int, ...], grid: tuple[int, ...], size: int) -> ConfigError:
    return ConfigError(
        f"[backbone] name = '{name}': {place} gives a map of {_times(found)}: it, the last map's {_times(grid)} "
        f"and the image's {size} pixels do not divide one another, so that no patch could be hidden whole. Change "
        "[data] image_size to a multiple of the network's stride, or take another backbone or another method."
    )


def _refuse_leaks(name: str, maps: list[Tensor], mask: Mask) -> None:
    """Refuse a network with a hole that is not zero, or a feature that tells images of equal visible parts apart."""
    for x in maps:
        holes = x * (1 - mask.of(x))
        if holes.any() or not torch.allclose(x[0], x[1], rtol=1e-4, atol=1e-5 * float(x.abs().max())):
            raise ConfigError(
                f"[backbone] name = '{name}': hidden pixels would reach its map of {_times(tuple(x.shape[2:]))}; it "
                "has a layer that masked autoencoding cannot mask. Take another backbone, or another method than 'mae'."
            )


def _times(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))
