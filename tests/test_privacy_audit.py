"""Audits of the private engine, by what it releases: each fails for an engine that is less private than it says.

Each statistical test fails by chance with a probability below 1e-6. A noise of 1e-90 is none: it shows
the clipped sum itself.
"""

import math
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny, to_toml, write_labelled
from numpy.typing import NDArray
from private_methods import HEADS, METHODS, VIT, disturbed, distance, inputs_of, norm, private
from scipy import stats
from torch import Tensor, nn

from wardround import ssl
from wardround.client.app import run_task
from wardround.client.charge import ledger_of
from wardround.config import FederationConfig, read_site
from wardround.errors import ConfigError, PolicyRefusal
from wardround.plan import resolve
from wardround.privacy import bookkeeping
from wardround.privacy import engine as private_engine
from wardround.privacy.accounting import Mechanism, epsilon
from wardround.privacy.bookkeeping import clipped_sum, unit_terms
from wardround.privacy.capture import Capture
from wardround.privacy.engine import Private
from wardround.privacy.grouping import Grouping
from wardround.privacy.method import trained
from wardround.privacy.rows import rows_of_calls
from wardround.ssl.devices import Machine, open_fabric
from wardround.ssl.draws import generator
from wardround.ssl.pretrain import pretrain
from wardround.update import Task, Update, pack

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


# Noise


@pytest.mark.parametrize("randomness", ["torch", "secure"])
def test_a_step_that_draws_nobody_is_noise_of_the_declared_size(randomness: str) -> None:
    config = private("mae", SMALL_VIT, size=16, privacy={"clip": 0.3, "randomness": randomness})
    engine = made(config, [1] * 4, noise=0.8)
    noise = released(engine, nobody()) / (0.8 * 0.3)
    assert len(noise) == sum(p.numel() for p in engine.method.parameters() if p.requires_grad) > 100_000
    assert inside(float(noise.square().sum()), len(noise))
    assert float(noise.sum() ** 2 / len(noise)) < stats.chi2.isf(2 * CHANCE, 1)
    assert not inside(float((0.9 * noise).square().sum()), len(noise))


def test_an_engine_with_nine_tenths_of_the_noise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    true = private_engine.standard_normal
    monkeypatch.setattr(private_engine, "standard_normal", lambda *asked: 0.9 * true(*asked))
    noise = released(made(private("mae", SMALL_VIT, size=16), [1] * 4, noise=SIGMA), nobody())
    assert not inside(float(noise.square().sum()), len(noise))


def test_rounds_of_empty_draws_are_steps_with_noise_and_end() -> None:
    config = private("mae", SMALL_VIT, size=16)
    engine = made(config, [1] * 4, noise=SIGMA, rate=1e-12)
    before = [p.detach().clone() for p in engine.parameters.values()]
    trained_ = pretrain(engine.method, engine, config.training, 0, 3, {}, "audit")
    assert trained_.losses == [0.0, 0.0, 0.0]
    assert all(not torch.equal(old, new) for old, new in zip(before, engine.parameters.values(), strict=True))


# Sensitivity


@pytest.mark.parametrize(
    ("method", "backbone", "size", "cases"),
    [("mae", SMALL_VIT, 16, 40), ("simclr", SMALL_VIT, 16, 14), ("byol", RESNET, 32, 6)],
)
def test_one_patient_moves_the_sum_by_the_clipping_norm_at_most(
    method: str, backbone: Any, size: int, cases: int
) -> None:
    """Adding or removing one of the patients, all else equal, in float32 and through the real rules."""
    config = private(method, backbone, size=size)
    draw = np.random.default_rng(7)
    engine = steady(made(config, [1, 3, 2, 1, 4]))
    found = []
    for case in range(cases):
        with_clip(engine, 10.0 ** draw.uniform(-2, 0.5))
        engine.images[:] = random_images(len(engine.images), config, case)
        with torch.no_grad():
            for parameter in engine.parameters.values():
                parameter.add_(0.02 * torch.randn_like(parameter))
        found.append(sensitivity(engine, everyone(engine), int(draw.integers(5))))
    assert max(found) <= 1 + 1e-6
    assert max(found) > 0.999  # some are clipped


