"""What an observer can learn from steps of the private engine who knows the code, the seed, and all but one patient.

Each statistical test fails by chance with a probability below 1e-6.
"""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from audited_engine import (
    CHANCE,
    NONE,
    SIGMA,
    Small,
    everyone,
    made,
    nobody,
    released,
    without,
)
from numpy.typing import NDArray
from private_methods import private
from scipy import stats
from torch import Tensor

from wardround.privacy import bookkeeping
from wardround.privacy import engine as private_engine
from wardround.privacy.accounting import Mechanism
from wardround.privacy.engine import Private
from wardround.ssl.draws import generator

# Draws


def binomial(counts: Sequence[int], trials: int, rate: float) -> bool:
    """Return whether each of some counts may be of so many trials."""
    chance = CHANCE / len(counts)
    least, most = stats.binom.ppf(chance, trials, rate), stats.binom.isf(chance, trials, rate)
    return bool(least <= min(counts) and max(counts) <= most)


def poisson_sizes(sizes: NDArray[np.int64], units: int, rate: float) -> bool:
    """Return whether batch sizes may be those of independent draws: their mean, and their spread (chi-square)."""
    steps, expected, spread = len(sizes), units * rate, units * rate * (1 - rate)
    squares = float(((sizes - expected) ** 2).sum() / spread)
    # The squares of a binomial have a variance of 2 + (1 - 6 q (1 - q)) / (n q (1 - q)), and 3,000 of them are normal.
    width = math.sqrt(steps * (2 + (1 - 6 * rate * (1 - rate)) / spread))
    return binomial([int(sizes.sum())], steps * units, rate) and abs(squares - steps) < 5.5 * width


@pytest.mark.parametrize("unit", ["patient", "image"])
def test_every_unit_is_drawn_by_itself_with_the_declared_probability(unit: str) -> None:
    patients, rate, steps = [1, 2, 7, 20, 1, 3], 0.3, 3000
    most = 4 if unit == "patient" else 1
    privacy = {"unit": unit, **({"images_per_patient": most} if unit == "patient" else {})}
    counts = patients if unit == "patient" else [1] * 34
    engine = made(private("mae", size=16, privacy=privacy), counts, rate=rate, method=Small())
    owner = np.repeat(np.arange(len(counts)), counts)
    seen, sizes = np.zeros((steps, len(counts)), np.int64), []
    for step in range(steps):
        rows, units = engine.batch(step)
        assert len(rows.unique()) == len(rows)  # no image twice
        owners = owner[rows.numpy()]
        _, per_unit = np.unique(units.numpy(), return_counts=True)
        assert len(set(zip(owners.tolist(), units.tolist(), strict=True))) == len(per_unit) == len(set(owners))
        np.add.at(seen[step], owners, 1)
        sizes.append(len(per_unit))
    assert (seen == np.minimum(counts, most) * (seen > 0)).all()  # as many images as the patient has, up to the limit
    drawn = seen > 0
    assert binomial(drawn.sum(0).tolist(), steps, rate)
    together = [int((drawn[:, a] & drawn[:, b]).sum()) for a in range(len(counts)) for b in range(a)]
    assert binomial(together, steps, rate**2)
    assert poisson_sizes(np.array(sizes), len(counts), rate)
    fixed = np.full(steps, round(len(counts) * rate))  # what a shuffled epoch would give
    assert not poisson_sizes(fixed, len(counts), rate)


def test_no_image_of_a_patient_is_preferred() -> None:
    engine = made(private("mae", size=16, privacy={"images_per_patient": 2}), [5], rate=1.0, method=Small())
    counts = torch.bincount(torch.cat([engine.batch(step)[0] for step in range(2000)]), minlength=5)
    assert binomial(counts.tolist(), 2000, 2 / 5)


# A canary: the most that one patient can do, as an attacker sees it who knows all else


def canary_mu(engine: Private, steps: int = 200) -> tuple[float, float]:
    """Return bounds on mu, the canary's shift of the released sum in standard deviations of its noise.

    A Gaussian mechanism of sensitivity C and noise sigma C is mu-GDP with mu = 1 / sigma (Dong et al. 2022).
    """
    batch = everyone(engine)
    fewer, noise = without(batch, len(engine.units) - 1), engine.mechanism
    engine.mechanism = Mechanism(1.0, NONE, 1)
    direction = released(engine, batch) - released(engine, fewer)
    engine.mechanism = noise
    direction /= direction.norm()
    seen, unseen = (torch.stack([released(engine, b) @ direction for _ in range(steps)]) for b in (batch, fewer))
    mu = float((seen.mean() - unseen.mean()) / ((seen.var() + unseen.var()) / 2).sqrt())
    wide = float(stats.norm.isf(CHANCE)) * math.sqrt(2 / steps + mu**2 / (4 * steps))
    return mu - wide, mu + wide


