"""I-JEPA: predicting features of hidden blocks (Assran et al. 2023, arXiv:2301.08243) on transformers.

The encoder sees a context block; from it a narrow predictor tells what the teacher, which sees the
whole image, makes of each target block. No view is compared with another, so that crops suffice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wardround.backbones import Token, ViT, initialise, resampled, sincos_positions, transformer
from wardround.config.federation import Recipe
from wardround.config.method import IJEPAConfig
from wardround.errors import ConfigError
from wardround.ssl.blocks import Grid, block_shapes, draw_blocks
from wardround.ssl.mae import take
from wardround.ssl.method import Method
from wardround.ssl.teacher import Teacher
from wardround.ssl.views import view


class IJEPA(Method):
    """Backbone and predictor; the loss is one number an image. The teacher is a slow copy of the backbone."""

    backbone: ViT
    head: "Predictor"
    teacher: Teacher

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.method, IJEPAConfig)
        self.settings = recipe.method
        if not isinstance(self.backbone, ViT):
            raise ConfigError(
                f"[backbone] name = '{recipe.backbone.name}': predicting features of hidden blocks needs an encoder "
                "that takes any subset of patches. Take a ViT, or another method."
            )
        block_shapes(self.backbone.grid, self.settings)
        self.head = Predictor(self.backbone, recipe.method)
        self.teacher = Teacher(self.taught())

    def prepare(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return views, context and targets: [B, C, S, S] in [0, 1] -> [B, C, S', S'], [B, Nc], [B, T, Nt]."""
        views = view(images, self.recipe, generator, self.view_size, intensities=False)
        declared = self.recipe.training.batch_size
        context, targets = draw_blocks(len(images), declared, self.grid(views), self.settings, generator)
        return views, context.to(images.device), targets.to(images.device)

    def embed(self, views: Tensor, context: Tensor, targets: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # its own inputs
        """Return each image's error over its targets: [B]."""
        return (self.errors(self.predict(views, context, targets), self.target_features(views, targets)),)

    def loss(self, errors: Tensor) -> Tensor:  # type: ignore[override]  # its own embedding
        """[B] -> [B]"""
        return errors

    def predict(self, views: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Return what the student expects in the targets, from the context alone: [B, T, Nt, D]."""
        tokens = take(self.backbone.embed(views), context)
        # The paper's encoder has no class token; ours attends to it, and the predictor does not see it.
        prediction: Tensor = self.head(self.backbone.encode(tokens)[:, 1:], context, targets, self.grid(views))
        return prediction

    @torch.no_grad()
    def target_features(self, views: Tensor, targets: Tensor) -> Tensor:
        """Return the teacher's features of the targets, each of mean 0 and variance 1: [B, T, Nt, D], float32.

        They come from the whole image; the normalisation is the published code's.
        """
        teacher: ViT = self.teacher.parts["backbone"]  # type: ignore[assignment]  # a copy of the backbone
        features = teacher.encode(teacher.embed(views))[:, 1:].float()
        features = F.layer_norm(features, features.shape[-1:])
        return take(features, targets.flatten(1)).reshape(*targets.shape, -1)

    def errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean smooth L1 distance over an image's targets, patches and channels, in float32: -> [B].

        Section 3 has the squared L2 distance; the published code has this, which outliers pull less.
        """
        return F.smooth_l1_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3))

    def after_step(self, step: int) -> None:
        """Move the teacher, at a momentum that rises linearly to 1 over the federation's steps."""
        start = self.settings.momentum
        self.teacher.follow(self.taught(), start + (1.0 - start) * step / self.recipe.training.total_steps)

    def taught(self) -> dict[str, nn.Module]:
        """Return the backbone."""
        return {"backbone": self.backbone}

    def grid(self, views: Tensor) -> Grid:
        """Return how many patches a view has along each axis."""
        return tuple(edge // self.backbone.patch for edge in views.shape[2:])


class Predictor(nn.Module):
    """The head: a narrow transformer over the context and a mask token at each place of one target block."""

    positions: Tensor  # [N, D'], a constant

    def __init__(self, backbone: ViT, method: IJEPAConfig) -> None:
        super().__init__()
        dim = method.predictor_dim
        self.grid: Grid = backbone.grid
        self.embed = nn.Linear(backbone.dim, dim)
        self.mask_token = Token(dim)
        self.blocks = transformer(dim, method.predictor_heads, method.predictor_depth)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.features = nn.Linear(dim, backbone.dim)
        self.register_buffer("positions", sincos_positions(dim, backbone.grid), persistent=False)
        initialise(self)

    def forward(self, encoded: Tensor, context: Tensor, targets: Tensor, grid: Grid) -> Tensor:
        """[B, Nc, D] of encoded patches, their places [B, Nc] and the targets' [B, T, Nt] -> [B, T, Nt, D].

        Each target is predicted by itself: T rows an image, target after target.
        """
        batch, blocks, patches = targets.shape
        positions = resampled(self.positions, self.grid, grid).expand(blocks * batch, -1, -1)
        seen = self.embed(encoded) + take(positions[:batch], context)
        places = take(positions, targets.transpose(0, 1).reshape(blocks * batch, patches))
        x = torch.cat([seen.repeat(blocks, 1, 1), self.mask_token(places)], dim=1)
        for block in self.blocks:
            x = block(x)
        prediction: Tensor = self.features(self.norm(x[:, -patches:]))
        return prediction.reshape(blocks, batch, patches, -1).transpose(0, 1)
