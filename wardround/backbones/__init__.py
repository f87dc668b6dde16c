"""Backbones: timm's families, as they are trained and as they are released."""

from wardround.backbones.release import save_release, timm_model
from wardround.backbones.vit import Token, ViT, build, initialise, sincos_positions

__all__ = ["Token", "ViT", "build", "initialise", "save_release", "sincos_positions", "timm_model"]
