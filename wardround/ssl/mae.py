"""MAE: masked autoencoders (He et al. 2022, arXiv:2111.06377) on ViT backbones.

The encoder sees only the visible patches; a small decoder predicts the hidden ones. Masks are drawn
outside and passed in, and each parameter stands in a layer with a per-sample gradient rule, so that
a private engine can take the same module.
"""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from wardround.backbones import Token, ViT, initialise, sincos_positions
from wardround.config.federation import Recipe
from wardround.config.method import MAEConfig
from wardround.ssl.method import Method
from wardround.ssl.views import augment, normalise


class MAE(Method):
    """Backbone and head of masked autoencoding; its loss is one number an image."""

    backbone: ViT
    head: "Decoder"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.method, MAEConfig)
        self.settings = recipe.method
        self.head = Decoder(self.backbone, recipe.method, recipe.data.channels)

    def prepare(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return views and the order of their patches: [B, C, S, S] in [0, 1] -> [B, C, S, S], [B, N]."""
        views = normalise(augment(images, self.recipe.views, generator), self.recipe.data)
        return views, random_order(len(images), self.head.tokens, generator).to(images.device)

    def embed(self, views: Tensor, order: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # its own inputs
        """Return each image's mean squared error over its hidden patches: [B]."""
        return (self.errors(patchify(views, self.backbone.patch), self.predict(views, order), order),)

    def loss(self, errors: Tensor) -> Tensor:  # type: ignore[override]  # its own embedding
        """[B] -> [B]"""
        return errors

    def predict(self, views: Tensor, order: Tensor) -> Tensor:
        """Return the prediction of every patch: [B, N, P * P * C]."""
        tokens = take(self.backbone.embed(views), order[:, : self.num_visible])
        prediction: Tensor = self.head(self.backbone.encode(tokens), order)
        return prediction

    def errors(self, target: Tensor, prediction: Tensor, order: Tensor) -> Tensor:
        """Return the error of each image, in float32 whatever the precision of the network."""
        hidden = order[:, self.num_visible :]
        target, prediction = take(target, hidden), take(prediction, hidden).float()
        if self.settings.normalised_pixels:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return (prediction - target).square().mean(dim=(1, 2))

    @property
    def num_visible(self) -> int:
        """How many patches the encoder sees: at least one, and not all."""
        visible = int(self.head.tokens * (1 - self.settings.mask_ratio))
        return min(max(visible, 1), self.head.tokens - 1)


class Decoder(nn.Module):
    """The head: it places the encoded patches and a mask token on the grid, and predicts pixels."""

    positions: Tensor  # [N, D'], a constant

    def __init__(self, backbone: ViT, method: MAEConfig, channels: int) -> None:
        super().__init__()
        dim, norm = method.decoder_dim, nn.LayerNorm
        self.tokens = backbone.grid[0] * backbone.grid[1]
        self.embed = nn.Linear(backbone.dim, dim)
        self.mask_token = Token(dim)
        self.blocks = nn.ModuleList(
            Block(dim, method.decoder_heads, qkv_bias=True, norm_layer=norm) for _ in range(method.decoder_depth)
        )
        self.norm = norm(dim)
        self.pixels = nn.Linear(dim, backbone.patch**2 * channels)
        self.register_buffer("positions", sincos_positions(dim, backbone.grid), persistent=False)
        initialise(self)

    def forward(self, encoded: Tensor, order: Tensor) -> Tensor:
        """[B, 1 + V, D] of class token and visible patches, and their order [B, N] -> [B, N, P * P * C]."""
        x = self.embed(encoded)
        hidden = x.new_zeros(x.shape[0], self.tokens + 1 - x.shape[1], x.shape[2])
        patches = torch.cat([x[:, 1:], self.mask_token(hidden)], dim=1)
        patches = take(patches, order.argsort(dim=1)) + self.positions
        x = torch.cat([x[:, :1], patches], dim=1)
        for block in self.blocks:
            x = block(x)
        prediction: Tensor = self.pixels(self.norm(x[:, 1:]))
        return prediction


def random_order(batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Return a random order of the patches of each image, visible ones first: [B, N] of indices."""
    return torch.rand(batch, tokens, generator=generator).argsort(dim=1)


def take(x: Tensor, indices: Tensor) -> Tensor:
    """Return the tokens at some positions, image by image: [B, N, D], [B, K] -> [B, K, D]."""
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def patchify(images: Tensor, patch: int) -> Tensor:
    """Return an image's patches row by row, each as pixels with channels last: [B, N, P * P * C]."""
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches: Tensor, patch: int, channels: int) -> Tensor:
    """Return the image that `patchify` took apart: [B, N, P * P * C] -> [B, C, S, S]."""
    side = round(patches.shape[1] ** 0.5)
    x = patches.reshape(-1, side, side, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * patch, side * patch)
