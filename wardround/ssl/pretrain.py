"""The one training loop, for sites and for every baseline.

The loop asks an *engine* for batches and gradients. `Plain` draws images in epochs and clips the
joint gradient; a private engine samples, clips and adds noise by its own rules, behind the same two calls.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from lightly.utils.scheduler import cosine_warmup_schedule
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from wardround.config.federation import Recipe, TrainingConfig
from wardround.errors import UpdateError
from wardround.ssl.draws import generator
from wardround.ssl.method import Method
from wardround.update import State


class Engine(Protocol):
    """What draws batches and fills gradients; sampling and clipping are its own business."""

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Return the inputs of a step, which is counted over the whole federation."""

    def gradients(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Fill `.grad` of every parameter and return the mean loss, [], detached."""


@dataclass(frozen=True)
class Trained:
    """What a stretch of training leaves beside the module's new weights."""

    losses: list[float]  # one a step
    moments: State  # AdamW's, by parameter name; part of the site memory


class Plain:
    """Training without differential privacy: epochs without replacement, one joint gradient."""

    def __init__(self, method: Method, images: NDArray[np.uint8], recipe: Recipe, site: str) -> None:
        self.method, self.images, self.recipe, self.site = method, images, recipe, site
        self.device = next(method.parameters()).device
        self._epoch = (-1, np.empty(0, np.int64))

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Return views of the images whose turn it is, and whatever else the method draws."""
        rows = self.images[self.rows(step)]
        images = torch.from_numpy(rows).to(self.device).float() / 255.0
        return self.method.prepare(images, generator(self.recipe.seed, self.site, step, "views"))

    def rows(self, step: int) -> NDArray[np.int64]:
        """Return which images a step takes: every image once an epoch, epochs back to back."""
        size, count = self.recipe.training.batch_size, len(self.images)
        places = np.arange(step * size, (step + 1) * size)
        return np.array([self._order(place // count)[place % count] for place in places.tolist()])

    def gradients(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Back-propagate the mean loss and clip the joint gradient."""
        training = self.recipe.training
        with torch.autocast(self.device.type, torch.bfloat16, enabled=training.precision == "bfloat16"):
            loss: Tensor = self.method(*batch).mean()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own signature lacks types
        if training.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.method.parameters(), training.clip_norm)
        return loss.detach()

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of an epoch, a function of (seed, site, epoch) alone."""
        if self._epoch[0] != epoch:
            draw = torch.randperm(len(self.images), generator=generator(self.recipe.seed, self.site, epoch, "order"))
            self._epoch = (epoch, draw.numpy())
        return self._epoch[1]


def pretrain(
    method: Method, engine: Engine, training: TrainingConfig, first_step: int, steps: int, moments: State, label: str
) -> Trained:
    """Train the module in place for `steps` steps and return losses and moments.

    `first_step` counts over the federation: it sets the schedule and the draws. Empty `moments`
    start anew. Raises UpdateError at the first step whose loss is not finite.
    """
    method.train()
    optimiser = adamw(method, training)
    set_moments(method, optimiser, moments)
    losses: list[Tensor] = []
    for step in tqdm(range(first_step, first_step + steps), label, unit="step", disable=None, delay=2, leave=False):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(training, step)
        optimiser.zero_grad(set_to_none=True)
        losses.append(engine.gradients(engine.batch(step)))
        optimiser.step()
        method.after_step(step)
    # Read once at the end: asking after each step would make a GPU wait for the CPU.
    values = torch.stack(losses).tolist()
    for place, value in enumerate(values):
        if not math.isfinite(value):
            raise UpdateError(
                f"{label}: the loss is {value} at local step {place + 1} of {steps}. Lower [training] learning_rate, "
                "set clip_norm, or train in float32."
            )
    return Trained(values, get_moments(method, optimiser))


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine to zero over the federation's steps."""
    peak = training.learning_rate
    # One step more than there is, so that the last step still trains.
    return float(cosine_warmup_schedule(step, training.total_steps + 1, peak, 0.0, training.warmup_steps, 0.0, peak))


def adamw(method: Method, training: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW without weight decay on biases, norms and tokens, as He et al. 2022 train."""
    parameters = [p for _, p in method.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, fused=True)


def get_moments(method: Method, optimiser: torch.optim.AdamW) -> State:
    """Return AdamW's state by parameter name: `exp_avg.NAME`, `exp_avg_sq.NAME` and `step.NAME`."""
    return {
        f"{kind}.{name}": tensor.detach().cpu().numpy().copy()
        for name, parameter in method.named_parameters()
        for kind, tensor in optimiser.state[parameter].items()
    }


def set_moments(method: Method, optimiser: torch.optim.AdamW, moments: State) -> None:
    """Give the optimiser what `get_moments` took; empty moments leave it new."""
    if not moments:
        return
    for name, parameter in method.named_parameters():
        optimiser.state[parameter] = {
            kind: torch.from_numpy(moments[f"{kind}.{name}"].copy()).to(parameter.device)
            for kind in ("step", "exp_avg", "exp_avg_sq")
        }
