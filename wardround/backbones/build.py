"""From a config to a backbone as it is trained."""

from wardround.backbones.backbone import Backbone
from wardround.backbones.families import FAMILIES, VOLUME_FAMILIES, family_of
from wardround.backbones.timm_net import build_timm_net
from wardround.backbones.vit import build_vit
from wardround.config.federation import BackboneConfig, DataConfig
from wardround.errors import ConfigError


def build(backbone: BackboneConfig, data: DataConfig) -> Backbone:
    """Return the backbone of a config. Raises ConfigError for what no family can be."""
    family = family_of(backbone.name)
    if family in VOLUME_FAMILIES.values():
        from wardround.backbones.monai3d import build_monai  # MONAI takes seconds to import, and images need none of it

        return build_monai(backbone, data)
    if data.dimensions == 3:
        known = ", ".join(example for one in VOLUME_FAMILIES.values() for example in one.examples)
        raise ConfigError(f"[backbone] name = '{backbone.name}': is a network for images; for volumes take {known}.")
    if family is FAMILIES["vit"]:
        return build_vit(backbone, data)
    if backbone.patch_size is not None or backbone.depth is not None:
        raise ConfigError(f"[backbone] patch_size and depth are keys of ViTs; '{backbone.name}' is none. Remove them.")
    return build_timm_net(backbone, data)
