"""timm's networks other than plain ViTs: built whole, with the config's normalisation."""

import math
from typing import Any

import timm
from timm.layers import BatchNormAct2d
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wardround.backbones.backbone import Backbone
from wardround.config.federation import BackboneConfig, DataConfig

GROUPS = 32  # at most, as in Wu and He 2018 (arXiv:1803.08494)


class TimmNet(Backbone):
    """A timm network without classifier; `net` has timm's own names."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net  # any of timm's classes; what is asked of it, all of them have
        self.dim = net.num_features

    def features(self, images: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, D], pooled as timm pools the family."""
        out: Tensor = self.net(images)
        return out

    def stages(self) -> list[list[str]]:
        """Return the stages as timm groups them for layer-wise rates."""
        groups: dict[int, list[str]] = group_parameters(self.net, self.net.group_matcher(coarse=True))
        return [[f"net.{name}" for name in groups[key]] for key in sorted(groups)]


def build_timm_net(backbone: BackboneConfig, data: DataConfig) -> TimmNet:
    """Return a network as it is trained."""
    net = timm.create_model(backbone.name, in_chans=data.channels, num_classes=0)
    if backbone.norm == "group":
        group_normalise(net)
    return TimmNet(net)


def group_normalise(net: nn.Module) -> None:
    """Replace every batch normalisation below a module by group normalisation, in place; names stay.

    Groups: the largest divisor of the channels that 32 has too.
    """
    for name, child in net.named_children():
        if isinstance(child, _BatchNorm):
            groups = math.gcd(GROUPS, child.num_features)
            norm = nn.GroupNorm(groups, child.num_features, eps=child.eps)
            setattr(net, name, GroupNormAct(norm, child.drop, child.act) if isinstance(child, BatchNormAct2d) else norm)
        else:
            group_normalise(child)


class GroupNormAct(nn.GroupNorm):
    """Group normalisation and an activation in one layer, under timm's names."""

    def __init__(self, norm: nn.GroupNorm, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(norm.num_groups, norm.num_channels, eps=norm.eps)
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]"""
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out
