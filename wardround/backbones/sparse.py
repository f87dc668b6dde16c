"""Convolutional networks on images with holes (SparK, Tian et al. 2023, arXiv:2301.03580).

A dense network given zeros for the hidden patches fills them layer by layer: convolutions smear across
the border, biases and norms make zeros into something. Here the mask is an argument, and is applied
again after every layer that could fill a hole, so that hidden positions stay exactly zero at every
resolution; statistics are over visible positions alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import CecaModule, EcaModule, EffectiveSEModule, LayerNorm2d, SEModule
from timm.layers.cbam import ChannelAttn
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.senet import SEModule as LegacySEModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wardround.errors import ConfigError

# They take a mean (and some a maximum) over the whole map, which must be that over its visible positions.
POOLING = (ChannelAttn, EcaModule, CecaModule, EffectiveSEModule, LegacySEModule, SEModule, SqueezeExcite)
# Zero stays zero: no need to mask again. Whatever is not named here is masked.
KEEPS_ZERO = (nn.Identity, nn.Dropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish)
FINEST = 4  # the least stride of a map that a decoder sees, as in SparK


class Mask:
    """Which positions are visible: given on the coarsest grid, and asked for at any resolution."""

    def __init__(self, visible: Tensor) -> None:
        """visible: [B, 1, *grid], true or 1 where visible."""
        self.visible = visible
        self.grid = tuple(visible.shape[2:])
        self._at: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = {}

    def fits(self, size: tuple[int, ...]) -> bool:
        """Return whether a map of this height and width (and depth) has the grid's positions, each k times an edge."""
        whole = len(size) == len(self.grid) and all(s % g == 0 for s, g in zip(size, self.grid, strict=True))
        return whole and len({s // g for s, g in zip(size, self.grid, strict=True)}) == 1

    def at(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the mask at a resolution, 1 where visible: [B, 1, *size]."""
        if (size, dtype) not in self._at:
            mask = self.visible.to(dtype)
            for axis, (edge, positions) in enumerate(zip(size, self.grid, strict=True), start=2):
                mask = mask.repeat_interleave(edge // positions, dim=axis)
            self._at[size, dtype] = mask
        return self._at[size, dtype]

    def of(self, x: Tensor) -> Tensor:
        """Return the mask of a map [B, C, *size]: [B, 1, *size]."""
        return self.at(tuple(x.shape[2:]), x.dtype)

    def fill(self, x: Tensor) -> Tensor:
        """Return a map whose hidden positions hold the mean over its visible ones, channel by channel."""
        mask = self.of(x)
        axes = tuple(range(2, x.ndim))
        mean = (x * mask).sum(axes, keepdim=True) / mask.sum(axes, keepdim=True)
        return torch.where(mask.bool(), x, mean)


def masked_maps(net: Any, images: Tensor, visible: Tensor) -> list[Tensor]:
    """Return a network's maps of the visible part of images, fine to coarse, zero at hidden positions.

    images: [B, C, *size]; visible: [B, 1, *grid] on the grid of the last map. The last map is
    `net.forward_features`; those before it, at strides of 4 and more, are the outputs that timm's
    `feature_info` names, where the network has one.
    """
    mask = Mask(visible)
    found: dict[tuple[int, ...], Tensor] = {}

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        found[tuple(out.shape[2:])] = out

    named = dict(net.named_modules())
    handles = [named[name].register_forward_hook(keep) for name in _stage_names(net)]
    try:
        with masking(net, mask):
            last: Tensor = net.forward_features(images * mask.of(images))
    finally:
        for handle in handles:
            handle.remove()
    found[tuple(last.shape[2:])] = last
    return [found[size] for size in sorted(found, reverse=True)]


@contextmanager
def masking(net: nn.Module, mask: Mask) -> Iterator[None]:
    """Apply a mask after every layer of a network that could fill a hole, until the block ends."""
    handles = []
    norms = []
    try:
        for module in net.modules():
            if getattr(module, "grad_checkpointing", False):
                raise ConfigError(
                    "site.toml: checkpointing = true: masked autoencoding of convolutional backbones cannot, since a "
                    "layer computed again would not know the mask; remove the line."
                )
            if isinstance(module, POOLING):
                handles.append(module.register_forward_pre_hook(_filled(mask)))
                handles.append(module.register_forward_hook(_masked(mask)))
            elif isinstance(module, nn.GroupNorm | _BatchNorm):
                module.forward = _norm(module, mask)  # type: ignore  # for this call alone
                norms.append(module)
            elif fills_holes(module):
                handles.append(module.register_forward_hook(_masked(mask)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms:
            del norm.forward


def masked_norm(x: Tensor, mask: Tensor, groups: int | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise by the visible positions alone: the map, zero at hidden positions, their mean and variance.

    x: [B, C, *size]; mask: [B, 1, *size], of x's dtype. `groups` normalises each image by groups of
    channels (Wu and He 2018), None each channel over the batch. Computed in float32 at least.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    mask = mask.to(wide)
    if groups is None:
        parts, axes, share = x.to(wide), (0, *range(2, x.ndim)), 1
    else:
        parts = x.to(wide).reshape(len(x), groups, -1, *x.shape[2:])  # [B, G, C / G, *size]
        mask, axes, share = mask.unsqueeze(1), tuple(range(2, x.ndim + 1)), parts.shape[2]
    count = mask.sum(axes, keepdim=True) * share
    mean = (parts * mask).sum(axes, keepdim=True) / count
    centred = (parts - mean) * mask
    variance = centred.square().sum(axes, keepdim=True) / count
    return (centred * (variance + eps).rsqrt()).view_as(x), mean, variance


def _norm(module: Any, mask: Mask) -> Callable[[Tensor], Tensor]:
    """Return the forward pass of a group or batch normalisation whose statistics are over visible positions."""

    def forward(x: Tensor) -> Tensor:
        plain: Callable[[nn.Module, Tensor], Tensor] = type(module).forward
        if not mask.fits(tuple(x.shape[2:])):  # inside a pooling module
            return plain(module, x)
        visible = mask.of(x)
        if isinstance(module, nn.GroupNorm):
            out, _, _ = masked_norm(x, visible, module.num_groups, module.eps)
        elif module.training or not module.track_running_stats:
            out, mean, variance = masked_norm(x, visible, None, module.eps)
            _remember(module, mean.flatten(), variance.flatten(), visible.sum())
        else:
            return plain(module, x) * visible
        if module.affine:
            broadcast = (-1, *[1] * (x.ndim - 2))
            out = out * module.weight.view(broadcast) + module.bias.view(broadcast) * visible
        out = out.to(x.dtype)
        # timm's norms with an activation in them
        return module.act(module.drop(out)) if hasattr(module, "act") else out

    return forward


@torch.no_grad()
def _remember(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Move a batch normalisation's running statistics as torch does."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked += 1
    share = 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_((variance * count / (count - 1)).to(norm.running_var.dtype), share)


def fills_holes(module: nn.Module) -> bool:
    """Return whether a module's own arithmetic could make zeros into something."""
    own = next(module.parameters(recurse=False), None) is not None
    return own or not (isinstance(module, KEEPS_ZERO) or any(True for _ in module.children()))


def channels_last(module: nn.Module) -> bool:
    """Return whether a layer works on [B, *size, C], as inside ConvNeXt's blocks."""
    plain_norm = isinstance(module, nn.LayerNorm) and not isinstance(module, LayerNorm2d)
    return isinstance(module, nn.Linear) or plain_norm or getattr(module, "channel_dim", 1) == -1


def _masked(mask: Mask) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    """Return a forward hook that masks a map; vectors inside pooling modules pass."""

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        last = channels_last(module)
        size = tuple(out.shape[1:-1] if last else out.shape[2:])
        if not mask.fits(size):
            return None
        visible = mask.at(size, out.dtype)
        return out * (visible.movedim(1, -1) if last else visible)

    return hook


def _filled(mask: Mask) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    """Return a hook that fills the holes of what goes into a module, so that its pooling sees visible means."""

    def hook(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        return mask.fill(args[0])

    return hook


def _stage_names(net: Any) -> list[str]:
    """Return the modules whose outputs are the maps before the last, one a stride."""
    deepest = {info["reduction"]: info["module"] for info in getattr(net, "feature_info", [])}
    return [name for stride, name in deepest.items() if stride >= FINEST]
