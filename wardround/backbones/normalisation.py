"""Group normalisation in place of batch normalisation, whose statistics mix patients and drift between sites."""

import math

from timm.layers import BatchNormAct2d, GroupNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

GROUPS = 32  # at most, as in Wu and He 2018 (arXiv:1803.08494)


def group_normalise(net: nn.Module) -> None:
    """Replace every batch normalisation below a module by group normalisation, in place.

    Groups: the largest divisor of the channels that 32 has too. Names, scale and shift stay: a scale
    of zero in front of a shortcut is a choice of the architecture.
    """
    for name, child in net.named_children():
        if isinstance(child, _BatchNorm):
            setattr(net, name, _grouped(child))
        else:
            group_normalise(child)


def batch_normalised(net: nn.Module) -> list[str]:
    """Return the names of the layers that normalise by a batch's statistics, as far as types tell."""
    return [name for name, layer in net.named_modules() if isinstance(layer, _BatchNorm)]


def _grouped(norm: _BatchNorm) -> nn.GroupNorm:
    """Return the layer that stands for a batch normalisation, with its scale and shift."""
    groups = math.gcd(GROUPS, norm.num_features)
    if isinstance(norm, BatchNormAct2d):
        made: nn.GroupNorm = GroupNormAct(norm.num_features, groups, eps=norm.eps, affine=norm.affine)
        made.drop, made.act = norm.drop, norm.act
    else:
        made = nn.GroupNorm(groups, norm.num_features, eps=norm.eps, affine=norm.affine)
    made.weight, made.bias = norm.weight, norm.bias
    return made
