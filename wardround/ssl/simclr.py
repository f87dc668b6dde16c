"""SimCLR: two views of an image against all other images (Chen et al. 2020, arXiv:2002.05709).

With `negatives = "public"` the other images are procedural ones, so that an image's loss depends on
no other image of the site and a private engine can clip it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wardround.config.federation import Recipe
from wardround.config.method import SimCLRConfig
from wardround.ssl.heads import cosines, mlp, widened
from wardround.ssl.method import Method
from wardround.ssl.public import public_bank
from wardround.ssl.views import normalise, view


class SimCLR(Method):
    """Backbone and projector; the loss is one number a batch, or one an image with public negatives.

    Under batch normalisation both views share their statistics, as in the authors' code.
    """

    head: nn.Sequential
    bank: Tensor  # [bank_size, C, S, S] uint8, a constant; only with public negatives

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.method, SimCLRConfig)
        self.settings = recipe.method
        widths = (self.backbone.dim, self.settings.hidden_dim, self.settings.output_dim)
        self.head = mlp(widths, recipe.backbone.norm, out_norm=True)
        if self.settings.negatives == "public":
            images = public_bank(recipe, self.settings.bank_size, "negatives", "negatives = 'batch'")
            self.register_buffer("bank", images, persistent=False)

    def prepare(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return two views of each image, and with public negatives which of the bank the step takes.

        [B, C, S, S] in [0, 1] -> twice [B, C, s, s] (and [B, K] of indices, the same in every row: all
        images of a step meet the same negatives, and a part of the batch still knows them).
        """
        views = [view(images, self.recipe, generator, self.view_size) for _ in range(2)]
        if self.settings.negatives == "batch":
            return tuple(views)
        drawn = torch.randperm(self.settings.bank_size, generator=generator)[: self.settings.bank_draw]
        return *views, drawn.to(images.device).expand(len(images), -1)

    def embed(self, view1: Tensor, view2: Tensor, *drawn: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # its own inputs
        """Return the embeddings, twice [B, D]; with public negatives also the cosines to those, twice [B, K]."""
        z1, z2 = self.project(torch.cat([view1, view2])).chunk(2)
        if not drawn:
            return z1, z2
        negatives = self.negatives(drawn[0], view1)
        return z1, z2, cosines(z1, negatives), cosines(z2, negatives)

    def loss(self, z1: Tensor, z2: Tensor, *to_bank: Tensor) -> Tensor:  # type: ignore[override]  # its own embedding
        """Return NT-Xent of the batch, []; or with public negatives the mean over an image's views, [B]."""
        if not to_bank:
            return nt_xent(z1, z2, self.settings.temperature)
        return sum(info_nce(z1, z2, others, self.settings.temperature) for others in to_bank) / 2  # type: ignore[return-value]

    def loss_coupling(self) -> str | None:
        """Return that NT-Xent couples, unless the negatives are public."""
        if self.settings.negatives == "public":
            return None
        return "NT-Xent compares an image with the others of its batch ([method] negatives = 'public' does not)"

    def project(self, views: Tensor) -> Tensor:
        """[B, C, s, s] -> [B, D]"""
        embedding: Tensor = self.head(self.backbone.features(views))
        return embedding

    @torch.no_grad()
    def negatives(self, drawn: Tensor, like: Tensor) -> Tensor:
        """Return the embeddings of the drawn public images by the current network: [B, K] of indices -> [K, D].

        They are not augmented, and no gradient goes through them. A micro-batch encodes them anew.
        """
        images = self.bank[drawn[:1].flatten()].to(like.dtype) / 255  # a slice, so that an empty batch passes
        if images.shape[-2:] != like.shape[-2:]:
            images = F.interpolate(images, like.shape[-2:], mode="bilinear", antialias=True)
        return self.project(normalise(images, self.recipe.data))


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Return the mean over both views of all images of equation (1): twice [B, D] -> []."""
    z = torch.cat([z1, z2])
    logits = (cosines(z, z) / temperature).fill_diagonal_(-torch.inf)  # [2B, 2B]; no view is its own negative
    other_view = torch.arange(len(z), device=z.device).roll(len(z1))
    return F.cross_entropy(logits, other_view)


def info_nce(z: Tensor, other: Tensor, to_bank: Tensor, temperature: float) -> Tensor:
    """Return -log of the other view's share among itself and the bank: twice [B, D], cosines [B, K] -> [B]."""
    positive = F.cosine_similarity(widened(z), widened(other))
    logits = torch.cat([positive[:, None], to_bank], dim=1) / temperature
    return logits.logsumexp(dim=1) - logits[:, 0]
