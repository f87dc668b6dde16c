"""Epsilon from mechanisms: against two other accountants and closed forms, and never below the truth."""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
from conftest import tiny
from scipy.optimize import brentq
from scipy.stats import binom, norm

from wardround.errors import ConfigError
from wardround.privacy import accounting
from wardround.privacy.accounting import Mechanism, calibrate, curve, epsilon, mechanism, rounds_left, upward

MEASURED = Mechanism(rate=128 / 2000, noise=1.2, steps=800)  # facts that were measured, at delta = 1e-5


def prv(mechanisms: list[Mechanism], delta: float) -> float:
    """Return the epsilon of Opacus's PRV accountant, which takes no rate of 1 (it divides by zero)."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(each.noise, each.rate, each.steps) for each in mechanisms]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the largest alpha")  # of RDP, which only sizes its domain
        return float(accountant.get_epsilon(delta))


def renyi(mechanisms: list[Mechanism], delta: float) -> float:
    """Return the epsilon of dp-accounting's RDP accountant, at its own orders."""
    from dp_accounting import dp_event, rdp

    accountant = rdp.RdpAccountant()
    for each in mechanisms:
        event = dp_event.PoissonSampledDpEvent(each.rate, dp_event.GaussianDpEvent(each.noise))
        accountant.compose(event, each.steps)
    return float(accountant.get_epsilon(delta))


def analytic(noise: float, steps: int, delta: float) -> float:
    """Return the exact epsilon of Gaussians without sampling (Balle & Wang, arXiv:1805.06530, Theorem 8)."""
    mu = math.sqrt(steps) / noise

    def excess(found: float) -> float:
        second = math.exp(found + norm.logcdf(-mu / 2 - found / mu))
        return float(norm.cdf(mu / 2 - found / mu) - second - delta)

    return float(brentq(excess, 0.0, mu * mu + 60 * mu, xtol=1e-12)) if excess(0.0) > 0 else 0.0


def one_step(rate: float, noise: float, delta: float) -> float:
    """Return the exact epsilon of one sampled Gaussian where the unit is removed: the worse direction."""

    def excess(found: float) -> float:
        # The loss log(1 - q + q exp((2x - 1) / 2s^2)) passes `found` at x = t.
        t = 0.5 + noise**2 * math.log((math.exp(found) - 1 + rate) / rate)
        with_unit = (1 - rate) * norm.sf(t / noise) + rate * norm.sf((t - 1) / noise)
        return float(with_unit - math.exp(found) * norm.sf(t / noise) - delta)

    return float(brentq(excess, 1e-15, 300.0, xtol=1e-13)) if excess(1e-15) > 0 else 0.0


def test_the_measured_case_by_three_accountants() -> None:
    assert epsilon([MEASURED], 1e-5) == pytest.approx(9.28, abs=0.005)
    assert prv([MEASURED], 1e-5) == pytest.approx(9.29, abs=0.005)
    assert renyi([MEASURED], 1e-5) == pytest.approx(10.09, abs=0.005)


def test_under_replacing_a_patient_the_same_mechanism_costs_nearly_twice() -> None:
    from dp_accounting import NeighboringRelation, dp_event
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(NeighboringRelation.REPLACE_ONE, value_discretization_interval=1e-3)
    gaussian = dp_event.GaussianDpEvent(MEASURED.noise)
    accountant.compose(dp_event.PoissonSampledDpEvent(MEASURED.rate, gaussian), MEASURED.steps)
    replaced = accountant.get_epsilon(1e-5)
    assert replaced == pytest.approx(17.0, abs=0.05)
    assert replaced > 1.8 * epsilon([MEASURED], 1e-5)


