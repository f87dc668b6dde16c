"""VICReg: views agree, and each dimension varies over the batch by itself (Bardes et al. 2022, arXiv:2105.04906)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wardround.config.federation import Recipe
from wardround.config.method import VICRegConfig
from wardround.ssl.heads import each_view, mlp, widened
from wardround.ssl.method import Method
from wardround.ssl.views import view


class VICReg(Method):
    """Backbone and expander; the loss is one number a batch."""

    head: nn.Sequential

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.method, VICRegConfig)
        self.settings, self.norm = recipe.method, recipe.backbone.norm
        hidden, out = self.settings.hidden_dim, self.settings.output_dim
        # Without a last bias, as the authors': every term of the loss is blind to a shift.
        self.head = mlp((self.backbone.dim, hidden, hidden, out), self.norm, out_bias=False)

    def prepare(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return two views of each image: [B, C, S, S] in [0, 1] -> twice [B, C, s, s]."""
        return tuple(view(images, self.recipe, generator, self.view_size) for _ in range(2))

    def embed(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Return the embedding of each view, twice [B, D]."""
        return tuple(each_view(self.expand, views, self.norm))

    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:  # type: ignore[override]  # its own embedding
        """Return the weighted sum of the three terms, as the authors' code scales them: twice [B, D] -> [].

        Equation (6) sums the squared distance over the dimensions, which the code averages, and adds the two views'
        variance terms, of which the code takes the mean; the published weights, 25, 25 and 1, are the code's.
        """
        weights, z1, z2 = self.settings, widened(z1), widened(z2)
        with torch.autocast(z1.device.type, enabled=False):  # covariances are a product, which it would round
            return (
                weights.invariance * F.mse_loss(z1, z2)
                + weights.variance * (collapse(z1) + collapse(z2)) / 2
                + weights.covariance * (redundancy(z1) + redundancy(z2))
            )

    def loss_coupling(self) -> str | None:
        """Return that it couples, whatever the settings."""
        return "VICReg's variance and covariance are taken over the images of the batch"

    def expand(self, views: Tensor) -> Tensor:
        """[B, C, s, s] -> [B, D]"""
        embedding: Tensor = self.head(self.backbone.features(views))
        return embedding


def collapse(z: Tensor) -> Tensor:
    """Return how far the dimensions' standard deviations stay below 1, equations (1) and (2): [B, D] -> []."""
    return F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean()


def redundancy(z: Tensor) -> Tensor:
    """Return the squared covariances between dimensions, summed, over D, equations (3) and (4): [B, D] -> []."""
    centred = z - z.mean(dim=0)
    covariance = (centred.T @ centred / (len(z) - 1)).fill_diagonal_(0)  # [D, D]
    return covariance.square().sum() / z.shape[1]
