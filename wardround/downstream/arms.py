"""What is compared on the same images: backbones, the random initialisation, raw pixels, ImageNet's weights."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.functional import interpolate

from wardround.backbones import FAMILIES, build, family_of, released_model
from wardround.config.federation import Recipe
from wardround.downstream.load import check_patches, load_backbone, protocol_of
from wardround.errors import ConfigError
from wardround.probe.features import BATCH, features

__all__ = ["Arm", "Network", "imagenet_arm", "protocol_of", "raw_pixels", "release_arm", "three_arms", "untrained_arm"]

Images = NDArray[np.uint8]
Arm = Callable[[Images], NDArray[np.float32]]  # images [N, C, S, S] -> features [N, D]
RAW_SIZE = 32


@dataclass(frozen=True)
class Network:
    """An arm that is a network, so that it can be trained on as well as probed."""

    build: Callable[[Images], nn.Module]  # a new copy, [B, C, S, S] -> [B, D]; of the images it takes batch statistics
    recipe: Recipe  # [views] to augment by, [data] to normalise by
    untrained: bool = False  # to tune it is to train from scratch
    device: str = "cpu"
    autocast: bool = False  # bfloat16, three times as fast on processors that have it

    def __call__(self, images: Images) -> NDArray[np.float32]:
        """[N, C, S, S] -> [N, D], frozen."""
        return self.features(images, BATCH)

    def features(self, images: Images, batch_size: int) -> NDArray[np.float32]:
        """[N, C, S, S] -> [N, D], frozen, so many images at once."""
        return self.of(self.build(images), images, batch_size)

    def of(self, encoder: nn.Module, images: Images, batch_size: int) -> NDArray[np.float32]:
        """Return the features of an encoder that takes images as this arm's does."""
        data = self.recipe.data
        return features(
            encoder, images, data.mean, data.std, device=self.device, autocast=self.autocast, batch_size=batch_size
        )


def three_arms(folder: Path, *, device: str = "cpu", autocast: bool = False) -> dict[str, Arm]:
    """Return the arms of a release by name; `random` is the encoder that the seed initialises.

    Raises CheckpointError for a release that does not say how it was trained.
    """
    return {
        "backbone": release_arm(folder, device=device, autocast=autocast),
        "random": untrained_arm(protocol_of(folder), device=device, autocast=autocast),
        "raw pixels": raw_pixels,
    }


def untrained_arm(recipe: Recipe, *, device: str = "cpu", autocast: bool = False) -> Network:
    """Return the encoder that a recipe's seed initialises.

    With batch normalisation it takes its statistics from the very images that it is given, as it has no others;
    that can only flatter it.
    """
    with torch.random.fork_rng(devices=[]):  # a method draws its backbone first, and then its head
        torch.manual_seed(recipe.seed)
        drawn = build(recipe.backbone, recipe.data)
    start = {f"backbone.{name}": tensor.detach().numpy() for name, tensor in drawn.state_dict().items()}
    return Network(lambda images: released_model(recipe, start, images), recipe, True, device, autocast)


def release_arm(folder: Path, *, device: str = "cpu", autocast: bool = False) -> Network:
    """Return the arm of a release folder, with the constants that it was trained with."""
    model = load_backbone(folder)
    return Network(lambda _: copy.deepcopy(model), protocol_of(folder), False, device, autocast)


def imagenet_arm(file: Path, recipe: Recipe, *, device: str = "cpu", autocast: bool = False) -> Network:
    """Return timm's own network of a recipe's name with the weights in a safetensors file.

    It has timm's patch size, depth, normalisation layers and constants, at the recipe's image size and
    channels: timm adapts the first convolution and the positions, and leaves the classifier out.
    Raises ConfigError for another kind of file and for weights of another architecture.
    """
    name, data = recipe.backbone.name, recipe.data
    family = family_of(name)
    if family not in FAMILIES.values() or family.prefix:
        raise ConfigError(f"--imagenet {file}: '{name}' is no architecture of timm, which has no weights for it.")
    if file.suffix != ".safetensors" or not file.is_file():
        raise ConfigError(f"--imagenet {file}: is no file NAME.safetensors; save timm's weights of '{name}' as one.")
    arguments: dict[str, Any] = {"in_chans": data.channels, "num_classes": 0}
    if family is FAMILIES["vit"] or family.sized:
        arguments["img_size"] = data.image_size
    try:
        _check_names(file, name)
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **arguments)
        check_patches(model, data.image_size)
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--imagenet {file}: is not timm's '{name}' for images of {data.image_size}: {reason}"
        ) from error
    declared = {key: _of_channels(model.pretrained_cfg[key], data.channels) for key in ("mean", "std")}
    own = recipe.model_copy(update={"data": data.model_copy(update=declared)})
    return Network(lambda _: copy.deepcopy(model), own, False, device, autocast)


def refuse_volumes(source: str, recipe: Recipe) -> None:
    """Raise ConfigError for a backbone of volumes, which nothing here probes."""
    if recipe.data.dimensions == 3:
        raise ConfigError(
            f"backbone '{source}': is one of volumes, and only those of flat images are probed. Measure it in MONAI "
            "('wardround export --format monai'), or on its features (docs/volumes.md says how to take them)."
        )


def check_shape(name: str, recipe: Recipe, images: Images) -> None:
    """Raise ConfigError where images are not of the size and channels that an arm takes."""
    if images.shape[1:] != recipe.data.shape:
        raise ConfigError(
            f"evaluation set: images are {images.shape[1:]}, the {name} takes {recipe.data.shape}; "
            "only backbones that take the same images can be compared."
        )


def raw_pixels(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return images as 32 x 32 numbers a channel: the floor that any backbone should beat."""
    small = [
        interpolate(torch.from_numpy(np.array(part)).float(), (RAW_SIZE, RAW_SIZE), mode="bilinear", antialias=True)
        for part in np.array_split(images, len(images) // 1024 + 1)
    ]
    flat: NDArray[np.float32] = torch.cat(small).flatten(1).numpy()
    return flat


def _check_names(file: Path, name: str) -> None:
    """Raise ValueError where a file lacks a network's tensors: without a classifier timm takes what it finds."""
    with torch.device("meta"):
        expected = timm.create_model(name, num_classes=0).state_dict()
    with safe_open(file, "pt") as found:
        missing = sorted(set(expected) - set(found.keys()))
    if missing := [tensor for tensor in missing if not tensor.endswith("num_batches_tracked")]:
        raise ValueError(f"it lacks {len(missing)} of {len(expected)} tensors (first: '{missing[0]}')")


def _of_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return constants of three colours for so many channels: grey takes their mean, as timm sums the weights."""
    return tuple(values) if channels == len(values) else (sum(values) / len(values),) * channels
