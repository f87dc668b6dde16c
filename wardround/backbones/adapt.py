"""Trained weights in a network of other channels, another size of image, or with a classifier."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from wardround.backbones.build import build
from wardround.backbones.compressed import reshape
from wardround.backbones.families import FAMILIES, family_of
from wardround.backbones.release import CONFIG, WEIGHTS, Encoder, module_of, timm_network
from wardround.backbones.timm_net import TimmNet
from wardround.backbones.vit import own_tensors
from wardround.config.federation import Recipe
from wardround.errors import CheckpointError, ConfigError
from wardround.update import State


def reloaded(
    recipe: Recipe,
    folder: Path,
    *,
    num_classes: int = 0,
    in_chans: int | None = None,
    img_size: int | None = None,
    features_only: bool = False,
) -> nn.Module:
    """Return the backbone of a release that stock timm cannot load, adapted as timm adapts its own.

    Tensors have the shapes that `config.json` lists where they were compressed. Raises ConfigError,
    or what timm raises, for arguments that this backbone cannot take.
    """
    tensors = load_file(folder / WEIGHTS)
    backbone, data = recipe.backbone, recipe.data
    if family_of(backbone.name) not in FAMILIES.values():
        return _volume(recipe, tensors, num_classes, (in_chans, img_size, features_only or None))
    changed = {"channels": in_chans or data.channels, "image_size": img_size or data.image_size}
    data = data.model_copy(update=changed)
    net: Any = timm_network(backbone, data)
    reshape(net, json.loads((folder / CONFIG).read_bytes()).get("compressed", {}).get("shapes", {}))
    net.load_state_dict(_fitted(tensors, net.state_dict(), first_layers(net)))
    if features_only:
        if not hasattr(net, "forward_intermediates"):
            raise ConfigError(f"backbone '{backbone.name}': has no maps of its stages; leave out features_only.")
        net = FeatureGetterNet(net, out_indices=list(range(len(net.feature_info))))
    elif num_classes:
        net.reset_classifier(num_classes)
    made: nn.Module = net
    return made


def load_into(recipe: Recipe, folder: Path) -> State:
    """Return the backbone's part of a state from a release folder, or another folder that timm wrote.

    Another number of channels is adapted as timm does (summed to grey, repeated to colour), tables of
    relative positions are resampled to another size of image. Raises ConfigError where names or
    shapes differ in any other way: the architecture, its normalisation or its patches are others;
    CheckpointError for a damaged file.
    """
    backbone = build(recipe.backbone, recipe.data)
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"initial_weights = '{folder}': '{WEIGHTS}' was cut or altered.") from error
    if family_of(recipe.backbone.name) is FAMILIES["vit"]:
        tensors = {f"backbone.{name}": tensor for name, tensor in own_tensors(tensors, folder).items()}
    module: nn.Module = module_of(backbone)  # a ViT's tensors now have our names, the others' are those of a release
    prefix = "backbone.net." if isinstance(backbone, TimmNet) else ""
    try:
        fitted = _fitted(tensors, module.state_dict(), first_layers(module))
        module.load_state_dict(fitted)
    except (RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"initial_weights = '{folder}': is no '{recipe.backbone.name}' with norm = '{recipe.backbone.norm}' as "
            f"[backbone] has it; name weights of the same backbone ({reason})."
        ) from error
    return {f"{prefix}{name}": tensor.float().numpy() for name, tensor in fitted.items()}


def _fitted(tensors: dict[str, Tensor], expected: dict[str, Tensor], first: tuple[str, ...]) -> dict[str, Tensor]:
    """Return weights with their first convolution and their tables of positions in the expected shapes.

    Whatever else differs is left to `load_state_dict`, which says so.
    """
    fitted = {}
    for name, tensor in tensors.items():
        shape = expected[name].shape if name in expected else tensor.shape
        if name.removesuffix(".weight") in first and shape[1] != tensor.shape[1]:
            tensor = adapt_input_conv(shape[1], tensor, base_chans=tensor.shape[1])
        elif name.endswith("relative_position_bias_table") and shape != tensor.shape:
            tensor = _resampled(tensor, round(shape[0] ** 0.5))
        elif name == "pos_embed" and shape != tensor.shape:
            tensor = resample_abs_pos_embed(tensor, [round((shape[1] - 1) ** 0.5)] * 2)  # [1, 1 + N, D]
        fitted[name] = tensor
    return fitted


def _resampled(table: Tensor, edge: int) -> Tensor:
    """Return a window's table of relative positions for another window: [K * K, H] -> [edge * edge, H]."""
    side = round(table.shape[0] ** 0.5)
    square = table.T.reshape(1, -1, side, side)  # [1, H, K, K]
    return F.interpolate(square, (edge, edge), mode="bicubic", align_corners=True)[0].flatten(1).T.contiguous()


def first_layers(net: Any) -> tuple[str, ...]:
    """Return the names of the convolutions that see the image: FastViT has two; of MONAI's networks none is told."""
    if isinstance(net, Encoder):
        return ("backbone.patch_embed.proj",)
    named = getattr(net, "pretrained_cfg", {}).get("first_conv", ())
    return (named,) if isinstance(named, str) else tuple(named)


def _volume(recipe: Recipe, tensors: dict[str, Tensor], num_classes: int, others: tuple[Any, ...]) -> nn.Module:
    """Return the backbone of a release for volumes, which is taken as it is."""
    if any(other is not None for other in others):
        raise ConfigError(
            f"backbone '{recipe.backbone.name}': takes volumes as in training and gives a vector; "
            "leave out in_chans, img_size and features_only."
        )
    backbone = build(recipe.backbone, recipe.data)
    model = module_of(backbone)
    model.load_state_dict(tensors)
    if not num_classes:
        return model
    return nn.Sequential(OrderedDict(backbone=model, head=nn.Linear(backbone.dim, num_classes)))
