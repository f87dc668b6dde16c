"""A pretrained backbone inside MONAI's segmentation networks, which take the weights as they are.

The encoder is timm's own network, so that its maps and hidden states are those of `load_backbone` to the bit: MONAI's
ResNets and ViTs differ in normalisation, have no class token, and another epsilon. The decoder is MONAI's.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from monai.networks.nets.flexible_unet import FLEXUNET_BACKBONE, FlexibleUNet
from monai.networks.nets.unetr import UNETR
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import interpolate

from wardround.downstream.load import load_backbone, release_folder
from wardround.errors import ConfigError
from wardround.registry.release import CONFIG

_NORM = ("group", {"num_groups": 8})  # of decoders: alike in training and afterwards, however small the batch
_NAME = "wardround"  # of the encoder in MONAI's table, while the network is built
_SKIPS = (3, 6, 9)  # which hidden states of twelve UNETR's decoder takes
_PATH = (32, 64, 128, 256)  # channels of the hybrid's convolutions, from the image down


class Segmenter(nn.Module):
    """A network of MONAI's whose answer has the image's size: [B, C, S, S], normalised -> logits [B, K, S, S]."""

    pretrained_cfg: dict[str, Any]  # timm's: input_size, mean, std

    def __init__(self, net: nn.Module, decoder: str) -> None:
        super().__init__()
        self.net = net
        self.decoder = decoder

    def forward(self, images: Tensor) -> Tensor:
        """Return a logit a class and pixel; class 0 is the background by convention."""
        out: Tensor = self.net(images)
        return out if out.shape[2:] == images.shape[2:] else interpolate(out, images.shape[2:], mode="bilinear")


class Maps(nn.Module):
    """The maps of a convolutional network's stages, each half as wide as the one before."""

    def __init__(self, net: Any) -> None:
        """net: timm's, made with `features_only`. Raises ValueError where its maps do not halve step by step."""
        super().__init__()
        self.net = net
        strides = [info["reduction"] for info in net.feature_info]
        self.kept = [place for place, stride in enumerate(strides) if stride > 1]
        strides = [strides[place] for place in self.kept]
        if len(strides) < 2 or any(after != 2 * before for before, after in pairwise(strides)):
            raise ValueError(f"its maps have strides {strides}, and each must be half as wide as the one before")
        self.channels = [net.feature_info[place]["num_chs"] for place in self.kept]
        self.channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, C, S, S] -> the maps [B, D, S / stride, S / stride], the widest first"""
        found = self.net(images)
        maps = [found[place] for place in self.kept]
        return [one.permute(0, 3, 1, 2) for one in maps] if self.channels_last else maps


class Tokens(nn.Module):
    """A ViT as UNETR asks for it: the last patch tokens, and hidden states at three depths."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit
        depth = len(vit.blocks)
        self.places = {skip: min(depth - 1, round(depth * skip / 12)) for skip in _SKIPS}

    def forward(self, images: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """[B, C, S, S] -> [B, N, D] after the last norm, and by place of twelve [B, N, D].

        The class token is in every block, as in training, and left out of what is returned.
        """
        places = sorted(set(self.places.values()))
        last, found = self.vit.forward_intermediates(images, indices=places, output_fmt="NLC")
        at = dict(zip(places, found, strict=True))
        return last[:, self.vit.num_prefix_tokens :], {skip: at[place] for skip, place in self.places.items()}


class Hybrid(nn.Module):
    """A ViT's tokens as the deepest map, and a light convolutional path beside it for the wider ones.

    After TransUNet (Chen et al. 2021, arXiv:2102.04306), whose ViT sits on the convolutions; here it sees the image,
    as it was trained to.
    """

    def __init__(self, vit: VisionTransformer, channels: int) -> None:
        super().__init__()
        self.tokens = Tokens(vit)
        stages = min(len(_PATH), max(1, math.ceil(math.log2(vit.patch_embed.patch_size[0])) - 1))
        widths = (channels, *_PATH[:stages])
        self.path = nn.ModuleList(_halved(before, after) for before, after in pairwise(widths))
        self.channels = [*widths[1:], vit.embed_dim]

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, C, S, S] -> maps [B, D, S / stride, S / stride] of strides 2, 4, ..., the widest first"""
        maps = [self.path[0](images)]
        for stage in self.path[1:]:
            maps.append(stage(maps[-1]))
        tokens, _ = self.tokens(images)
        grid = self.tokens.vit.patch_embed.grid_size
        deepest = tokens.transpose(1, 2).unflatten(2, grid)
        edges = tuple(math.ceil(edge / 2) for edge in maps[-1].shape[2:])
        return [*maps, deepest if edges == grid else interpolate(deepest, edges, mode="bilinear")]


def load_segmenter(
    source: str | Path,
    classes: int,
    *,
    decoder: str | None = None,
    in_chans: int | None = None,
    img_size: int | None = None,
    uri: str | None = None,
    trust: str | None = None,
) -> Segmenter:
    """Return a segmentation network on a trained encoder; its decoder is new and untrained.

    `source`, `in_chans`, `img_size`, `uri` and `trust` as for `load_backbone`; images are normalised as for it, and
    `classes` counts the background. Decoders: `flexible_unet` on convolutional networks; `unetr` (the default) and
    `transunet` on ViTs. Raises ConfigError for another one, and for a backbone that none takes.
    """
    with release_folder(source, uri, trust) as folder:
        declared = json.loads((folder / CONFIG).read_bytes())["pretrained_cfg"]
        if len(declared["input_size"]) != 3:
            raise ConfigError(f"backbone '{source}': is a network for volumes; segmentation takes images.")
        load = partial(load_backbone, folder, in_chans=in_chans, img_size=img_size)
        model: Any = load()
        known = ("unetr", "transunet") if isinstance(model, VisionTransformer) else ("flexible_unet",)
        if (chosen := decoder or known[0]) not in known:
            raise ConfigError(f"--decoder {chosen}: on this backbone expected {' or '.join(known)}.")
        size, channels = img_size or declared["input_size"][1], in_chans or declared["input_size"][0]
        if chosen == "flexible_unet":
            net = _flexible(_maps(source, load), channels, classes)
        elif chosen == "unetr":
            net = _unetr(model, channels, classes)
        else:
            net = _flexible(Hybrid(model, channels), channels, classes)
    made = Segmenter(net, chosen)
    made.pretrained_cfg = {**declared, "input_size": [channels, size, size]}
    return made


def _maps(source: str | Path, load: Callable[..., nn.Module]) -> Maps:
    try:
        return Maps(load(features_only=True))
    except ValueError as error:
        raise ConfigError(f"backbone '{source}': cannot be an encoder: {error}. Take another one.") from error


def _flexible(encoder: Any, channels: int, classes: int) -> nn.Module:
    """Return MONAI's FlexibleUNet on an encoder with `channels`, by an entry in MONAI's table that goes at once."""
    FLEXUNET_BACKBONE.register_dict[_NAME] = {
        "type": lambda **_: encoder,
        "feature_number": len(encoder.channels),
        "feature_channel": encoder.channels,
        "parameter": {"spatial_dims": 2, "in_channels": channels, "pretrained": False},
    }
    try:
        made: nn.Module = FlexibleUNet(channels, classes, _NAME, norm=_NORM)
    finally:
        del FLEXUNET_BACKBONE.register_dict[_NAME]
    return made


def _unetr(vit: VisionTransformer, channels: int, classes: int) -> nn.Module:
    """Return MONAI's UNETR on a ViT.

    It doubles the grid of tokens four times: where patches are not of 16 pixels, the image that its first skip takes
    is resampled to that, and `Segmenter` takes the answer back.
    """
    size = tuple(16 * edge for edge in vit.patch_embed.grid_size)
    heads = vit.blocks[0].attn.num_heads
    made: Any = UNETR(channels, classes, size, 16, vit.embed_dim, 4 * vit.embed_dim, heads, spatial_dims=2)
    made.vit = Tokens(vit)
    if size != vit.patch_embed.img_size:
        made.encoder1 = nn.Sequential(nn.Upsample(size, mode="bilinear"), made.encoder1)
    net: nn.Module = made
    return net


def _halved(before: int, after: int) -> nn.Sequential:
    """Return two convolutions, of which the first halves the map."""
    layers: Sequence[nn.Module] = [
        nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(8, after),
        nn.ReLU(inplace=True),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.GroupNorm(8, after),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*layers)
