"""MAE: masked autoencoders (He et al. 2022, arXiv:2111.06377) on ViT backbones.

The encoder sees only the visible patches; a small decoder predicts the hidden ones. Masks are drawn
outside and passed in, and each parameter stands in a layer with a per-sample gradient rule, so that
a private engine can take the same module.
"""

import torch
from torch import Tensor, nn

from wardround.backbones import Token, ViT, initialise, resampled, sincos_positions, transformer
from wardround.config.federation import Recipe
from wardround.config.method import MAEConfig
from wardround.errors import ConfigError
from wardround.ssl.method import Method
from wardround.ssl.views import view


class MAE(Method):
    """Backbone and head of masked autoencoding; its loss is one number an image."""

    backbone: ViT
    head: "Decoder"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.method, MAEConfig)
        self.settings = recipe.method
        for edge in (recipe.data.image_size, *(edge for _, edge in recipe.training.resolutions)):
            if edge < 2 * self.backbone.patch:
                raise ConfigError(
                    f"[backbone] patch_size = {self.backbone.patch}: of views of {edge} pixels that is one patch, "
                    "which cannot be hidden and seen. Take a smaller patch_size, or larger views."
                )
        self.head = Decoder(self.backbone, recipe.method, recipe.data.channels)

    def prepare(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return views and the order of their patches: [B, C, *size] in [0, 1] -> [B, C, *size], [B, N]."""
        views = view(images, self.recipe, generator, self.view_size, intensities=False)
        return views, random_order(len(images), self.num_patches, generator).to(images.device)

    def embed(self, views: Tensor, order: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # its own inputs
        """Return each image's mean squared error over its hidden patches: [B]."""
        return (self.errors(patchify(views, self.backbone.patch), self.predict(views, order), order),)

    def loss(self, errors: Tensor) -> Tensor:  # type: ignore[override]  # its own embedding
        """[B] -> [B]"""
        return errors

    def predict(self, views: Tensor, order: Tensor) -> Tensor:
        """Return the prediction of every patch: [B, N, P * P * C]."""
        tokens = take(self.backbone.embed(views), order[:, : self.num_visible])
        prediction: Tensor = self.head(self.backbone.encode(tokens), order, self.grid(views))
        return prediction

    def grid(self, views: Tensor) -> tuple[int, ...]:
        """Return how many patches a view has along each axis."""
        return tuple(edge // self.backbone.patch for edge in views.shape[2:])

    def errors(self, target: Tensor, prediction: Tensor, order: Tensor) -> Tensor:
        """Return the error of each image, in float32 whatever the precision of the network."""
        hidden = order[:, self.num_visible :]
        return hidden_errors(target, prediction, hidden, normalised=self.settings.normalised_pixels)

    @property
    def num_patches(self) -> int:
        """How many patches a view has."""
        return int((self.view_size // self.backbone.patch) ** len(self.backbone.grid))

    @property
    def num_visible(self) -> int:
        """How many patches the encoder sees: at least one, and not all."""
        return visible_count(self.num_patches, self.settings.mask_ratio)


class Decoder(nn.Module):
    """The head: it places the encoded patches and a mask token on the grid, and predicts pixels."""

    positions: Tensor  # [N, D'], a constant

    def __init__(self, backbone: ViT, method: MAEConfig, channels: int) -> None:
        super().__init__()
        dim = method.decoder_dim
        self.grid = backbone.grid
        self.embed = nn.Linear(backbone.dim, dim)
        self.mask_token = Token(dim)
        self.blocks = transformer(dim, method.decoder_heads, method.decoder_depth)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pixels = nn.Linear(dim, backbone.patch ** len(backbone.grid) * channels)
        self.register_buffer("positions", sincos_positions(dim, backbone.grid), persistent=False)
        initialise(self)

    def forward(self, encoded: Tensor, order: Tensor, grid: tuple[int, ...]) -> Tensor:
        """[B, 1 + V, D] of class token and visible patches, and their order [B, N] -> [B, N, P * P * C]."""
        x = self.embed(encoded)
        hidden = x.new_zeros(x.shape[0], order.shape[1] + 1 - x.shape[1], x.shape[2])
        patches = torch.cat([x[:, 1:], self.mask_token(hidden)], dim=1)
        patches = take(patches, order.argsort(dim=1)) + resampled(self.positions, self.grid, grid)
        x = torch.cat([x[:, :1], patches], dim=1)
        for block in self.blocks:
            x = block(x)
        prediction: Tensor = self.pixels(self.norm(x[:, 1:]))
        return prediction


def visible_count(patches: int, mask_ratio: float) -> int:
    """Return how many patches of an image are seen: at least one, and not all."""
    return min(max(int(patches * (1 - mask_ratio)), 1), patches - 1)


def hidden_errors(target: Tensor, prediction: Tensor, hidden: Tensor, *, normalised: bool) -> Tensor:
    """Return each image's mean squared error over its hidden patches, in float32: [B, N, D], [B, K] -> [B].

    `normalised` compares with each patch minus its mean over its standard deviation.
    """
    target, prediction = take(target, hidden), take(prediction, hidden).float()
    if normalised:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return (prediction - target).square().mean(dim=(1, 2))


def random_order(batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Return a random order of the patches of each image, visible ones first: [B, N] of indices."""
    return torch.rand(batch, tokens, generator=generator).argsort(dim=1)


def take(x: Tensor, indices: Tensor) -> Tensor:
    """Return the tokens at some positions, image by image: [B, N, D], [B, K] -> [B, K, D]."""
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def patchify(images: Tensor, patch: int) -> Tensor:
    """Return an image's patches row by row, each as pixels with channels last: [B, N, P * P * C].

    A volume's, slice by slice: [B, C, S, S, S] -> [B, N, P * P * P * C].
    """
    batch, channels, *size = images.shape
    x = images.reshape(batch, channels, *(n for edge in size for n in (edge // patch, patch)))
    places, inside = range(2, x.ndim, 2), range(3, x.ndim, 2)
    return x.permute(0, *places, *inside, 1).reshape(batch, -1, patch ** len(size) * channels)


def unpatchify(patches: Tensor, patch: int, channels: int) -> Tensor:
    """Return the image or volume that `patchify` took apart: a square [B, C, S, S] or a cube [B, C, S, S, S]."""
    axes = 2 if patches.shape[2] == patch**2 * channels else 3
    side = round(patches.shape[1] ** (1 / axes))
    x = patches.reshape(-1, *[side] * axes, *[patch] * axes, channels)
    pairs = (place for axis in range(1, axes + 1) for place in (axis, axis + axes))
    return x.permute(0, x.ndim - 1, *pairs).reshape(-1, channels, *[side * patch] * axes)
