"""Training a smaller network until its features are another's, on images without labels.

Both see the same views (Beyer et al. 2022, arXiv:2106.05237). A smaller network's features go through a linear
projection that is thrown away (Romero et al. 2015, arXiv:1412.6550). The loss is over standardised features: it is the
share of their variance that is not yet told, 1 for the mean alone and 0 for the very features.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from tqdm import tqdm

from wardround.backbones import fast_layers
from wardround.config.federation import DataConfig, Recipe
from wardround.downstream.finetune import rows_of_step, share_of_rate
from wardround.errors import CheckpointError
from wardround.probe.features import features
from wardround.ssl.draws import generator
from wardround.ssl.views import view

CROP = (0.5, 1.0)  # share of the area that a view keeps
FLOOR = 1e-2  # of the mean variance, added to each feature's: one that hardly varies is not blown up
MOST = 4096  # images that means and deviations are taken over


@dataclass(frozen=True)
class Distillation:
    """How long and how fast a network is trained."""

    steps: int
    learning_rate: float  # AdamW's, after a tenth of the steps of warm-up; then a cosine to zero
    batch_size: int = 64
    weight_decay: float = 0.05


class Standard(nn.Module):
    """Features less their mean over images, over their deviation: [B, D] -> [B, D]."""

    mean: Tensor
    scale: Tensor

    def __init__(self, found: NDArray[np.float32]) -> None:
        super().__init__()
        values = torch.from_numpy(found).double()
        variance = values.var(0, correction=0)
        self.register_buffer("mean", values.mean(0).float())
        self.register_buffer("scale", (variance + FLOOR * variance.mean() + 1e-12).sqrt().float())

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, D]"""
        return (x - self.mean) / self.scale


class Projection(nn.Module):
    """A linear layer from one network's features to another's as `told` knows them: [B, d] -> [B, D]."""

    def __init__(self, width: int, told: Standard) -> None:
        super().__init__()
        self.told = told
        self.linear = nn.Linear(width, len(told.mean))

    def forward(self, x: Tensor) -> Tensor:
        """[B, d] -> [B, D]"""
        out: Tensor = self.linear(x) * self.told.scale + self.told.mean
        return out


def standard(model: nn.Module, images: NDArray[np.uint8], data: DataConfig, device: str = "cpu") -> Standard:
    """Return what standardises a network's features by those of images [N, C, S, S]."""
    return Standard(features(model, images[:MOST], data.mean, data.std, device=device)).to(device)


def distil(
    original: nn.Module,
    smaller: nn.Module,
    told: Standard,
    images: NDArray[np.uint8],
    recipe: Recipe,
    how: Distillation,
    seed: int,
    device: str = "cpu",
) -> list[float]:
    """Train a network in place until its features are the original's, and return the loss of each step.

    images: [N, C, S, S]; both networks give [B, D], which `told` standardises. Views are crops with the flips and
    rotations that the recipe declares. Both stay in evaluation mode: nothing is dropped, and statistics of batch
    normalisation stay. On a CPU a function of its arguments, bit for bit. Raises CheckpointError where the loss is
    not finite.
    """
    original.to(device).eval().requires_grad_(False)
    smaller.to(device).eval().requires_grad_(True)
    told.to(device)
    optimiser = torch.optim.AdamW(param_groups_weight_decay(smaller, how.weight_decay), lr=how.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(share_of_rate, steps=how.steps))
    losses = []
    for step in tqdm(range(how.steps), "distillation", unit="step", disable=None, delay=2, leave=False):
        rows = rows_of_step(len(images), how.batch_size, step, seed).numpy()
        batch = torch.from_numpy(images[rows]).to(device).float() / 255.0
        draw, size = generator(seed, step, "view"), recipe.data.image_size
        views = view(batch, recipe, draw, size, intensities=False, crop_scale=CROP)
        with fast_layers(views.device):
            with torch.no_grad():
                target = told(original(views))
            loss = (told(smaller(views)) - target).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(smaller.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            raise CheckpointError(f"distillation: the loss is {losses[-1]} at step {step + 1}; take fewer --steps.")
    return losses
