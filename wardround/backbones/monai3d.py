"""MONAI's networks for volumes: its Vision Transformer, SwinUNETR's encoder and its 3D ResNets."""

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from einops.layers.torch import Rearrange
from monai.networks.blocks.transformerblock import TransformerBlock
from monai.networks.nets.resnet import ResNet
from monai.networks.nets.swin_unetr import SwinTransformer, WindowAttention
from torch import Tensor, nn

from wardround.backbones.backbone import Backbone
from wardround.backbones.normalisation import group_normalise
from wardround.backbones.timm_net import TimmNet
from wardround.backbones.vit import ViT, check_patch
from wardround.config.federation import BackboneConfig, DataConfig
from wardround.errors import ConfigError

VITS = {  # width, blocks, heads: timm's sizes, at MONAI's patches
    "monai_vit_tiny": (192, 12, 3),
    "monai_vit_small": (384, 12, 6),
    "monai_vit_base": (768, 12, 12),
}
RESNETS = {  # kind of block, blocks a stage
    "monai_resnet10": ("basic", [1, 1, 1, 1]),
    "monai_resnet18": ("basic", [2, 2, 2, 2]),
    "monai_resnet50": ("bottleneck", [3, 4, 6, 3]),
}
SWINS = {"monai_swinunetr_small": 24, "monai_swinunetr": 48}  # width of the first stage: MONAI's, the paper's
_PATCH = 16  # voxels
_STRIDE = 32  # voxels an edge of a position of the last map


def build_monai(backbone: BackboneConfig, data: DataConfig) -> Backbone:
    """Return a volume's network as it is trained. Raises ConfigError for what does not fit it."""
    name = backbone.name
    if data.dimensions != 3:
        raise ConfigError(f"[backbone] name = '{name}': is a network for volumes. Set [data] dimensions = 3.")
    if name in VITS:
        return _vit(backbone, data)
    if backbone.patch_size is not None or backbone.depth is not None:
        raise ConfigError(f"[backbone] patch_size and depth are keys of ViTs; '{name}' is none. Remove them.")
    if data.image_size % _STRIDE:
        raise ConfigError(f"[data] image_size = {data.image_size}: '{name}' needs a multiple of {_STRIDE}.")
    return _resnet(backbone, data.channels) if name in RESNETS else _swin(SWINS[name], data.channels)


def _vit(backbone: BackboneConfig, data: DataConfig) -> ViT:
    width, depth, heads = VITS[backbone.name]
    patch = backbone.patch_size or _PATCH
    check_patch(patch, data)
    embed = OrderedDict(
        proj=nn.Conv3d(data.channels, width, kernel_size=patch, stride=patch),
        tokens=Rearrange("b c d h w -> b (d h w) c"),
    )
    block = partial(TransformerBlock, width, 4 * width, heads, qkv_bias=True, use_flash_attention=True)
    blocks = nn.Sequential(*(block() for _ in range(backbone.depth or depth)))
    for made in blocks:
        made.norm_cross_attn = nn.Identity()  # MONAI makes it and never calls it: no gradient would reach it
    grid = (data.image_size // patch,) * 3
    return ViT(nn.Sequential(embed), blocks, nn.LayerNorm(width), grid, patch)


class VolumeResNet(ResNet):  # type: ignore[misc]  # MONAI has no types
    """MONAI's 3D ResNet, which halves five times as the 2D ones do, with what timm's networks tell of themselves."""

    def __init__(self, block: str, layers: list[int], channels: int) -> None:
        widths = [64, 128, 256, 512]
        super().__init__(
            block, layers, widths, 3, channels, conv1_t_stride=2, bias_downsample=False, feed_forward=False
        )
        self.num_features = self.in_planes
        self.feature_info = [{"reduction": 2 << stage, "module": f"layer{stage}"} for stage in range(1, 5)]

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, C, S, S, S] -> [B, D, S / 32, S / 32, S / 32]"""
        x = self.maxpool(self.act(self.bn1(self.conv1(x))))
        out: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return out

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the stages as patterns over names, as timm's networks do."""
        return {"stem": r"^conv1|^bn1", "blocks": r"^layer(\d+)"}


class VolumeSwin(SwinTransformer):  # type: ignore[misc]  # MONAI has no types
    """SwinUNETR's encoder (Hatamizadeh et al. 2022, arXiv:2201.01266), with what timm's networks tell of themselves.

    Each window's table of relative positions is a parameter outside any layer: no rule gives its
    gradient for one volume.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__(channels, width, (7, 7, 7), (2, 2, 2), (2, 2, 2, 2), (3, 6, 12, 24))
        self.num_features = 16 * width  # MONAI's own number leaves out the last merging of patches
        for module in self.modules():
            if isinstance(module, WindowAttention):  # a constant of the architecture, which need not travel
                index = module.relative_position_index
                del module.relative_position_index
                module.register_buffer("relative_position_index", index, persistent=False)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, C, S, S, S] -> [B, D, S / 32, S / 32, S / 32], normalised as SwinUNETR's decoder takes it."""
        out: Tensor = super().forward(x)[-1]
        return out

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, S, S, S] -> [B, D]"""
        return self.forward_features(x).mean((2, 3, 4))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the stages as patterns over names, as timm's networks do."""
        return {"stem": r"^patch_embed", "blocks": r"^layers(\d+)"}


def _resnet(backbone: BackboneConfig, channels: int) -> TimmNet:
    net = VolumeResNet(*RESNETS[backbone.name], channels)
    if backbone.norm == "group":
        group_normalise(net)
    return TimmNet(net, net.num_features)


def _swin(width: int, channels: int) -> TimmNet:
    with torch.device("cpu"):  # MONAI reads a number out of a tensor, which the meta device cannot
        net = VolumeSwin(width, channels)
    return TimmNet(net, net.num_features)
