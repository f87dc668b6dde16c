"""The network of a compressed release: timm's own, some of its layers in other shapes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import Attention
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Shapes = Mapping[str, Sequence[int]]  # of tensors, by name


def reshape(net: nn.Module, shapes: Shapes) -> None:
    """Give some of a network's tensors other shapes, in place; their numbers are then whatever memory holds.

    `NAME.0.weight` and `NAME.1.weight` in the place of `NAME.weight` make it two layers, one behind the other. A layer
    of fewer units becomes narrower: group normalisation keeps the channels of a group, attention those of a head.
    """
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d) and f"{name}.0.weight" in shapes:
            net.set_submodule(name, in_two(layer, shapes[f"{name}.0.weight"][0]))
    for name, layer in net.named_modules():
        own = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
        others = {leaf: shapes[f"{name}.{leaf}"] for leaf, _ in own if f"{name}.{leaf}" in shapes}
        if others:
            _resize(layer, others)
    for layer in net.modules():
        if isinstance(layer, Attention) and isinstance(layer.qkv, nn.Linear):
            layer.num_heads = layer.qkv.out_features // 3 // layer.head_dim
            layer.attn_dim = layer.num_heads * layer.head_dim


def in_two(layer: nn.Linear | nn.Conv2d, rank: int) -> nn.Sequential:
    """Return two layers of a rank in the place of one: a convolution's first has its window, its second is 1 x 1."""
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Sequential(
            nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=bias)
        )
    window: dict[str, Any] = {
        key: getattr(layer, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    }
    return nn.Sequential(
        nn.Conv2d(layer.in_channels, rank, **window, bias=False), nn.Conv2d(rank, layer.out_channels, 1, bias=bias)
    )


def _resize(layer: nn.Module, shapes: Shapes) -> None:
    """Give a layer's parameters and buffers other shapes, and the layer the numbers that follow from them."""
    for leaf, shape in shapes.items():
        if leaf in layer._parameters:
            layer.register_parameter(leaf, nn.Parameter(torch.empty(*shape)))
        else:
            layer.register_buffer(leaf, torch.empty(*shape))
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = layer.weight.shape[:2]  # of ungrouped ones, which alone are pruned
    elif isinstance(layer, nn.GroupNorm):
        layer.num_groups = len(layer.weight) // (layer.num_channels // layer.num_groups)
        layer.num_channels = len(layer.weight)
    elif isinstance(layer, _BatchNorm):
        layer.num_features = len(layer.weight)
