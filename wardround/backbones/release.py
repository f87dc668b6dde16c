"""A backbone as stock timm reads it: the folder that is registered, pulled and loaded."""

import hashlib
import json
from pathlib import Path
from typing import Any

import timm
from timm.models import save_for_hf
from torch import nn

from wardround.backbones.vit import timm_arguments, timm_state
from wardround.config.federation import Recipe
from wardround.update import State


def timm_model(recipe: Recipe, state: State) -> nn.Module:
    """Return stock timm's model with a state's backbone, without a classifier, in evaluation mode."""
    arguments = timm_arguments(recipe.backbone, recipe.data)
    model: nn.Module = timm.create_model(recipe.backbone.name, **arguments, num_classes=0)
    model.load_state_dict(timm_state(state, recipe.backbone, recipe.data))
    return model.eval()


def save_release(recipe: Recipe, state: State, folder: Path, provenance: dict[str, Any]) -> None:
    """Write `model.safetensors`, timm's `config.json` and `provenance.json` with the hash of both.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` then loads it without Wardround.
    """
    model = timm_model(recipe, state)
    data = recipe.data
    # timm would otherwise write its own tag, licence, mean and std for weights that are not its own.
    declared: dict[str, Any] = {
        "architecture": recipe.backbone.name,
        "tag": recipe.name,
        "input_size": [data.channels, data.image_size, data.image_size],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": list(data.mean),
        "std": list(data.std),
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "see provenance.json",
        "origin_url": "",
    }
    model.pretrained_cfg = declared  # type: ignore[assignment]  # timm hangs a dictionary on the module
    folder.mkdir(parents=True, exist_ok=True)
    arguments = timm_arguments(recipe.backbone, data)
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    (folder / "model.safetensors").chmod(0o644)  # a release is for others to read; safetensors writes 0600
    hashes = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("model.safetensors", "config.json")
    }
    (folder / "provenance.json").write_text(json.dumps({**provenance, "sha256": hashes}, indent=2, sort_keys=True))