@pytest.mark.parametrize(
    "mechanisms",
    [
        [MEASURED],
        [Mechanism(0.01, 0.7, 500)],
        [Mechanism(0.001, 1.0, 20_000)],
        [Mechanism(0.3, 6.0, 300)],
        [Mechanism(0.05, 1.1, 100), Mechanism(0.02, 0.8, 60), Mechanism(0.9, 9.0, 5)],
    ],
)
@pytest.mark.parametrize("delta", [1e-5, 1e-7])
def test_it_is_within_a_hundredth_of_prv_and_never_above_rdp(mechanisms: list[Mechanism], delta: float) -> None:
    found = epsilon(mechanisms, delta)
    assert found == pytest.approx(prv(mechanisms, delta), rel=0.01, abs=0.011)  # 0.01: PRV's own error
    assert found <= renyi(mechanisms, delta)


@pytest.mark.parametrize("noise", [0.3, 1.0, 30.0, 3000.0])
@pytest.mark.parametrize("steps", [1, 5000])
@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-9, 1e-12])
def test_without_sampling_it_is_the_closed_form_and_never_below(noise: float, steps: int, delta: float) -> None:
    exact = analytic(noise, steps, delta)
    found = epsilon([Mechanism(1.0, noise, steps)], delta)
    assert found >= exact * (1 - 1e-9)
    assert found <= exact * 1.002 + 1e-6


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("steps", [1, 100, 10_000])
def test_thousands_of_convolved_steps_are_never_below_the_closed_form(steps: int, delta: float) -> None:
    nearly_all = Mechanism(1 - 1e-12, 40.0, steps)  # goes the way of sampled mechanisms
    assert epsilon([nearly_all], delta) >= analytic(40.0, steps, delta) * (1 - 1e-8)


@pytest.mark.parametrize("rate", [1e-6, 0.01, 0.5])
@pytest.mark.parametrize("noise", [0.2, 1.0, 50.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-12])
def test_one_sampled_step_is_never_below_its_closed_form(rate: float, noise: float, delta: float) -> None:
    assert epsilon([Mechanism(rate, noise, 1)], delta) >= one_step(rate, noise, delta) * (1 - 1e-9)


@pytest.mark.parametrize(
    "extreme",
    [Mechanism(0.5, 1e-3, 1), Mechanism(1e-8, 1e-3, 10), Mechanism(1.0, 1e-3, 10**9), Mechanism(0.5, 1e-3, 10**9)],
)
def test_noise_of_next_to_nothing_gives_an_epsilon_that_says_so(extreme: Mechanism) -> None:
    assert epsilon([extreme], 1e-9) > 1e5


def test_the_rounding_of_the_convolution_is_less_than_what_is_deducted_from_delta() -> None:
    """dp-accounting powers an FFT: its tails are off by up to 7e-16 a step, which would hide a delta of 1e-12."""
    from dp_accounting.pld.common import self_convolve

    worst = 0.0
    for trials, steps in [(100, 800), (1000, 800), (100, 10_000), (2000, 10_000), (20, 100_000)]:
        one = list(binom.pmf(np.arange(trials + 1), trials, 0.5))
        with np.errstate(over="ignore"):
            first, found = self_convolve(one, steps, 1e-15)
        exact = binom.pmf(np.arange(first, first + len(found)), trials * steps, 0.5)
        tails = np.cumsum((np.asarray(found) - exact)[::-1])
        worst = max(worst, float(np.abs(tails).max()) / steps)
    assert 1e-16 < worst < accounting._ROUNDING / 5


def test_where_rounding_could_hide_delta_the_larger_bound_stands() -> None:
    assert epsilon([MEASURED], 1e-12) == accounting._renyi((MEASURED,), 1e-12)
    assert epsilon([MEASURED], 1e-12) > epsilon([MEASURED], 1e-10) > epsilon([MEASURED], 1e-9)


def test_nothing_released_is_nothing_spent() -> None:
    assert epsilon([], 1e-5) == 0.0


def test_rounds_count_together_whatever_their_order() -> None:
    a, b = Mechanism(0.064, 1.2, 16), Mechanism(0.01, 0.8, 16)
    assert epsilon([a] * 50, 1e-5) == epsilon([a.times(50)], 1e-5)
    assert epsilon([a, b, a], 1e-5) == epsilon([b, a.times(2)], 1e-5)
    assert len(accounting._merged([a, b] * 50)) == 2  # fifty of each take as long as two


