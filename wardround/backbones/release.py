"""A backbone as others read it: the folder that is registered, pulled and loaded."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wardround.backbones.backbone import Backbone
from wardround.backbones.build import build
from wardround.backbones.compressed import Shapes, reshape
from wardround.backbones.families import FAMILIES, family_of
from wardround.backbones.normalisation import batch_normalised
from wardround.backbones.recalibrate import recalibrate
from wardround.backbones.stock import stock_arguments
from wardround.backbones.timm_net import TimmNet, arguments, create
from wardround.backbones.vit import timm_arguments, timm_state
from wardround.config.federation import BackboneConfig, DataConfig, Recipe
from wardround.config.strict import parse
from wardround.update import State

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Encoder(nn.Module):
    """A backbone whose forward pass is `features`, for networks that are none of timm's."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, S, S] or [B, C, S, S, S] -> [B, D]"""
        return self.backbone.features(images)


def released_model(recipe: Recipe, state: State, images: NDArray[np.uint8] | None = None) -> nn.Module:
    """Return a state's backbone as a module from images to features, under timm's names, in evaluation mode.

    Statistics of batch normalisation, which no state holds, are those of `images` [N, C, S, S]; where
    scale and shift stay at the sites too (fedbn), they are 1 and 0. Raises ConfigError where images
    are needed and are not there.
    """
    if family_of(recipe.backbone.name) is FAMILIES["vit"]:
        vit = timm_network(recipe.backbone, recipe.data)
        vit.load_state_dict(timm_state(state, recipe.backbone, recipe.data))
        return vit.eval()
    backbone = build(recipe.backbone, recipe.data)
    staying = set()
    for name, layer in backbone.named_modules():
        if isinstance(layer, _BatchNorm):
            layer.reset_parameters()  # some begin with a scale of 0, which would silence a branch for good
            staying |= {f"{name}.{tensor}" for tensor in layer.state_dict()}
    given = {
        n.removeprefix("backbone."): torch.from_numpy(np.array(a))
        for n, a in state.items()
        if n.startswith("backbone.")
    }
    wrong = backbone.load_state_dict(given, strict=False)
    assert not wrong.unexpected_keys and staying.issuperset(wrong.missing_keys)
    model = module_of(backbone)
    if batch_normalised(model):
        recalibrate(model, images, recipe.data)
    return model.eval()


def save_release(
    recipe: Recipe,
    state: State,
    folder: Path,
    provenance: dict[str, Any],
    images: NDArray[np.uint8] | None = None,
) -> None:
    """Write `model.safetensors`, `config.json` and `provenance.json` with the hash of both.

    Where provenance says `"stock_timm": true`, `timm.create_model("local-dir:FOLDER", pretrained=True)`
    loads it without Wardround; elsewhere that raises, and `wardround.downstream.load` rebuilds it.
    `images` are for statistics of batch normalisation, as in `released_model`.
    """
    model = released_model(recipe, state, images)
    arguments = model_arguments(recipe)
    declared = _declared(recipe, model)
    folder.mkdir(parents=True, exist_ok=True)
    if arguments is not None:
        model.pretrained_cfg = declared  # type: ignore[assignment]  # timm hangs a dictionary on the module
        save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    else:
        # A name that timm does not know: it would load what names and shapes admit, and compute something else.
        unknown = f"{recipe.backbone.name} of Wardround, to be loaded by wardround.downstream.load.load_backbone"
        save_file(model.state_dict(), folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps({"architecture": unknown, "pretrained_cfg": declared}, indent=2))
    (folder / WEIGHTS).chmod(0o644)  # a release is for others to read; safetensors writes 0600
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (WEIGHTS, CONFIG)}
    said = {**provenance, "stock_timm": arguments is not None, "sha256": hashes}
    if batch_normalised(model) and images is not None:
        affine = "1 and 0: they stay at the sites" if recipe.backbone.batch_norm == "fedbn" else "trained"
        said["batch_norm"] = {"statistics": f"of {len(images)} public images", "scale and shift": affine}
    (folder / "provenance.json").write_text(json.dumps(said, indent=2, sort_keys=True))


def model_arguments(recipe: Recipe) -> dict[str, Any] | None:
    """Return what stock timm builds a recipe's backbone from, or None where it cannot."""
    family = family_of(recipe.backbone.name)
    if family is FAMILIES["vit"]:
        return timm_arguments(recipe.backbone, recipe.data)
    return stock_arguments(recipe.backbone, recipe.data) if family in FAMILIES.values() else None


def timm_network(backbone: BackboneConfig, data: DataConfig) -> nn.Module:
    """Return timm's network, untrained, under the names of a release; not of volumes. Raises what timm raises."""
    if family_of(backbone.name) is FAMILIES["vit"]:
        vit: nn.Module = timm.create_model(backbone.name, **timm_arguments(backbone, data), num_classes=0)
        return vit
    net: nn.Module = create(backbone, **arguments(backbone, data))
    return net


def network_of(backbone: Mapping[str, Any], data: Mapping[str, Any], shapes: Shapes | None = None) -> nn.Module:
    """Return the network, untrained, that the weights of a release fit, from sections of its protocol as JSON has them.

    `shapes` are those that `config.json` lists of a compressed one. Raises ConfigError for what no network can be.
    """
    own, given = parse(dict(backbone), BackboneConfig, "[backbone]"), parse(dict(data), DataConfig, "[data]")
    if shapes is None:
        return module_of(build(own, given))
    net = timm_network(own, given)
    reshape(net, shapes)
    return net


def module_of(backbone: Backbone) -> nn.Module:
    """Return a backbone as the module that a release holds."""
    return backbone.net if isinstance(backbone, TimmNet) else Encoder(backbone)


def _declared(recipe: Recipe, model: nn.Module) -> dict[str, Any]:
    """Return what timm calls the pretrained configuration; its own would give tag, licence, mean and std of others."""
    data = recipe.data
    known = getattr(model, "pretrained_cfg", {})
    return {
        "architecture": recipe.backbone.name.removeprefix(family_of(recipe.backbone.name).prefix),
        "tag": recipe.name,
        "input_size": list(data.shape),
        "fixed_input_size": True,
        "interpolation": "bilinear",  # as data.to_square makes an image of any size the square that is trained on
        "crop_mode": "squash",
        "crop_pct": 1.0,
        "mean": list(data.mean),
        "std": list(data.std),
        "num_classes": 0,
        "first_conv": known.get("first_conv"),
        "classifier": known.get("classifier"),
        "license": "see provenance.json",
        "origin_url": "",
    }
