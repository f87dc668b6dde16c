"""Training a segmentation network on some images with masks."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from wardround.backbones import fast_layers
from wardround.config import Protocol
from wardround.data import MaskedImages
from wardround.downstream.finetune import CROP, rows_of_step, seeded, share_of_rate
from wardround.downstream.monai_dice import dice, dice_loss
from wardround.downstream.monai_encoders import Segmenter, load_segmenter
from wardround.downstream.splits import Splits
from wardround.errors import CheckpointError
from wardround.ssl.draws import generator
from wardround.ssl.views import flat_maps, normalise, sampling_grid, warp


@dataclass(frozen=True)
class Training:
    """How a segmentation network is trained; both arms alike."""

    steps: int = 300
    batch_size: int = 16
    learning_rate: float = 5e-4  # AdamW's, after a tenth of the steps of warm-up; then a cosine to zero
    weight_decay: float = 0.05
    checks: int = 5  # how often validation is asked


@dataclass(frozen=True)
class Task:
    """What every network is trained and tested on."""

    recipe: Protocol  # [views] to augment by, [data] to normalise by
    images: MaskedImages
    places: Splits
    decoder: str
    training: Training
    device: str


def train(
    folder: Path, chosen: NDArray[np.int64], task: Task, seed: int, advance: Callable[[int], object], batch_size: int
) -> Segmenter:
    """Return a segmentation network on a release, trained on some images, at the step that is best on validation."""
    images, training, device = task.images, task.training, task.device
    with seeded(seed, device):
        model = load_segmenter(folder, len(images.values), decoder=task.decoder).to(device)
        groups = param_groups_weight_decay(model, training.weight_decay)
        optimiser = torch.optim.AdamW(groups, lr=training.learning_rate)
        share = partial(share_of_rate, steps=training.steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, share)
        pixels, masks = (torch.from_numpy(of[chosen]).to(device) for of in (images.images, images.masks))
        marks = {round(training.steps * part / training.checks) for part in range(1, training.checks + 1)}
        best, kept = -1.0, model.state_dict()
        for step in range(training.steps):
            rows = rows_of_step(len(chosen), batch_size, step, seed).to(device)
            batch, truth = views(pixels[rows], masks[rows], task, (seed, step))
            with fast_layers(batch.device):
                loss = dice_loss(model.train()(batch), truth)
            if not loss.isfinite():
                raise CheckpointError(
                    f"segmentation: the loss is {loss.item()}; the backbone's weights are not usable."
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            advance(1)
            if step + 1 in marks:
                places = task.places.val
                found = dice(
                    answer(model, images.images[places], task), images.masks[places], len(images.values)
                ).mean()
                if found > best:
                    best, kept = float(found), copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return model.eval()


def answer(model: nn.Module, images: NDArray[np.uint8], task: Task) -> NDArray[np.uint8]:
    """Return the most probable class of each pixel: [N, C, S, S] -> [N, S, S]."""
    model.eval()
    out = []
    with torch.inference_mode(), fast_layers(torch.device(task.device)):
        for start in range(0, len(images), 2 * task.training.batch_size):
            batch = torch.from_numpy(images[start : start + 2 * task.training.batch_size]).to(task.device)
            logits = model(normalise(batch.float() / 255.0, task.recipe.data))
            out.append(logits.argmax(1).to(torch.uint8).cpu().numpy())
    return np.concatenate(out)


def views(pixels: Tensor, masks: Tensor, task: Task, seed: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return one mild view an image, and the same of its mask: [B, C, S, S], [B, S, S] -> the same, [B, 1, S, S]."""
    size = pixels.shape[-1]
    maps = flat_maps(len(pixels), task.recipe.views, generator(*seed, "view"), CROP)
    grid = sampling_grid(maps.to(pixels.device), size)
    truth = grid_sample(masks[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)
    return normalise(warp(pixels.float() / 255.0, maps, size), task.recipe.data), truth.long()
