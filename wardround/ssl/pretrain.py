"""The one training loop, for sites and for every baseline.

The loop asks an *engine* for batches and gradients. `engine.Plain` draws images in epochs and clips the
joint gradient; a private engine samples, clips and adds noise by its own rules, behind the same two calls.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from wardround.errors import UpdateError
from wardround.ssl.method import Method
from wardround.ssl.optimiser import get_moments, learning_rate, local_optimiser, set_moments, set_rate
from wardround.update import State

KEEP_SECONDS = 60.0  # of training that a cut may cost


class Engine(Protocol):
    """What draws batches and fills gradients; sampling and clipping are its own business."""

    micro_batch: int  # images at once

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Return what `gradients` takes for a step, which is counted over the whole federation."""

    def gradients(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Fill `.grad` of every parameter and return the mean loss, [], detached."""


@dataclass(frozen=True)
class Trained:
    """What a stretch of training leaves beside the module's new weights."""

    losses: list[float]  # one a step
    moments: State  # the optimiser's, by parameter name; at the end empty where none are kept for the next round


def pretrain(
    method: Method,
    engine: Engine,
    first_step: int,
    steps: int,
    moments: State,
    label: str,
    correct: Callable[[Method], None] | None = None,
    keep: Callable[[Trained], None] | None = None,
) -> Trained:
    """Train the module in place for `steps` steps and return losses and moments.

    `first_step` counts over the federation: it sets the schedule and the draws. Empty `moments`
    start anew. `correct` adds to the gradients that the engine has filled, after its clipping and noise: it may
    use weights and what came in, never images. `keep` is called about once a minute with what is trained so far,
    beside the module, so that it can be gone on from. Raises UpdateError at the first step whose loss is not finite.
    """
    training = method.recipe.training
    method.train()
    optimiser = local_optimiser(method, training)
    set_moments(method, optimiser, moments)
    losses: list[Tensor] = []
    kept = time.monotonic()
    for step in tqdm(range(first_step, first_step + steps), label, unit="step", disable=None, delay=2, leave=False):
        set_rate(optimiser, learning_rate(training, step))
        optimiser.zero_grad(set_to_none=True)
        losses.append(engine.gradients(engine.batch(step)))
        if correct is not None:
            correct(method)
        optimiser.step()
        method.after_step(step)
        if keep is not None and time.monotonic() - kept >= KEEP_SECONDS and len(losses) < steps:
            keep(Trained(torch.stack(losses).tolist(), get_moments(method, optimiser)))
            kept = time.monotonic()
    # Read once at the end: asking after each step would make a GPU wait for the CPU.
    values = torch.stack(losses).tolist()
    done = first_step % training.local_steps  # of this round, where it was cut and is gone on from
    for place, value in enumerate(values, start=done + 1):
        if not math.isfinite(value):
            raise UpdateError(
                f"{label}: the loss is {value} at local step {place} of {done + steps}. Lower [training] "
                "learning_rate, set clip_norm, or train in float32."
            )
    return Trained(values, get_moments(method, optimiser) if training.optimiser_state == "kept" else {})
