"""From a config to a backbone as it is trained."""

import difflib

import timm
from timm.models import is_model_in_modules

from wardround.backbones.backbone import Backbone
from wardround.backbones.families import FAMILIES, Family
from wardround.backbones.timm_net import build_timm_net
from wardround.backbones.vit import build_vit
from wardround.config.federation import BackboneConfig, DataConfig
from wardround.errors import ConfigError


def build(backbone: BackboneConfig, data: DataConfig) -> Backbone:
    """Return the backbone of a config. Raises ConfigError for what no family can be."""
    if family_of(backbone.name) is FAMILIES["vit"]:
        return build_vit(backbone, data)
    if backbone.patch_size is not None or backbone.depth is not None:
        raise ConfigError(f"[backbone] patch_size and depth are keys of ViTs; '{backbone.name}' is none. Remove them.")
    return build_timm_net(backbone, data)


def family_of(name: str) -> Family:
    """Return the family of an architecture. Raises ConfigError for one that has none."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"the families are {', '.join(FAMILIES)}."
        raise ConfigError(f"[backbone] name = '{name}': is no architecture of timm; {hint}")
    for family in FAMILIES.values():
        if is_model_in_modules(name, family.modules):
            return family
    raise ConfigError(f"[backbone] name = '{name}': its family is none of {', '.join(FAMILIES)}; take one of these.")