def test_an_engine_that_does_not_clip_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bookkeeping, "weights", lambda squares, clip: torch.ones_like(squares))
    engine = steady(made(private("mae", SMALL_VIT, size=16, privacy={"clip": 0.01}), [1, 2, 1]))
    assert sensitivity(engine, everyone(engine), 1) > 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("extreme", ["black", "white", "same", "weights"])
def test_extreme_images_and_weights_move_the_sum_no_further(extreme: str, precision: str) -> None:
    config = private("mae", SMALL_VIT, size=16, training={"precision": precision}, privacy={"clip": 0.1})
    engine = steady(made(config, [2, 3, 1]))
    if extreme == "weights":
        with torch.no_grad():
            for parameter in engine.parameters.values():
                parameter.mul_(1e3)
    else:
        engine.images[:] = {"black": 0, "white": 255, "same": engine.images[0]}[extreme]
    for unit in range(3):
        assert sensitivity(engine, everyone(engine), unit) <= 1 + 1e-6


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_patient_with_twenty_images_counts_as_one(precision: str) -> None:
    privacy = {"clip": 0.01, "images_per_patient": 4}
    config = private("mae", SMALL_VIT, size=16, training={"precision": precision}, privacy=privacy)
    engine = steady(made(config, [1, 20, 2], rate=1.0))
    assert sensitivity(engine, everyone(engine), 1) <= 1 + 1e-6
    batch = engine.batch(0)
    assert torch.bincount(batch[1]).tolist() == [1, 4, 2]
    assert 0.9 < sensitivity(engine, batch, 1) <= 1 + 1e-6


# What is refused, and why


def nearly_equal(config: FederationConfig, count: int) -> Tensor:
    """Return films of which all but the last are the same up to a little noise: [count, 1, S, S]."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(1, *config.data.shape, generator=draw).repeat(count, 1, 1, 1)
    images += 0.01 * torch.randn(images.shape, generator=draw)
    images[-1] = torch.rand(config.data.shape, generator=draw)
    return images.clamp(0, 1)


def test_clipping_nt_xent_by_the_image_does_not_bound_what_an_image_does() -> None:
    """Removing one of 32 images moves the sum of clipped gradients by many C: it turns all the others."""
    config = tiny(method={"name": "simclr", **HEADS})
    method = ssl.build(config)
    images = nearly_equal(config, 32)

    def total(images: Tensor) -> dict[str, Tensor]:
        with Capture(trained(method), lambda call: None) as capture:
            method(images, images)
        alone = Grouping(torch.arange(len(images)), len(images))
        return clipped_sum(method, (images, images), alone, 0.1, [1] * len(capture.calls)).sums

    whole, fewer = total(images), total(images[:-1])
    assert norm({name: whole[name] - fewer[name] for name in whole}) / 0.1 > 10


COUPLED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("simclr", {"negatives": "batch"}, SMALL_VIT, "negatives = 'public'"),
    ("moco", {}, SMALL_VIT, "compare"),
    ("vicreg", {}, SMALL_VIT, "batch"),
    ("dino", {"centre": "batch", "local_views": 0}, SMALL_VIT, "centre"),
    *(
        (method, {}, {"name": name, "norm": "batch"}, "batch normalisation shares statistics")
        for method, name in (
            ("byol", "densenet121"),
            ("byol", "efficientnet_b0"),
            ("byol", "inception_v4"),
            ("mae", RESNET),
        )
    ),
]


@pytest.mark.parametrize(("name", "settings", "backbone", "reason"), COUPLED, ids=lambda x: x if type(x) is str else "")
def test_what_couples_patients_is_refused_with_alternatives(
    name: str, settings: dict[str, Any], backbone: dict[str, Any], reason: str
) -> None:
    size = 96 if backbone["name"] == "inception_v4" else 32
    privacy = {"unit": "patient", "epsilon": 8.0, "delta": 1e-3}
    config = tiny(method={"name": name, **settings}, backbone=backbone, data={"image_size": size}, privacy=privacy)
    with pytest.raises(ConfigError, match=reason) as refused:
        made(config, [1] * 4)
    for alternative in ("mae", "negatives = 'public'", "norm = 'group'", "unit = 'site'"):
        assert alternative in str(refused.value)


def frozen_affine(layer: nn.BatchNorm1d) -> nn.BatchNorm1d:
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    return layer


class Normalised(Small):
    """A small method that says that it decomposes, with a layer that may couple."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm = layer


