"""Vision Transformers for images and volumes, taken apart so that a method can drop tokens.

Every parameter sits in a layer whose per-sample gradient has a known rule: the class token is a
leaf layer that only adds its parameter, the position table is a constant, and the norms are exactly
`nn.LayerNorm` (timm's own subclass escapes Opacus's samplers, which match on the exact type).
"""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wardround.backbones.backbone import Backbone
from wardround.config.federation import BackboneConfig, DataConfig
from wardround.errors import ConfigError
from wardround.update import State

CLASS_TOKEN = "backbone.class_token.weight"  # noqa: S105  # a tensor's name


class Token(nn.Module):
    """One learnt vector, added to whatever comes in."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        return x + self.weight


class ViT(Backbone):
    """A ViT with fixed sine-cosine positions, whose encoder takes any subset of the patch tokens."""

    positions: Tensor  # [N, D], a constant

    def __init__(
        self, patch_embed: nn.Module, blocks: nn.Sequential, norm: nn.LayerNorm, grid: tuple[int, ...], patch: int
    ) -> None:
        """patch_embed: [B, C, *size] -> [B, N, D]; grid: patches along each axis; patch: edge in pixels."""
        super().__init__()
        self.dim = norm.normalized_shape[0]
        self.grid = grid
        self.patch = patch
        self.patch_embed = patch_embed
        self.class_token = Token(self.dim)
        self.checkpointing = False
        self.blocks = blocks
        self.norm = norm
        self.register_buffer("positions", sincos_positions(self.dim, self.grid), persistent=False)
        initialise(self)

    def features(self, images: Tensor) -> Tensor:
        """Return the mean over the patch tokens: [B, C, *size] -> [B, D]."""
        return self.encode(self.embed(images))[:, 1:].mean(1)

    def stages(self) -> list[list[str]]:
        """Return the embedding, each block, and the final norm."""
        places = {"patch_embed": 0, "class_token": 0, "norm": len(self.blocks) + 1}
        stages: list[list[str]] = [[] for _ in range(len(self.blocks) + 2)]
        for name, _ in self.named_parameters():
            first, second, *_ = name.split(".")
            stages[int(second) + 1 if first == "blocks" else places[first]].append(name)
        return stages

    def checkpoint_activations(self) -> None:
        """Keep only what goes into each block for the backward pass."""
        self.checkpointing = True

    def embed(self, images: Tensor) -> Tensor:
        """Return the patch tokens with their positions: [B, C, *size] -> [B, N, D]."""
        # A convolution would leave the last rows out without a word.
        assert not any(edge % self.patch for edge in images.shape[2:]), "their edge is no multiple of the patch"
        tokens: Tensor = self.patch_embed(images)
        return tokens + resampled(self.positions, self.grid, tuple(edge // self.patch for edge in images.shape[2:]))

    def encode(self, tokens: Tensor) -> Tensor:
        """Prepend the class token and run the blocks: [B, T, D] -> [B, 1 + T, D]."""
        nothing = tokens.new_zeros(tokens.shape[0], 1, self.dim)
        x = torch.cat([self.class_token(nothing), tokens], dim=1)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        out: Tensor = self.norm(x)
        return out


def build_vit(backbone: BackboneConfig, data: DataConfig) -> ViT:
    """Return the encoder as it is trained. Raises ConfigError for what no ViT can be."""
    refusal = ConfigError(
        f"[backbone] name = '{backbone.name}': is no plain ViT with one class token and a last norm; take one of vit_*."
    )
    source = timm.create_model(
        backbone.name, **timm_arguments(backbone, data), num_classes=0, norm_layer=partial(nn.LayerNorm, eps=1e-6)
    )
    one_token = source.num_prefix_tokens == 1 and source.reg_token is None
    if not (one_token and isinstance(source.norm_pre, nn.Identity) and isinstance(source.norm, nn.LayerNorm)):
        raise refusal
    if source.embed_dim % 4:
        raise ConfigError(f"[backbone] name = '{backbone.name}': sine-cosine positions need a width divisible by 4.")
    embed = source.patch_embed
    embed.strict_img_size = False  # small crops and early rounds are smaller than the image
    embed.flatten = True  # what timm builds for images of any size gives a map
    return ViT(embed, source.blocks, source.norm, embed.grid_size, embed.patch_size[0])


def timm_arguments(backbone: BackboneConfig, data: DataConfig) -> dict[str, Any]:
    """Return what stock timm needs to build the same architecture. Raises ConfigError where sizes do not fit."""
    patch_size = backbone.patch_size or _own_patch_size(backbone.name)
    check_patch(patch_size, data)
    arguments: dict[str, Any] = {
        "img_size": data.image_size,
        "patch_size": patch_size,
        "in_chans": data.channels,
        "global_pool": "avg",  # the mean over patches probes better than a class token that MAE never trains
        "fc_norm": False,  # keeps the trained final norm before the pooling
    }
    if backbone.depth is not None:
        arguments["depth"] = backbone.depth
    return arguments


def check_patch(patch: int, data: DataConfig) -> None:
    """Raise ConfigError unless patches of an edge cover an image whole."""
    if data.image_size % patch:
        raise ConfigError(
            f"[backbone] patch_size = {patch} does not divide [data] image_size = {data.image_size}; "
            "take a multiple of it, or set patch_size to a divisor."
        )


@lru_cache  # asked at every build, and a whole network each time
def _own_patch_size(name: str) -> int:
    """Return the edge of the patches that an architecture has in timm."""
    with torch.device("meta"):
        return int(timm.create_model(name, num_classes=0).patch_embed.patch_size[0])


def timm_state(state: State, backbone: BackboneConfig, data: DataConfig) -> dict[str, Tensor]:
    """Return a state's backbone under stock timm's names: the same numbers, the head left behind."""
    size = data.image_size // (backbone.patch_size or _own_patch_size(backbone.name))
    class_token = state[CLASS_TOKEN]  # [D]
    patches = sincos_positions(class_token.shape[0], (size, size))  # [N, D]
    named = {
        name.removeprefix("backbone."): torch.from_numpy(array.copy())
        for name, array in state.items()
        if name.startswith("backbone.") and name != CLASS_TOKEN
    }
    named["cls_token"] = torch.from_numpy(class_token.copy()).reshape(1, 1, -1)
    # timm adds positions to the class token too; ours has none.
    named["pos_embed"] = torch.cat([torch.zeros(1, patches.shape[1]), patches]).unsqueeze(0)
    return named


def own_tensors(tensors: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Return stock timm's tensors under our names, the inverse of `timm_state`.

    Raises ConfigError for learnt positions, which our ViTs do not have.
    """
    own = {name: tensor for name, tensor in tensors.items() if name not in ("cls_token", "pos_embed")}
    if "cls_token" in tensors and "pos_embed" in tensors:
        class_token, *patches = tensors["pos_embed"][0]  # [1 + N, D]
        side = round(len(patches) ** 0.5)
        expected = sincos_positions(len(class_token), (side, side))
        if len(patches) != len(expected) or not torch.allclose(torch.stack(patches), expected, atol=1e-4):
            raise ConfigError(
                f"initial_weights = '{where}': its ViT has learnt positions, ours have fixed sine-cosine ones; take "
                "weights that were trained with these."
            )
        own[CLASS_TOKEN.removeprefix("backbone.")] = tensors["cls_token"].flatten() + class_token
    return own


