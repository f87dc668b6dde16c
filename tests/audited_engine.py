"""A private engine as an auditor meets it: what it releases for a batch with and without one patient."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from private_methods import VIT
from scipy import stats
from torch import Tensor, nn

from wardround import ssl
from wardround.config import FederationConfig
from wardround.privacy.accounting import Mechanism
from wardround.privacy.engine import Private
from wardround.ssl.devices import Machine, open_fabric

NONE = 1e-90  # noise
CHANCE = 1e-7  # of each side
SIGMA = 1.0
SMALL_VIT = {**VIT, "depth": 1}
RESNET = "resnet18"


class Small(nn.Module):
    """A method of 4,400 numbers: a step of it takes a few milliseconds, and everything around it is real."""

    view_size = 16
    coupling = None

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encode, self.norm, self.decode = nn.Linear(256, 8), nn.LayerNorm(8), nn.Linear(8, 256)

    def prepare(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (images,)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.flatten(1)
        return (self.decode(self.norm(self.encode(pixels))) - pixels).square().sum(1)


def random_images(count: int, config: FederationConfig, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *config.data.shape), dtype=np.uint8)


def made(
    config: FederationConfig,
    patients: Sequence[int],
    noise: float = NONE,
    rate: float = 0.5,
    method: Any = None,
    micro_batch: int = 0,
) -> Private:
    """Return an engine over random images, so many a patient."""
    units = np.repeat(np.arange(len(patients)), patients).astype(np.int32)
    images = random_images(len(units), config)
    fabric = open_fabric(Machine(), config.training.precision)
    method = ssl.build(config) if method is None else method
    return Private(method, images, units, config, Mechanism(rate, noise, 1), fabric, micro_batch)


def steady(engine: Private) -> Private:
    """Have a method draw the same for an image whatever its batch, so that two batches differ in one patient alone."""
    method, draw = engine.method, engine.method.prepare

    def prepare(images: Tensor, _: torch.Generator) -> tuple[Tensor, ...]:
        seeds = [zlib.crc32(image.numpy().tobytes()) for image in images]
        each = [draw(image[None], torch.Generator().manual_seed(s)) for image, s in zip(images, seeds, strict=True)]
        rows = [torch.cat(parts) for parts in zip(*each, strict=True)]
        if engine.recipe.method.name == "simclr":  # which public images a step takes is one draw for all
            rows[2] = torch.arange(8).expand(len(images), -1)
        dtype = next(iter(engine.parameters.values())).dtype
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in rows)

    method.prepare = prepare  # type: ignore[method-assign]
    return engine


def released(engine: Private, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the noised sum of a step, in float64: [numbers]."""
    engine.gradients(batch)
    flat = torch.cat([p.grad.detach().flatten() for p in engine.parameters.values() if p.grad is not None]).double()
    return flat * engine.recipe.training.batch_size


def everyone(engine: Private) -> tuple[Tensor, Tensor]:
    """Return the batch of all images."""
    units = torch.cat([torch.full((len(own),), number) for number, own in enumerate(engine.units)])
    return torch.from_numpy(np.concatenate(engine.units)), units


def without(batch: tuple[Tensor, Tensor], unit: int) -> tuple[Tensor, Tensor]:
    """Return a batch with one patient fewer."""
    kept = batch[1] != unit
    return batch[0][kept], batch[1][kept].unique(return_inverse=True)[1]


def nobody() -> tuple[Tensor, Tensor]:
    return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)


def sensitivity(engine: Private, batch: tuple[Tensor, Tensor], unit: int) -> float:
    """Return how far one patient moves the clipped sum, in multiples of C."""
    moved = released(engine, batch) - released(engine, without(batch, unit))
    return float(moved.norm()) / engine.privacy.clip


def with_clip(engine: Private, clip: float) -> None:
    engine.privacy = engine.privacy.model_copy(update={"clip": clip})


def inside(squares: float, freedom: int) -> bool:
    """Return whether a sum of squares may be a chi-square variable of so many degrees of freedom."""
    return bool(stats.chi2.ppf(CHANCE, freedom) < squares < stats.chi2.isf(CHANCE, freedom))
