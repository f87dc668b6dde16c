"""timm's networks other than plain ViTs: built whole, with the config's normalisation."""

from itertools import chain
from typing import Any

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from wardround.backbones.backbone import Backbone
from wardround.backbones.families import family_of
from wardround.backbones.normalisation import group_normalise
from wardround.config.federation import BackboneConfig, DataConfig
from wardround.errors import ConfigError


class TimmNet(Backbone):
    """A timm network without classifier; `net` has timm's own names."""

    def __init__(self, net: Any, dim: int) -> None:
        super().__init__()
        self.net = net  # any of timm's classes; what is asked of it, all of them have
        self.dim = dim

    def features(self, images: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, D], pooled as timm pools the family."""
        out: Tensor = self.net(images)
        return out

    def stages(self) -> list[list[str]]:
        """Return the stages as timm groups them for layer-wise rates."""
        groups: dict[int, list[str]] = group_parameters(self.net, self.net.group_matcher(coarse=True))
        return [[f"net.{name}" for name in groups[key]] for key in sorted(groups)]

    def checkpoint_activations(self) -> None:
        """Keep only what goes into each stage, as timm cuts the family. Raises ConfigError where it cannot."""
        try:
            self.net.set_grad_checkpointing()
        except (AssertionError, AttributeError):  # MONAI's networks have no such switch
            super().checkpoint_activations()


def build_timm_net(backbone: BackboneConfig, data: DataConfig) -> TimmNet:
    """Return a network as it is trained. Raises ConfigError for an image or a layer that does not fit."""
    family = family_of(backbone.name)
    if data.image_size < family.least:
        raise ConfigError(
            f"[data] image_size = {data.image_size}: '{backbone.name}' needs at least {family.least}; "
            "take larger images or another backbone."
        )
    try:
        net = create(backbone, **arguments(backbone, data))
        dim = _width(net, data)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"[backbone] name = '{backbone.name}' with image_size = {data.image_size}: timm refuses: {reason}"
        ) from error
    return TimmNet(net, dim)


def arguments(backbone: BackboneConfig, data: DataConfig) -> dict[str, Any]:
    """Return what timm's constructor takes for a config: plain values, fit for JSON."""
    family = family_of(backbone.name)
    size = {"img_size": data.image_size} if family.sized else {}
    return {**family.arguments, **size, "in_chans": data.channels}


def create(backbone: BackboneConfig, **given: Any) -> Any:
    """Return timm's network as its family says: cut, normalised, without classifier. Raises what timm raises."""
    family = family_of(backbone.name)
    net = timm.create_model(backbone.name.removeprefix(family.prefix), **given, num_classes=0)
    if family.cut:
        net.prune_intermediate_layers(1, prune_norm=False, prune_head=True)
        net.reset_classifier(0, "avg")
    if backbone.norm == "group":
        group_normalise(net)
    return net


def _width(net: nn.Module, data: DataConfig) -> int:
    """Return the width of the features, by a forward pass of shapes alone."""
    shapes = {name: tensor.to("meta") for name, tensor in chain(net.named_parameters(), net.named_buffers())}
    images = torch.zeros(2, data.channels, data.image_size, data.image_size, device="meta")
    _, width = torch.func.functional_call(net, shapes, (images,)).shape
    return int(width)