def canary_engine() -> Private:
    engine = made(private("mae", size=16, privacy={"clip": 0.7}), [1, 2, 1, 1], SIGMA, rate=1.0, method=Small())
    engine.images[-1] = np.where(np.indices((1, 16, 16)).sum(0) % 2, 255, 0)  # unlike all others, its gradient large
    return engine


def test_a_canary_is_seen_as_well_as_the_noise_allows_and_no_better() -> None:
    low, high = canary_mu(canary_engine())
    assert low < 1 / SIGMA < high


def test_an_engine_with_half_the_noise_is_caught_by_the_canary(monkeypatch: pytest.MonkeyPatch) -> None:
    true = private_engine.standard_normal
    monkeypatch.setattr(private_engine, "standard_normal", lambda *asked: true(*asked) / 2)
    assert canary_mu(canary_engine())[0] > 1 / SIGMA


def test_an_engine_that_clips_at_twice_the_norm_is_caught_by_the_canary(monkeypatch: pytest.MonkeyPatch) -> None:
    true = bookkeeping.weights
    monkeypatch.setattr(bookkeeping, "weights", lambda squares, clip: true(squares, 2 * clip))
    assert canary_mu(canary_engine())[0] > 1 / SIGMA


# An observer who knows the experiment's seed, the code, and all data but one patient's


def candidates(engine: Private, size: int) -> list[Tensor]:
    """Return the noise that each generator would give that an observer can seed."""
    seed, found = engine.recipe.seed, []
    names = [(seed,), (seed, "lyon"), *((seed, "lyon", 0, use) for use in ("views", "order", "noise", "privacy", ""))]
    generators = [generator(*name) for name in names]
    generators += [torch.Generator().manual_seed(seed + step) for step in range(3)]
    for each in generators:
        state = each.get_state()
        found.append(torch.randn(size, generator=each))
        each.set_state(state)  # or the patients were drawn from it before
        torch.rand(len(engine.units), generator=each, dtype=torch.float64)
        found.append(torch.randn(size, generator=each))
    torch.manual_seed(seed)
    found.append(torch.randn(size))
    found.append(torch.from_numpy(np.random.default_rng(seed).standard_normal(size, np.float32)))
    found.append(torch.from_numpy(np.random.RandomState(seed).standard_normal(size)))
    return found


def residual(engine: Private) -> float:
    """Return the least that is left of a step after an observer's subtraction, in sizes of its noise."""
    torch.manual_seed(engine.recipe.seed)
    np.random.seed(engine.recipe.seed)
    engine.batch(0)
    sum_ = released(engine, everyone(engine))
    scale = engine.mechanism.noise * engine.privacy.clip
    left = [float((sum_ - scale * noise.double()).norm()) for noise in candidates(engine, len(sum_))]
    return min(left) / (scale * math.sqrt(len(sum_)))


def test_an_observer_cannot_subtract_the_noise() -> None:
    assert residual(canary_engine()) > 1.3  # the noise and the guess, independent: the root of two


def test_the_observer_would_find_noise_from_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = canary_engine()

    def seeded(shape: Sequence[int], _: str) -> Tensor:
        return torch.randn(tuple(shape), generator=generator(engine.recipe.seed, "lyon", 0, "noise"))

    monkeypatch.setattr(private_engine, "standard_normal", seeded)
    assert residual(engine) < 0.1


def test_two_runs_of_one_experiment_differ_in_draws_and_in_noise() -> None:
    drawn, noise = [], []
    for _ in range(2):
        torch.manual_seed(3)
        np.random.seed(3)
        engine = made(private("mae", size=16), [1] * 64, noise=SIGMA, method=Small())
        drawn.append(engine.batch(0)[0].tolist())
        noise.append(released(engine, nobody()))
    assert drawn[0] != drawn[1]  # equal with a chance of 2^-64
    assert (noise[0] == noise[1]).float().mean() < 0.01  # float32 numbers, of which two in 10^7 are equal
