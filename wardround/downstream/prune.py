"""Whole units cut out of a network's blocks: hidden units of MLPs, heads of attention, channels inside residual blocks.

What runs from block to block keeps its width, so that the features keep their meaning. A unit counts by the energy
that it sends on: its mean square over the images times the squared norm of the weights that read it (Wanda's score,
Sun et al. 2024, arXiv:2306.11695, over a whole unit). What is cut is made up for by what stays: the units left
predict it by least squares, and the reading layer's weights take that in (as He et al. 2017, arXiv:1707.06168).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import Attention, Mlp
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from wardround.config.federation import DataConfig
from wardround.downstream.moments import moments

RIDGE = 1e-3  # of the mean square of what predicts, so that units that say the same do not cancel one another


@dataclass(frozen=True)
class Units:
    """Units of equal width between the layers that make them and the one that reads them."""

    made_by: tuple[str, ...]  # a layer, and what normalises it
    read_by: str
    width: int  # channels of a unit
    times: int = 1  # how often the making layer has a row for each channel: three times in attention


def prune(
    model: nn.Module, images: NDArray[np.uint8], data: DataConfig, keep: float, device: str
) -> dict[str, Tensor] | None:
    """Return a network's tensors with a share of the units of each block, one at least; None where it has none.

    images: [N, C, S, S], of which at most 512 are looked at.
    """
    layers = dict(model.named_modules())
    found = list(units(layers))
    seen = moments(model, {one.read_by: layers[one.read_by] for one in found}, "in", images, data, device)
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    for one in found:
        reading = f"{one.read_by}.weight"
        kept, tensors[reading] = cut(tensors[reading], seen[one.read_by].second, one.width, keep)
        channels = seen[one.read_by].second.shape[0]
        for name in one.made_by:
            rows = torch.cat([kept + turn * channels for turn in range(one.times)])
            for leaf in [leaf for leaf in tensors if leaf.rpartition(".")[0] == name]:
                if tensors[leaf].ndim:  # not the count of batches
                    tensors[leaf] = tensors[leaf][rows]
    return tensors if found else None


def cut(weight: Tensor, second: Tensor, width: int, keep: float) -> tuple[Tensor, Tensor]:
    """Return which input channels of a layer stay, and its weights for these: [O, I, ...], [I, I] -> [K], [O, K, ...].

    Of `I / width` units the share `keep` stays, rounded up. Channels that are always zero are left out without
    changing any other weight.
    """
    exact = weight.double()
    energy = second.diagonal() * exact.transpose(0, 1).flatten(1).square().sum(1)
    scores = energy.reshape(-1, width).sum(1)
    count = math.ceil(keep * len(scores) - 1e-9)
    chosen = scores.argsort(descending=True, stable=True)[:count].sort().values
    stays = torch.zeros(len(scores), dtype=torch.bool).index_fill_(0, chosen, True).repeat_interleave(width)
    inside = second[stays][:, stays]
    inside = inside + RIDGE * inside.diagonal().mean() * torch.eye(len(inside), dtype=inside.dtype)
    predicts = torch.linalg.lstsq(inside, second[stays][:, ~stays]).solution  # [K, P]: the cut from the kept
    made_up = torch.einsum("op...,kp->ok...", exact[:, ~stays], predicts)
    return stays.nonzero().squeeze(1), (exact[:, stays] + made_up).float()


def units(layers: Mapping[str, nn.Module]) -> Iterator[Units]:
    """Give the units of a network's blocks, as timm names the layers of each kind of block."""
    for name, block in layers.items():
        if isinstance(block, Mlp) and isinstance(block.norm, nn.Identity):
            yield Units((f"{name}.fc1",), f"{name}.fc2", 1)
        elif (
            isinstance(block, Attention)
            and getattr(block, "gate", None) is None
            and isinstance(block.norm, nn.Identity)
        ):
            yield Units((f"{name}.qkv",), f"{name}.proj", block.head_dim, 3)
        elif isinstance(block, BasicBlock | Bottleneck) and block.conv2.groups == 1:
            last = 3 if isinstance(block, Bottleneck) else 2
            for place in range(1, last):
                norm = getattr(block, f"bn{place}")
                width = norm.num_channels // norm.num_groups if isinstance(norm, nn.GroupNorm) else 1
                yield Units((f"{name}.conv{place}", f"{name}.bn{place}"), f"{name}.conv{place + 1}", width)
