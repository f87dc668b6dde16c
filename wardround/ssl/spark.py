"""Masked autoencoding of what has no tokens to drop.

Convolutional networks see the visible patches alone (SparK, Tian et al. 2023, arXiv:2301.03580).
Hierarchical transformers and hybrids, whose windows and attention need whole maps, see a learnt value
at hidden pixels (SimMIM, Xie et al. 2022, arXiv:2111.09886). A patch is what one position of the last
map stands for, 32 pixels an edge in most networks.

Where a network has layers behind its last map, as MobileNetV3 has, what they make of the whole image is
added at every position, as a class token's content would be: they are released, so they are trained.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wardround.backbones import Token, family_of, initialise
from wardround.backbones.maps import Maps, as_map, dense_maps, sparse_maps, vector_behind
from wardround.backbones.sparse import Mask, masked_maps, masked_norm
from wardround.backbones.timm_net import TimmNet
from wardround.config.federation import Recipe
from wardround.config.method import MAEConfig
from wardround.errors import ConfigError
from wardround.ssl.mae import hidden_errors, patchify, random_order, unpatchify, visible_count
from wardround.ssl.method import Method
from wardround.ssl.views import view

NARROWEST = 16  # channels of the decoder's finest maps, at least
GROUPS = 8  # at most: fine maps are narrow, and a group of one channel would lose its contrast
EPS = 1e-5


class SparK(Method):
    """Backbone and head of masked autoencoding on maps; its loss is one number an image."""

    backbone: TimmNet
    head: "Decoder"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.method, MAEConfig)
        name, data = recipe.backbone.name, recipe.data
        self.settings = recipe.method
        self.sparse = family_of(name).masking == "sparse"
        look = sparse_maps if self.sparse else dense_maps
        self.maps = look(self.backbone.net, name, data.channels, data.image_size)
        self.patch = self.maps.strides[-1]
        for _, edge in recipe.training.resolutions:
            if edge % self.patch or edge < 2 * self.patch:
                raise ConfigError(
                    f"[training] resolutions: {edge} pixels make no grid of at least two of the {self.patch}-pixel "
                    f"patches of '{name}' an edge; take a larger multiple of {self.patch}."
                )
        self.head = Decoder(self.maps, recipe.method.decoder_dim, data.channels, sparse=self.sparse)

    def prepare(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return views and the order of their patches: [B, C, S, S] in [0, 1] -> [B, C, s, s], [B, N]."""
        views = view(images, self.recipe, generator, self.view_size, intensities=False)
        return views, random_order(len(images), self.num_patches, generator).to(images.device)

    def embed(self, views: Tensor, order: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # its own inputs
        """Return each image's mean squared error over its hidden patches: [B]."""
        hidden = order[:, self.num_visible :]
        target, prediction = patchify(views, self.patch), self.predict(views, order)
        return (hidden_errors(target, prediction, hidden, normalised=self.settings.normalised_pixels),)

    def loss(self, errors: Tensor) -> Tensor:  # type: ignore[override]  # its own embedding
        """[B] -> [B]"""
        return errors

    def predict(self, views: Tensor, order: Tensor) -> Tensor:
        """Return the prediction of every patch: [B, N, P * P * C]."""
        net, mask = self.backbone.net, self.visible(views, order)
        if self.sparse:
            maps = masked_maps(net, views, mask.visible)
            last = mask.fill(maps[-1])
        else:
            last = net.forward_features(self.head.cover(views, mask))
            maps = [as_map(last, net.num_features, self.maps.axes)]
        vector = vector_behind(net, last) if self.maps.vector else None
        return patchify(self.head(maps, vector, mask), self.patch)

    def visible(self, views: Tensor, order: Tensor) -> Mask:
        """Return the mask that leaves the first patches of an order visible."""
        flags = torch.zeros(order.shape, dtype=torch.bool, device=views.device)
        flags.scatter_(1, order[:, : self.num_visible], True)
        return Mask(flags.view(len(views), 1, *(edge // self.patch for edge in views.shape[2:])))

    @property
    def num_patches(self) -> int:
        """How many patches a view has."""
        return int((self.view_size // self.patch) ** self.maps.axes)

    @property
    def num_visible(self) -> int:
        """How many patches the backbone sees: at least one, and not all."""
        return visible_count(self.num_patches, self.settings.mask_ratio)


class Decoder(nn.Module):
    """The head: from the coarsest map to the finest, each joined by the backbone's map of that size.

    Of a sparse backbone's maps, a learnt vector fills the holes (the paper's densifying). The finest map
    predicts the pixels of its positions.
    """

    def __init__(self, maps: Maps, dim: int, channels: int, *, sparse: bool) -> None:
        super().__init__()
        conv = nn.Conv2d if maps.axes == 2 else nn.Conv3d
        widths = [max(dim >> level, NARROWEST) for level in range(len(maps.widths))]  # coarse to fine
        self.channels, self.finest = channels, maps.strides[0]
        self.cover_pixel = None if sparse else Token(channels)
        self.holes = nn.ModuleList(Token(width) for width in widths if sparse)
        self.project = nn.ModuleList(conv(*pair, 1) for pair in zip(reversed(maps.widths), widths, strict=True))
        self.vector = nn.Linear(maps.vector, widths[0]) if maps.vector else None
        self.blocks = nn.ModuleList(_block(conv, *pair) for pair in pairwise([*widths, widths[-1]]))
        self.pixels = conv(widths[-1], self.finest**maps.axes * channels, 1)
        initialise(self)

    def cover(self, views: Tensor, mask: Mask) -> Tensor:
        """Return views with a learnt value at their hidden pixels, one a channel."""
        assert self.cover_pixel is not None
        return torch.where(mask.of(views).bool(), views, _everywhere(self.cover_pixel, views))

    def forward(self, maps: Sequence[Tensor], vector: Tensor | None, mask: Mask) -> Tensor:
        """Return the predicted image, [B, C, S, S], from maps fine to coarse, [B, C', s, s] each."""
        x = None
        for level, features in enumerate(reversed(maps)):
            y = self._join(level, features, mask)
            if x is not None:
                y = y + F.interpolate(x, size=y.shape[2:], mode="nearest")
            elif self.vector is not None:
                y = y + self.vector(vector).view(*y.shape[:2], *[1] * (y.ndim - 2))
            x = self.blocks[level](y)
        return unpatchify(self.pixels(x).flatten(2).transpose(1, 2), self.finest, self.channels)

    def _join(self, level: int, features: Tensor, mask: Mask) -> Tensor:
        """Return a backbone's map at the decoder's width, at one scale whatever the family, its holes filled."""
        visible = mask.of(features) if self.holes else torch.ones_like(features[:, :1])
        normed, _, _ = masked_norm(features, visible, math.gcd(GROUPS, features.shape[1]), EPS)
        y: Tensor = self.project[level](normed)
        return torch.where(visible.bool(), y, _everywhere(self.holes[level], y)) if self.holes else y


def _block(conv: type[nn.Conv2d] | type[nn.Conv3d], before: int, after: int) -> nn.Sequential:
    """Return two convolutions over neighbours, without biases, which the norms would take out again."""
    return nn.Sequential(
        conv(before, before, 3, padding=1, bias=False),
        nn.GroupNorm(math.gcd(GROUPS, before), before),
        nn.ReLU(),
        conv(before, after, 3, padding=1, bias=False),
        nn.GroupNorm(math.gcd(GROUPS, after), after),
        nn.ReLU(),
    )


def _everywhere(token: nn.Module, x: Tensor) -> Tensor:
    """Return a token's vector in the shape of a map's channels: [B, D, 1, 1]."""
    nothing = x.new_zeros(len(x), *[1] * (x.ndim - 2), x.shape[1])  # an image each, for per-sample gradients
    vector: Tensor = token(nothing)
    return vector.movedim(-1, 1).to(x.dtype)
