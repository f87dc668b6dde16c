"""Training a backbone on with labels: a new classifier, and all, some or a few new weights below it.

The ways: `frozen` leaves the first half of the stages as they are, `full` trains all, `decay` trains
all at rates that fall towards the input, `lora` trains low-rank additions to fixed weights.
Whatever is chosen (the step whose weights are kept) is chosen on the validation images.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from wardround.backbones import fast_layers
from wardround.data import LabelledImages
from wardround.downstream.arms import Network
from wardround.downstream.lora import add_lora
from wardround.errors import CheckpointError, ConfigError
from wardround.probe.features import BATCH
from wardround.probe.scores import score
from wardround.ssl.draws import generator
from wardround.ssl.views import view

WAYS = ("frozen", "full", "decay", "lora")
CROP = (0.7, 1.0)  # share of the area that a view keeps: mild, so that a finding stays inside
PASSES = 20  # of MC dropout


@dataclass(frozen=True)
class Tuning:
    """How backbones are trained on; all arms alike."""

    ways: tuple[str, ...] = WAYS
    epochs: int = 20
    least_steps: int = 100  # where few labels make an epoch a few steps
    batch_size: int = 32
    learning_rate: float = 5e-4  # AdamW's, after a tenth of the steps of warm-up; then a cosine to zero
    weight_decay: float = 0.05
    layer_decay: float = 0.65  # in `decay`, of each stage against the one above it
    dropout: float = 0.2  # before the classifier
    checks: int = 10  # how often validation is asked

    def __post_init__(self) -> None:
        if unknown := [way for way in self.ways if way not in WAYS]:
            raise ConfigError(f"--finetune '{unknown[0]}': expected some of {', '.join(WAYS)}, with commas between.")


@dataclass(frozen=True)
class Labels:
    """Which images of a set are trained with, and which choose the step."""

    images: LabelledImages
    train: NDArray[np.int64]
    val: NDArray[np.int64]


class Classifier(nn.Module):
    """A backbone, and dropout and a linear layer on its features."""

    def __init__(self, backbone: nn.Module, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, classes))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, K]"""
        out: Tensor = self.head(self.backbone(images).float())
        return out


def steps_of(tuning: Tuning, count: int, batch_size: int) -> int:
    """Return how many steps so many labelled images are trained for."""
    return max(tuning.least_steps, tuning.epochs * math.ceil(count / batch_size))


def tune(
    network: Network, way: str, labels: Labels, tuning: Tuning, seed: int, advance: Callable[[int], object]
) -> Classifier:
    """Return an arm's network trained on, at the step of the best sum of both headline scores on validation.

    Views are mild crops with the flips and rotations that the recipe declares. `advance` is told of each
    step done. On a CPU a function of its arguments, bit for bit. Raises CheckpointError where the loss is
    not finite. Takes memory for AdamW's two moments and `batch_size` images' activations.
    """
    images = labels.images
    with seeded(seed, network.device):
        backbone = network.build(images.images[labels.train])
        torch.manual_seed(seed)  # building may draw or not: arms with the same seed get the same head and dropout
        model, optimiser = _start(backbone, network, way, labels, tuning)
        pixels = torch.from_numpy(images.images[labels.train]).to(network.device)
        truth = torch.from_numpy(images.labels[labels.train]).to(network.device)
        steps = steps_of(tuning, len(pixels), tuning.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(share_of_rate, steps=steps))
        marks = {round(steps * part / tuning.checks) for part in range(1, tuning.checks + 1)}
        best, kept = -1.0, model.state_dict()
        for step in range(steps):
            rows = rows_of_step(len(pixels), tuning.batch_size, step, seed).to(network.device)
            _descend(model, optimiser, _batch(pixels[rows], network, (seed, step)), truth[rows], network.autocast)
            schedule.step()
            advance(1)
            if step + 1 in marks:
                found = sum(score(images.labels[labels.val], answers(model, network, images, labels.val)[0]).headline)
                _train(model)
                if found > best:
                    best, kept = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return model.eval()


