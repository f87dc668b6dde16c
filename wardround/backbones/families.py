"""The families of backbones: what each can be trained by, and how its release is read again.

A literal table. Any architecture of timm that one of these families builds may be named in a config;
what the family cannot do is refused with the reason, most of it by checks on the built network.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """Architectures that are built, masked and released alike."""

    modules: frozenset[str]  # the files of timm.models that build them
    masking: Literal["tokens", "sparse", "dense"]  # how `mae` hides pixels from them
    examples: tuple[str, ...]  # one tested architecture a size class
    stock: bool  # whether stock timm reloads the release


FAMILIES: dict[str, Family] = {
    "vit": Family(
        frozenset({"vision_transformer"}),
        "tokens",
        ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224"),
        stock=True,
    ),
    "resnet": Family(
        frozenset({"resnet"}), "sparse", ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), stock=True
    ),
}
