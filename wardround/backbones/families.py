"""The families of backbones: what each can be trained by, and how its release is read again.

A literal table. Any architecture of timm that one of these families builds may be named in a config;
what the family cannot do is refused with the reason, most of it by checks on the built network.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, Literal

import timm
from timm.models import is_model_in_modules

from wardround.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """Architectures that are built, masked and released alike."""

    modules: frozenset[str]  # the files of timm.models that build them
    masking: Literal["tokens", "sparse", "dense"]  # how `mae` hides pixels; a check on the network has the last word
    examples: tuple[str, ...]  # one tested architecture a size class, the smallest first
    stock: bool  # whether stock timm reloads the release, with norm = group
    norm: Literal["none", "layer", "batch", "batch and layer"]  # timm's own; batch becomes the config's choice
    names: str = "*"  # which architectures of the modules
    prefix: str = ""  # what our name puts before timm's
    least: int = 16  # the smallest image, in pixels
    sized: bool = False  # built for one size of image; others are resampled to
    cut: bool = False  # without the layers between the last map and the classifier, which serve ImageNet's alone
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of timm's constructor


_RESNET, _EFFICIENTNET = frozenset({"resnet"}), frozenset({"efficientnet"})
# VGG's two wide layers are cut; until then they may as well be narrow: whole, they take three seconds and 0.5 GB.
_NARROW = {"mlp_ratio": 2**-12}

FAMILIES: dict[str, Family] = {  # the first that fits a name is its family
    "vit": Family(
        frozenset({"vision_transformer"}),
        "tokens",
        ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224"),
        stock=True,
        norm="layer",
    ),
    "seresnet": Family(
        _RESNET, "sparse", ("seresnet18", "seresnet50", "seresnet152"), stock=True, norm="batch", names="seresnet*"
    ),
    "cbam_resnet": Family(
        _RESNET,
        "sparse",
        ("cbam_resnet18", "cbam_resnet50"),
        stock=False,
        norm="batch",
        prefix="cbam_",
        arguments={"block_args": {"attn_layer": "cbam"}},
    ),
    "resnet": Family(
        _RESNET, "sparse", ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), stock=True, norm="batch"
    ),
    "densenet": Family(
        frozenset({"densenet"}),
        "sparse",
        ("densenet121", "densenet169", "densenet201"),
        stock=True,
        norm="batch",
        least=29,
    ),
    "vgg_bn": Family(
        frozenset({"vgg"}),
        "sparse",
        ("vgg11_bn", "vgg16_bn"),
        stock=False,
        norm="batch",
        names="*_bn",
        least=32,
        cut=True,
        arguments=_NARROW,
    ),
    "vgg": Family(
        frozenset({"vgg"}),
        "sparse",
        ("vgg11", "vgg16"),
        stock=False,
        norm="none",
        least=32,
        cut=True,
        arguments=_NARROW,
    ),
    "inception_v3": Family(
        frozenset({"inception_v3"}), "sparse", ("inception_v3",), stock=False, norm="batch", least=75
    ),
    "inception_v4": Family(
        frozenset({"inception_v4"}), "sparse", ("inception_v4",), stock=True, norm="batch", least=75
    ),
    "inception_resnet": Family(
        frozenset({"inception_resnet_v2"}), "sparse", ("inception_resnet_v2",), stock=False, norm="batch", least=75
    ),
    "xception": Family(
        frozenset({"xception_aligned"}), "sparse", ("xception41", "xception65", "xception71"), stock=False, norm="batch"
    ),
    "legacy_xception": Family(frozenset({"xception"}), "sparse", ("legacy_xception",), stock=False, norm="batch"),
    "mobilenetv2": Family(
        _EFFICIENTNET,
        "sparse",
        ("mobilenetv2_050", "mobilenetv2_100", "mobilenetv2_140"),
        stock=False,
        norm="batch",
        names="mobilenetv2_*",
    ),
    "mobilenetv3": Family(
        frozenset({"mobilenetv3"}),
        "sparse",
        ("mobilenetv3_small_050", "mobilenetv3_small_100", "mobilenetv3_large_100"),
        stock=False,
        norm="batch",
        names="*mobilenetv3_*",
        cut=True,
    ),
    "efficientnet": Family(
        _EFFICIENTNET, "sparse", tuple(f"efficientnet_b{size}" for size in range(8)), stock=False, norm="batch"
    ),
    "convnext": Family(
        frozenset({"convnext"}),
        "sparse",
        ("convnext_atto", "convnext_tiny", "convnext_base", "convnext_large"),
        stock=True,
        norm="layer",
        least=32,
    ),
    "swin": Family(
        frozenset({"swin_transformer"}),
        "dense",
        ("swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224", "swin_large_patch4_window7_224"),
        stock=True,
        norm="layer",
        sized=True,
        arguments={"strict_img_size": False, "drop_path_rate": 0.0},
    ),
    "mobilevit": Family(
        frozenset({"mobilevit"}),
        "dense",
        ("mobilevit_xxs", "mobilevit_s", "mobilevitv2_200"),
        stock=False,
        norm="batch and layer",
    ),
    "efficientvit": Family(
        frozenset({"efficientvit_mit"}),
        "dense",
        ("efficientvit_b0", "efficientvit_b2", "efficientvit_l2"),
        stock=False,
        norm="batch and layer",
        cut=True,
    ),
    "fastvit": Family(
        frozenset({"fastvit"}), "dense", ("fastvit_t8", "fastvit_sa12", "fastvit_ma36"), stock=False, norm="batch"
    ),
    "xcit": Family(
        frozenset({"xcit"}),
        "dense",
        ("xcit_nano_12_p16_224", "xcit_small_12_p8_224", "xcit_large_24_p16_224"),
        stock=False,
        norm="batch and layer",
        cut=True,
    ),
}


VOLUME_FAMILIES: dict[str, Family] = {  # MONAI's, which build_monai builds: each architecture is an example
    "monai_vit": Family(
        frozenset(), "tokens", ("monai_vit_tiny", "monai_vit_small", "monai_vit_base"), stock=False, norm="layer"
    ),
    "monai_swinunetr": Family(
        frozenset(), "dense", ("monai_swinunetr_small", "monai_swinunetr"), stock=False, norm="layer", least=32
    ),
    "monai_resnet": Family(
        frozenset(),
        "sparse",
        ("monai_resnet10", "monai_resnet18", "monai_resnet50"),
        stock=False,
        norm="batch",
        least=32,
    ),
}


def family_of(name: str) -> Family:
    """Return the family of an architecture. Raises ConfigError for one that has none."""
    for family in VOLUME_FAMILIES.values():
        if name in family.examples:
            return family
    if name.startswith("monai_"):
        known = [example for family in VOLUME_FAMILIES.values() for example in family.examples]
        raise ConfigError(f"[backbone] name = '{name}': expected one of {', '.join(known)}.")
    for family in FAMILIES.values():
        stock_name = name.removeprefix(family.prefix)
        named = name.startswith(family.prefix) and fnmatch(stock_name, family.names)
        if named and is_model_in_modules(stock_name, family.modules):
            return family
    if not timm.is_model(name):
        known = [example for family in FAMILIES.values() for example in family.examples]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"the families are {', '.join(FAMILIES)}."
        raise ConfigError(f"[backbone] name = '{name}': is no architecture of timm; {hint}")
    raise ConfigError(f"[backbone] name = '{name}': its family is none of {', '.join(FAMILIES)}; take one of these.")
