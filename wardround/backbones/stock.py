"""Whether stock timm builds the very function that was trained, found out by building both.

timm takes `norm_layer = "groupnorm"` in some families, raises in others, ignores it in yet others,
and always makes 32 groups; so no list of names would stay true.
"""

from functools import lru_cache
from typing import Any

import timm
import torch
from torch import Tensor, nn

from wardround.backbones.families import family_of
from wardround.backbones.timm_net import arguments, create
from wardround.config.federation import BackboneConfig, DataConfig


@lru_cache(maxsize=8)
def stock_arguments(backbone: BackboneConfig, data: DataConfig) -> dict[str, Any] | None:
    """Return what stock timm builds a TimmNet's network from, fit for JSON; None where it cannot."""
    family = family_of(backbone.name)
    given = arguments(backbone, data)
    if backbone.norm == "group" and "batch" in family.norm:
        given["norm_layer"] = "groupnorm"
    with torch.random.fork_rng(devices=[]):  # the caller's own draws go on as if nothing was built
        torch.manual_seed(0)
        ours = create(backbone, **arguments(backbone, data)).eval()
        images = torch.randn(2, data.channels, data.image_size, data.image_size)
        weights = {name: _drawn(tensor) for name, tensor in ours.state_dict().items()}
        try:
            stock = timm.create_model(backbone.name.removeprefix(family.prefix), **given, num_classes=0).eval()
            stock.load_state_dict(weights)
        except (RuntimeError, ValueError, TypeError, AssertionError):
            return None
    ours.load_state_dict(weights)
    with torch.no_grad():
        same = torch.equal(ours(images), stock(images))
    return given if same and _groups(ours) == _groups(stock) else None


def _drawn(tensor: Tensor) -> Tensor:
    """Return a weight as it is, but scales, shifts and statistics drawn: some of them start at 0, which hides much."""
    return torch.rand_like(tensor) + 0.5 if tensor.ndim == 1 else tensor


def _groups(net: nn.Module) -> list[tuple[str, int, float]]:
    """Return the group normalisations: an eps too small to change random features may change trained ones."""
    return [(n, layer.num_groups, layer.eps) for n, layer in net.named_modules() if isinstance(layer, nn.GroupNorm)]
