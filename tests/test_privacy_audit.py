"""Audits of the private engine, by what it releases: each fails for an engine that is less private than it says.

Each statistical test fails by chance with a probability below 1e-6.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from audited_engine import (
    CHANCE,
    RESNET,
    SIGMA,
    SMALL_VIT,
    everyone,
    inside,
    made,
    nobody,
    random_images,
    released,
    sensitivity,
    steady,
    with_clip,
    without,
)
from private_methods import METHODS, disturbed, inputs_of, private
from scipy import stats
from torch import Tensor

from wardround import ssl
from wardround.privacy import bookkeeping
from wardround.privacy import engine as private_engine
from wardround.privacy.bookkeeping import unit_terms
from wardround.privacy.grouping import Grouping
from wardround.privacy.rows import rows_of_calls
from wardround.ssl.pretrain import pretrain


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
    trained_ = pretrain(engine.method, engine, 0, 3, {}, "audit")
    assert trained_.losses == [0.0, 0.0, 0.0]
    assert all(not torch.equal(old, new) for old, new in zip(before, engine.parameters.values(), strict=True))


@pytest.mark.parametrize(
    ("method", "backbone", "size", "cases"),
    [("mae", SMALL_VIT, 16, 40), ("simclr", SMALL_VIT, 16, 17), ("byol", RESNET, 32, 3)],
)
def test_one_patient_moves_the_sum_by_the_clipping_norm_at_most(
    method: str, backbone: Any, size: int, cases: int
) -> None:
    """Adding or removing one of the patients, all else equal, in float32 and through the real rules."""
    config = private(method, backbone, size=size)
    draw, weights = np.random.default_rng(7), torch.Generator().manual_seed(7)
    engine = steady(made(config, [1, 3, 2, 1, 4]))
    found = []
    for case in range(cases):
        with_clip(engine, 10.0 ** draw.uniform(-2, 0.5))
        engine.images[:] = random_images(len(engine.images), config, case)
        with torch.no_grad():
            for parameter in engine.parameters.values():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=weights))
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
    assert 0.98 < sensitivity(engine, batch, 1) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("method", "backbone"), [("mae", SMALL_VIT), ("simclr", SMALL_VIT), ("byol", "mobilenetv2_050")]
)
def test_a_batch_taken_in_parts_gives_the_same_sum(method: str, backbone: Any) -> None:
    config = private(method, backbone, size=32, privacy={"clip": 0.5})
    engine = steady(made(config, [1, 2, 1, 3], method=ssl.build(config).double(), micro_batch=7))
    batch = everyone(engine)
    assert len(list(engine.parts(batch[1]))) == 1
    expected = released(engine, batch)
    engine.micro_batch = 3
    assert len(list(engine.parts(batch[1]))) == 3
    assert float((released(engine, batch) - expected).norm()) < 1e-6 * float(expected.norm())


@pytest.mark.parametrize("method", METHODS)
def test_every_gradient_is_of_a_patient_never_of_a_view_a_window_or_a_token(method: str) -> None:
    config = private(method, "mobilevit_xxs" if method == "simclr" else SMALL_VIT, size=32)
    built = disturbed(config)
    group = Grouping(torch.tensor([0, 0, 1, 2, 2]), 3)
    losses, terms = unit_terms(built, inputs_of(built, 5), group, rows_of_calls(built, config.data.shape))
    assert losses.shape == (5,)
    assert {tuple(term.squares.shape) for term in terms} == {(3,)}


@pytest.mark.parametrize(
    ("method", "backbone", "value"),
    [("mae", SMALL_VIT, math.nan), ("mae", SMALL_VIT, math.inf), ("mae", SMALL_VIT, 1e30), ("byol", RESNET, math.nan)],
)
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
    assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())


def test_a_state_in_which_every_gradient_overflows_gives_noise_alone() -> None:
    engine = made(private("mae", SMALL_VIT, size=16), [1] * 4, noise=SIGMA)
    with torch.no_grad():
        for parameter in engine.parameters.values():
            parameter.mul_(1e30)
    noise = released(engine, everyone(engine))
    assert inside(float(noise.square().sum()), len(noise))
    assert engine.gradients(everyone(engine)).item() == 0.0
