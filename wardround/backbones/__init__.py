"""Backbones: timm's families, as they are trained and as they are released."""

from wardround.backbones.backbone import Backbone
from wardround.backbones.build import build, family_of
from wardround.backbones.families import FAMILIES, Family
from wardround.backbones.release import save_release, timm_model
from wardround.backbones.vit import Token, ViT, initialise, sincos_positions

__all__ = [
    "FAMILIES",
    "Backbone",
    "Family",
    "Token",
    "ViT",
    "build",
    "family_of",
    "initialise",
    "save_release",
    "sincos_positions",
    "timm_model",
]
