"""MoCo v3: each view finds its image among the teacher's views of the batch (Chen, Xie and He 2021, arXiv:2104.02057).

The paper also keeps a ViT's random patch projection as it is; [backbone] frozen_stages = 1 does that.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wardround.config.federation import Recipe
from wardround.config.method import MoCoConfig
from wardround.ssl.heads import cosines, each_view, mlp
from wardround.ssl.method import Method
from wardround.ssl.teacher import Teacher, cosine_momentum
from wardround.ssl.views import view


class MoCo(Method):
    """Backbone, projector and predictor, and a teacher of the first two; the loss is one number a batch."""

    head: nn.Sequential
    teacher: Teacher

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.method, MoCoConfig)
        self.settings, self.norm = recipe.method, recipe.backbone.norm
        hidden, out = self.settings.hidden_dim, self.settings.output_dim
        projector = mlp((self.backbone.dim, hidden, hidden, out), self.norm, out_norm=True)
        predictor = mlp((out, hidden, out), self.norm, out_norm=True)
        self.head = nn.Sequential(OrderedDict(projector=projector, predictor=predictor))
        self.teacher = Teacher(self.taught())

    def prepare(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return two views of each image: [B, C, S, S] in [0, 1] -> twice [B, C, s, s]."""
        return tuple(view(images, self.recipe, generator, self.view_size) for _ in range(2))

    def embed(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Return each view's query by the student, and its key by the teacher without gradient: q1, q2, k1, k2."""
        return *each_view(self.predict, views, self.norm), *each_view(self.teacher, views, self.norm)

    def loss(self, q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor) -> Tensor:  # type: ignore[override]  # its own embedding
        """Return the contrast of each view's queries with the other view's keys: four times [B, D] -> []."""
        return contrast(q1, k2, self.settings.temperature) + contrast(q2, k1, self.settings.temperature)

    def loss_coupling(self) -> str | None:
        """Return that it couples, whatever the settings."""
        return "MoCo's negatives are the other images of the batch"

    def after_step(self, step: int) -> None:
        """Let the teacher follow."""
        momentum = cosine_momentum(step, self.recipe.training.total_steps, self.settings.momentum)
        self.teacher.follow(self.taught(), momentum)

    def taught(self) -> dict[str, nn.Module]:
        """Return backbone and projector; the predictor is the student's alone."""
        return {"backbone": self.backbone, "projector": self.head[0]}

    def predict(self, views: Tensor) -> Tensor:
        """[B, C, s, s] -> [B, D]"""
        query: Tensor = self.head(self.backbone.features(views))
        return query


def contrast(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Return InfoNCE of queries whose key is in the same row, times 2 temperature (Algorithm 1): twice [B, D] -> []."""
    logits = cosines(queries, keys) / temperature  # [B, B]
    return 2 * temperature * F.cross_entropy(logits, torch.arange(len(keys), device=keys.device))