@pytest.mark.parametrize(
    ("rate", "noise", "steps"),
    [
        (0.0, 1.0, 1),
        (1.1, 1.0, 1),
        (math.nan, 1.0, 1),
        (0.5, 0.0, 1),
        (0.5, math.nan, 1),
        (0.5, 1.0, 0),
        (0.5, 1e-101, 1),
    ],
)
def test_what_is_no_mechanism_is_refused(rate: float, noise: float, steps: int) -> None:
    with pytest.raises(ConfigError, match="no mechanism has"):
        Mechanism(rate, noise, steps)


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"), [(8.0, 1e-5, 0.064, 800), (3.0, 1e-6, 0.01, 2000), (0.5, 1e-6, 1.0, 30)]
)
def test_the_calibrated_noise_is_the_least_of_four_digits(target: float, delta: float, rate: float, steps: int) -> None:
    noise = calibrate(target, delta, rate, steps)
    assert float(f"{noise:.4g}") == noise
    assert epsilon([Mechanism(rate, noise, steps)], delta) <= target
    less = noise - 10.0 ** (math.floor(math.log10(noise)) - 3)
    assert epsilon([Mechanism(rate, less, steps)], delta) > target


def test_without_sampling_the_calibrated_noise_is_that_of_the_closed_form() -> None:
    exact = brentq(lambda noise: analytic(noise, 100, 1e-5) - 1.0, 1.0, 1000.0)
    assert exact <= calibrate(1.0, 1e-5, 1.0, 100) <= exact * 1.002


def test_what_no_noise_reaches_is_refused_with_what_to_change() -> None:
    with pytest.raises(ConfigError, match="raise epsilon or delta, or take fewer steps"):
        calibrate(1e-3, 1e-12, 0.5, 100_000)


def test_the_rounds_left_are_the_most_that_fit() -> None:
    spent, a_round = [Mechanism(0.064, 1.2, 160)], Mechanism(0.064, 1.3, 16)
    left = rounds_left(spent, a_round, 8.0, 1e-5)
    assert epsilon([*spent, a_round.times(left)], 1e-5) <= 8.0 < epsilon([*spent, a_round.times(left + 1)], 1e-5)
    assert rounds_left(spent, a_round, 1.0, 1e-5) == 0
    assert rounds_left([], Mechanism(1e-6, 1000.0, 1), 8.0, 1e-5) == 100_000


def test_the_curve_ends_at_the_whole_and_only_rises() -> None:
    few, many = curve(Mechanism(0.064, 1.2, 16), 5, 1e-5), curve(Mechanism(1.0, 900.0, 1), 5000, 1e-5)
    assert [number for number, _ in few] == [1, 2, 3, 4, 5]
    assert few[-1][1] == epsilon([Mechanism(0.064, 1.2, 80)], 1e-5)
    assert len(many) == 40 and many[-1] == (5000, epsilon([Mechanism(1.0, 900.0, 5000)], 1e-5))
    assert all(one < two for (_, one), (_, two) in pairwise(many))


def test_a_round_of_a_config_spends_its_epsilon_over_all_rounds() -> None:
    private = {"unit": "patient", "epsilon": 4.0, "delta": 1e-5}
    config = tiny(privacy=private, training={"rounds": 10, "local_steps": 5, "batch_size": 16})
    a_round = mechanism(config, units=200)
    assert (a_round.rate, a_round.steps) == (0.08, 5)
    assert 3.9 < epsilon([a_round.times(10)], 1e-5) <= 4.0


def test_a_batch_above_the_declared_units_is_refused() -> None:
    config = tiny(privacy={"unit": "image", "epsilon": 4.0, "delta": 1e-5}, training={"batch_size": 16})
    with pytest.raises(ConfigError, match=r"more than the 15 units .* lower batch_size"):
        mechanism(config, units=15)
    assert mechanism(config, units=16).rate == 1.0


def test_a_printed_epsilon_is_never_below_what_it_stands_for() -> None:
    assert upward(7.9990001) == "8.000" and upward(2.5) == "2.500" and upward(0.0) == "0.000"