class Squashed(nn.Module):
    """A layer by hand that looks at its batch without a parameter or a statistic of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(8, affine=False), frozen_affine(nn.BatchNorm1d(8)), Squashed()], ids=repr
)
def test_a_layer_that_couples_is_found_by_what_it_does_whatever_the_method_says(layer: nn.Module) -> None:
    with pytest.raises(ConfigError, match="changes with another image of its batch"):
        rows_of_calls(Normalised(layer), (1, 16, 16))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("trains", [True, False])
def test_batch_normalisation_in_a_method_is_refused_by_its_type(affine: bool, trains: bool) -> None:
    """In evaluation mode no batch is looked at; a training loop switches the mode after the engine is made."""
    config = private("mae", SMALL_VIT, size=16)
    method = ssl.build(config).train(trains)
    method.head.norm = nn.BatchNorm1d(16, affine=affine).requires_grad_(False)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"batch normalisation shares statistics over the batch \('head.norm'\)"):
        made(config, [1] * 4, method=method)


@pytest.mark.parametrize("name", ["densenet121", "efficientnet_b0", "inception_v4"])
def test_opacus_finds_no_error_in_batch_normalised_networks_of_timm(name: str) -> None:
    """Why its validator is not asked: timm's BatchNormAct2d passes it."""
    import timm
    from opacus.validators import ModuleValidator

    with torch.device("meta"):
        model = timm.create_model(name)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    assert ModuleValidator.validate(model, strict=False) == []


@pytest.mark.parametrize("method", METHODS)
def test_every_gradient_is_of_a_patient_never_of_a_view_a_window_or_a_token(method: str) -> None:
    networks: list[Any] = [SMALL_VIT] if method in ("mae", "ijepa") else [SMALL_VIT, "swin_tiny_patch4_window7_224"]
    for network in networks if method in ("mae", "simclr", "byol") else networks[:1]:
        config = private(method, network, size=32)
        built = disturbed(config)
        group = Grouping(torch.tensor([0, 0, 1, 2, 2]), 3)
        losses, terms = unit_terms(built, inputs_of(built, 5), group, rows_of_calls(built, config.data.shape))
        assert losses.shape == (5,)
        assert {tuple(term.squares.shape) for term in terms} == {(3,)}


# Bad numbers


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize(("method", "backbone"), [("mae", SMALL_VIT), ("byol", RESNET)])
def test_a_patient_without_finite_gradients_adds_nothing_and_harms_nobody(
    method: str, backbone: Any, value: float
) -> None:
    engine = steady(made(private(method, backbone, size=32), [1, 2, 1]))
    batch, draw = everyone(engine), engine.method.prepare
    expected = released(engine, without(batch, 1))

    def poisoned(images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        views, *others = draw(images, generator)
        views[1] *= value  # one of the two images of the second patient
        return views, *others

    engine.method.prepare = poisoned  # type: ignore[method-assign]
    found = released(engine, batch)
    assert found.isfinite().all()
    if value != 1e30 or method == "mae":  # group normalisation may take 1e30 away: then it is a patient like others
        assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())
    assert float((found - expected).norm()) <= engine.privacy.clip * (1 + 1e-6)


def test_a_state_in_which_every_gradient_overflows_gives_noise_alone() -> None:
    engine = made(private("mae", SMALL_VIT, size=16), [1] * 4, noise=SIGMA)
    with torch.no_grad():
        for parameter in engine.parameters.values():
            parameter.mul_(1e30)
    noise = released(engine, everyone(engine))
    assert inside(float(noise.square().sum()), len(noise))
    assert engine.gradients(everyone(engine)).item() == 0.0