def answers(
    model: Classifier,
    network: Network,
    images: LabelledImages,
    places: NDArray[np.int64],
    seed: int = 0,
    batch_size: int = BATCH,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the probabilities of some images [N, K], and those of MC dropout (Gal and Ghahramani 2016).

    The latter are the mean over 20 draws of what the classifier's dropout leaves out; below it nothing is
    dropped, so that features are computed once and the spread is that of the last layer alone.
    """
    squash = torch.sigmoid if images.multi_label else partial(torch.softmax, dim=1)
    found = torch.from_numpy(network.of(model.backbone, images.images[places], batch_size)).to(network.device)
    with torch.inference_mode(), seeded(seed, network.device):
        sure = squash(model.head.eval()(found).double())
        model.head.train()
        passes = [squash(model.head(found).double()) for _ in range(PASSES)]
    return sure.cpu().numpy(), torch.stack(passes).mean(0).cpu().numpy()


def stages(encoder: Any) -> list[list[str]]:
    """Return the names of a network's parameters, stage by stage from the input up, as its own class groups them."""
    if hasattr(encoder, "group_matcher"):
        groups: dict[Any, list[str]] = group_parameters(encoder, encoder.group_matcher(coarse=True))
        return [groups[key] for key in sorted(groups)]
    return [[f"backbone.{name}" for name in stage] for stage in encoder.backbone.stages()]


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """Draw from this seed inside; the caller's own draws go on as if nothing was drawn."""
    with torch.random.fork_rng(devices=[] if device == "cpu" else [device]):
        torch.manual_seed(seed)
        yield


def _start(
    backbone: nn.Module, network: Network, way: str, labels: Labels, tuning: Tuning
) -> tuple[Classifier, torch.optim.Optimizer]:
    """Return the classifier as a way begins, in training, and its optimiser."""
    images = labels.images
    groups = stages(backbone)
    shares = {}
    if way == "frozen":
        kept = {name for stage in groups[: len(groups) // 2] for name in stage}
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name not in kept)
    elif way == "decay":
        shares = {
            f"backbone.{name}": tuning.layer_decay ** (len(groups) - place)
            for place, stage in enumerate(groups)
            for name in stage
        }
    elif way == "lora":
        add_lora(backbone)
    width = network.of(backbone, images.images[labels.train[:2]], 2).shape[1]
    model = Classifier(backbone, width, len(images.classes), tuning.dropout).to(network.device)
    parameters = [
        {
            "params": [parameter],
            "lr": tuning.learning_rate * shares.get(name, 1.0),
            "weight_decay": tuning.weight_decay if parameter.ndim > 1 else 0.0,  # none of biases and norms
        }
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    _train(model)
    return model, torch.optim.AdamW(parameters)


def share_of_rate(step: int, steps: int) -> float:
    """Return the share of its peak that the rate has at a step: a tenth of them warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / max(1, steps // 10)) * (1 + math.cos(math.pi * step / steps)) / 2


def rows_of_step(count: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Return the images of a step: epochs one after the other, each in an order of its own; the last rows wait."""
    size = min(batch_size, count)
    a_pass = count // size
    order = torch.randperm(count, generator=generator(seed, step // a_pass, "order"))
    return order[step % a_pass * size :][:size]


def _batch(pixels: Tensor, network: Network, seed: tuple[int, int]) -> Tensor:
    """Return one mild view an image: [B, C, S, S] of 0..255 -> [B, C, S, S], normalised."""
    draw, size = generator(*seed, "view"), pixels.shape[-1]
    return view(pixels.float() / 255.0, network.recipe, draw, size, intensities=False, crop_scale=CROP)


def _descend(model: Classifier, optimiser: torch.optim.Optimizer, batch: Tensor, truth: Tensor, autocast: bool) -> None:
    """Take one step. Raises CheckpointError where the loss is not finite."""
    with fast_layers(batch.device), torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
        logits = model(batch)
    several = truth.ndim == 2
    loss = (
        functional.binary_cross_entropy_with_logits(logits, truth.float())
        if several
        else functional.cross_entropy(logits, truth)
    )
    if not loss.isfinite():
        raise CheckpointError(f"fine-tuning: the loss is {loss.item()}; the backbone's weights are not usable.")
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()


def _train(model: Classifier) -> None:
    """Set a classifier to training, but leave the statistics of batch normalisations that are not trained."""
    model.train()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and layer.affine and not layer.weight.requires_grad:
            layer.eval()
