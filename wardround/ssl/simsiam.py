"""SimSiam: one view predicts the other, whose gradient is stopped (Chen and He 2021, arXiv:2011.10566).

The paper keeps the predictor's learning rate constant; here it follows the schedule as all others do.

Without batch normalisation it collapses, at any rate tried (docs/methods.md has what was measured).
A LayerNorm after the projector, no norm at all, a predictor ten times as fast, and heads whose start is whitened on
public images did not stop it. Its loss decomposes, but `simclr` with public negatives is the one to take for that.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wardround.config.federation import Recipe
from wardround.config.method import SimSiamConfig
from wardround.ssl.heads import each_view, mlp, widened
from wardround.ssl.method import Method
from wardround.ssl.views import view


class SimSiam(Method):
    """Backbone, projector and predictor; the loss is one number an image."""

    head: nn.Sequential

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.method, SimSiamConfig)
        settings, self.norm = recipe.method, recipe.backbone.norm
        out = settings.output_dim
        projector = mlp((self.backbone.dim, out, out, out), self.norm, out_norm=True)
        predictor = mlp((out, settings.hidden_dim, out), self.norm)
        self.head = nn.Sequential(OrderedDict(projector=projector, predictor=predictor))

    def prepare(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return two views of each image: [B, C, S, S] in [0, 1] -> twice [B, C, s, s]."""
        return tuple(view(images, self.recipe, generator, self.view_size) for _ in range(2))

    def embed(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Return each view's prediction, and its projection without gradient: p1, p2, z1, z2, each [B, D]."""
        z = each_view(self.project, views, self.norm)
        return *each_view(self.head[1], z, self.norm), *(projection.detach() for projection in z)

    def loss(self, p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:  # type: ignore[override]  # its own embedding
        """Return minus the mean cosine of a prediction and the other view's projection: -> [B] in [-1, 1]."""
        return -(F.cosine_similarity(widened(p1), widened(z2)) + F.cosine_similarity(widened(p2), widened(z1))) / 2

    def project(self, views: Tensor) -> Tensor:
        """[B, C, s, s] -> [B, D]"""
        projection: Tensor = self.head[0](self.backbone.features(views))
        return projection