def sincos_positions(dim: int, grid: tuple[int, ...]) -> Tensor:
    """Return the sine-cosine table of a grid of two or three axes, last axis fastest: [positions, dim], float32.

    Each axis, the last one first, takes an equal share of the channels: sin, then cos, at the
    frequencies 10000^(-k/K), k = 0, ..., K - 1 (Vaswani et al. 2017, section 3.5; in two dimensions as
    in He et al. 2022). Channels that cannot be shared evenly are zero.
    """
    count = dim // (2 * len(grid))
    frequencies = 10000.0 ** (-np.arange(count) / count)
    axes = np.meshgrid(*(np.arange(edge) for edge in grid), indexing="ij")
    angles = [np.outer(axis.ravel(), frequencies) for axis in reversed(axes)]
    table = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(np.pad(table, ((0, 0), (0, dim - table.shape[1]))).astype(np.float32))


def resampled(positions: Tensor, own: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """Return a position table for views smaller than the image: [prod(own), D] -> [prod(grid), D]."""
    if grid == own:
        return positions
    table = positions.T.reshape(1, -1, *own)
    mode = "bicubic" if len(grid) == 2 else "trilinear"
    return F.interpolate(table, grid, mode=mode).flatten(2)[0].T


def transformer(dim: int, heads: int, depth: int) -> nn.ModuleList:
    """Return blocks as a ViT has them, for heads that are transformers themselves."""
    norm = partial(nn.LayerNorm, eps=1e-6)
    return nn.ModuleList(Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))


def initialise(module: nn.Module) -> None:
    """Initialise in place as He et al. 2022 do: Xavier-uniform weights, zero biases, tokens of sd 0.02."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, Token):
            nn.init.normal_(layer.weight, std=0.02)
