"""BYOL: the student predicts what a slow teacher makes of the other view (Grill et al. 2020, arXiv:2006.07733).

Both views are drawn alike, where the paper blurs and solarises one more than the other. Without batch
normalisation it largely collapses, at a small learning rate more slowly; the paper's own study has it
with weight standardisation (Richemond et al. 2020, arXiv:2010.10241). docs/methods.md has what was measured.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wardround.config.federation import Recipe
from wardround.config.method import BYOLConfig
from wardround.ssl.heads import each_view, mlp, widened
from wardround.ssl.method import Method
from wardround.ssl.teacher import Teacher, cosine_momentum
from wardround.ssl.views import view


class BYOL(Method):
    """Backbone, projector and predictor, and a teacher of the first two; the loss is one number an image."""

    head: nn.Sequential
    teacher: Teacher

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.method, BYOLConfig)
        self.settings, self.norm = recipe.method, recipe.backbone.norm
        hidden, out = self.settings.hidden_dim, self.settings.output_dim
        projector = mlp((self.backbone.dim, hidden, out), self.norm)
        predictor = mlp((out, hidden, out), self.norm)
        self.head = nn.Sequential(OrderedDict(projector=projector, predictor=predictor))
        self.teacher = Teacher(self.taught())

    def prepare(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return two views of each image: [B, C, S, S] in [0, 1] -> twice [B, C, s, s]."""
        return tuple(view(images, self.recipe, generator, self.view_size) for _ in range(2))

    def embed(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Return each view's prediction, and its target by the teacher without gradient: p1, p2, t1, t2, [B, D]."""
        return *each_view(self.predict, views, self.norm), *each_view(self.teacher, views, self.norm)

    def loss(self, p1: Tensor, p2: Tensor, t1: Tensor, t2: Tensor) -> Tensor:  # type: ignore[override]  # its own embedding
        """Return the squared distances of unit vectors, prediction to the other view's target: -> [B] in [0, 8]."""
        return distance(p1, t2) + distance(p2, t1)

    def after_step(self, step: int) -> None:
        """Let the teacher follow."""
        momentum = cosine_momentum(step, self.recipe.training.total_steps, self.settings.momentum)
        self.teacher.follow(self.taught(), momentum)

    def taught(self) -> dict[str, nn.Module]:
        """Return backbone and projector; the predictor is the student's alone."""
        return {"backbone": self.backbone, "projector": self.head[0]}

    def predict(self, views: Tensor) -> Tensor:
        """[B, C, s, s] -> [B, D]"""
        prediction: Tensor = self.head(self.backbone.features(views))
        return prediction


def distance(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the squared distance of the two as unit vectors, equation (2): twice [B, D] -> [B]."""
    return 2 - 2 * F.cosine_similarity(widened(predictions), widened(targets))
