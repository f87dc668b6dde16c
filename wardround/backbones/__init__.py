"""Backbones: timm's families, as they are trained and as they are released."""

from wardround.backbones.adapt import load_into, reloaded
from wardround.backbones.backbone import Backbone
from wardround.backbones.build import build
from wardround.backbones.families import FAMILIES, Family, family_of
from wardround.backbones.fast_layers import fast_layers
from wardround.backbones.normalisation import batch_normalised
from wardround.backbones.onednn import product
from wardround.backbones.release import network_of, released_model, save_release
from wardround.backbones.vit import Token, ViT, initialise, resampled, sincos_positions, transformer

__all__ = [
    "FAMILIES",
    "Backbone",
    "Family",
    "Token",
    "ViT",
    "batch_normalised",
    "build",
    "family_of",
    "fast_layers",
    "initialise",
    "load_into",
    "network_of",
    "product",
    "released_model",
    "reloaded",
    "resampled",
    "save_release",
    "sincos_positions",
    "transformer",
]
