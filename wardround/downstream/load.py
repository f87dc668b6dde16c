"""A released backbone as a timm model."""

import json
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from torch import nn

from wardround.backbones import reloaded
from wardround.config import Protocol, parse
from wardround.errors import CheckpointError, ConfigError
from wardround.registry.release import CONFIG, PROVENANCE, is_stock
from wardround.registry.source import release_folder

__all__ = ["load_backbone", "protocol_of", "release_folder"]


def load_backbone(
    source: str | Path,
    *,
    num_classes: int = 0,
    in_chans: int | None = None,
    img_size: int | None = None,
    features_only: bool = False,
    uri: str | None = None,
    trust: str | None = None,
) -> nn.Module:
    """Return a backbone as timm's model with its trained weights; `num_classes` adds a new, untrained classifier.

    Where stock timm would build another function from the same weights, Wardround builds the network.

    `source` is a release folder, a finished run folder, `NAME@alias` or `NAME/version`; the latter two
    are fetched from MLflow at `uri`, by default $MLFLOW_TRACKING_URI. The signature is compared with the
    fingerprint in `trust`, by default $WARDROUND_TRUST. Another `in_chans` or `img_size`
    adapts the trained weights; with `features_only` the model returns the maps of its stages.
    Raises ConfigError for arguments that this backbone cannot take, CheckpointError for a damaged release.
    """
    wanted = {"in_chans": in_chans, "img_size": img_size, "features_only": features_only or None}
    arguments: dict[str, Any] = {key: value for key, value in wanted.items() if value is not None}
    if not features_only:
        arguments["num_classes"] = num_classes
    with release_folder(source, uri, trust) as folder:
        try:
            if is_stock(folder):
                model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments)
            else:
                model = reloaded(protocol_of(folder), folder, **arguments)
                model.pretrained_cfg = json.loads((folder / CONFIG).read_bytes())["pretrained_cfg"]
            check_patches(model, img_size)
        except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError, SafetensorError) as error:
            given = ", ".join(f"{key} = {value}" for key, value in arguments.items())
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"backbone '{source}': timm cannot build it with {given}: {reason}") from error
    return model


def check_patches(model: nn.Module, img_size: int | None) -> None:
    """Raise ValueError where patches do not cover the image: timm builds that, and leaves the last pixels out."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1,))
    if img_size is not None and isinstance(patch, tuple) and img_size % patch[0]:
        raise ValueError(f"patches of {patch[0]} pixels do not cover an image of {img_size}; take a multiple")


def protocol_of(folder: Path) -> Protocol:
    """Return the protocol in a release's provenance. Raises CheckpointError where there is none."""
    try:
        found = json.loads((folder / PROVENANCE).read_bytes())["protocol"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: '{PROVENANCE}' does not say how the backbone was trained.") from error
    return parse(found, Protocol, f"{folder / PROVENANCE}")
