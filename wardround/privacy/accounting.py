"""From mechanisms to epsilon and back, under adding or removing one unit: a patient, or an image.

What is printed is the least of two upper bounds: privacy loss distributions (PLD, "Connect the Dots",
Doroshenko et al., arXiv:2207.04380), tight to a part in a thousand, and Renyi DP (RDP, Mironov et al.,
arXiv:1908.10530), up to a tenth above. PLD convolves by FFT, whose rounding could hide a delta near
1e-12; there RDP stands alone, and epsilon comes out larger, never smaller. Opacus's PRV is within a
hundredth of PLD, but an estimate, no bound: it is what the tests compare with.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache

import numpy as np

from wardround.config.federation import Recipe
from wardround.config.privacy import UnitPrivacyConfig
from wardround.errors import ConfigError

_ORDERS = (*range(2, 33), 40, 48, 64, 96, 128, 256, 512, 1024)  # of RDP; whole ones have a closed sum at any q
_LEAST_NOISE, _LARGEST_NOISE = 1e-3, 1e4  # beyond: no privacy worth the name, and no learning
_MOST_ROUNDS = 100_000  # a config's limit

# Bound on what FFT rounding takes from a tail, per step: 15 times the largest that was measured against
# exact binomials (7e-16 a step, up to 1e6 steps).
_ROUNDING = 1e-14
_MOST_BINS = 400_000  # of one step's loss distribution: a second's work


@dataclass(frozen=True)
class Mechanism:
    """So many releases of a Gaussian, each on a Poisson sample of the units."""

    rate: float  # chance of a unit to be drawn, in (0, 1]; 1 is no sampling
    noise: float  # standard deviation over the clipping norm, above 0
    steps: int  # at least 1

    def __post_init__(self) -> None:
        """Raise ConfigError for what is no such mechanism."""
        if not (0.0 < self.rate <= 1.0 and 1e-100 < self.noise < math.inf and self.steps >= 1):
            raise ConfigError(
                f"no mechanism has rate = {self.rate}, noise = {self.noise}, steps = {self.steps}; expected a rate "
                "in (0, 1], noise above 0, and a step or more."
            )

    def times(self, rounds: int) -> "Mechanism":
        """Return so many of it."""
        return Mechanism(self.rate, self.noise, self.steps * rounds)


def upward(epsilon: float) -> str:
    """Return an epsilon as text of three digits after the point, never below what it is.

    >>> upward(7.99901), upward(1.1)
    ('8.000', '1.100')
    """
    return f"{Decimal(repr(epsilon)).quantize(Decimal('0.001'), ROUND_CEILING)}"


def epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Return an upper bound on the epsilon at which all mechanisms together are (epsilon, delta)-DP.

    Takes some 0.2 s for each distinct (rate, noise). Raises ConfigError where no bound is finite.

    >>> round(epsilon([Mechanism(rate=1.0, noise=4.0, steps=2), Mechanism(rate=1.0, noise=4.0, steps=14)], 1e-5), 2)
    4.38
    """
    return _epsilon(_merged(mechanisms), delta)


def mechanism(recipe: Recipe, units: int) -> Mechanism:
    """Return what a round releases at a site of so many declared units, noise calibrated to the recipe's epsilon.

    Raises ConfigError for a batch above the units, and where no noise reaches epsilon.
    """
    privacy, training = recipe.privacy, recipe.training
    assert isinstance(privacy, UnitPrivacyConfig), "only a patient or an image is a unit inside a site"
    rate = training.batch_size / units
    if rate > 1.0:
        raise ConfigError(
            f"[training] batch_size = {training.batch_size}: more than the {units} units that the site declares; "
            "lower batch_size in the federation's file."
        )
    noise = calibrate(privacy.epsilon, privacy.delta, rate, training.total_steps)
    return Mechanism(rate, noise, training.local_steps)


@lru_cache(maxsize=256)
def calibrate(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """Return the least noise, to four digits, with which so many steps stay within (epsilon, delta).

    Takes a second or two. Raises ConfigError where no noise up to 10,000 does.
    """

    def private(place: int) -> bool:
        return _epsilon(_merged([Mechanism(rate, _noise(place), steps)]), delta) <= epsilon

    def surely(place: int) -> bool:
        return _renyi(_merged([Mechanism(rate, _noise(place), steps)]), delta) <= epsilon

    least, last = _place(_LEAST_NOISE), _place(_LARGEST_NOISE)
    if not (surely(last) or private(last)):
        raise ConfigError(
            f"[privacy] epsilon = {epsilon}, delta = {delta}: no noise up to {_LARGEST_NOISE:.0f} reaches it in "
            f"{steps} steps at a sampling rate of {rate:.3g}; raise epsilon or delta, or take fewer steps."
        )
    # RDP is fast and never below PLD: the answer lies at or below what it finds.
    return _noise(_first(private, least, _first(surely, least, last)))


def rounds_left(spent: Sequence[Mechanism], a_round: Mechanism, ceiling: float, delta: float) -> int:
    """Return how many more rounds like one fit under the ceiling, up to 100,000."""

    def beyond(rounds: int) -> bool:
        return epsilon([*spent, a_round.times(rounds)], delta) > ceiling

    fits, step = 0, 1
    while fits + step <= _MOST_ROUNDS and not beyond(fits + step):
        fits, step = fits + step, 2 * step
    return _first(beyond, fits + 1, min(fits + step, _MOST_ROUNDS + 1)) - 1


def curve(a_round: Mechanism, rounds: int, delta: float, points: int = 40) -> list[tuple[int, float]]:
    """Return (round, epsilon after it) at up to 40 of the rounds, the last among them.

    Of thousands of rounds not each is computed: it would take minutes, and no picture shows it.
    """
    shown = sorted({math.ceil(rounds * number / points) for number in range(1, points + 1)})
    return [(number, epsilon([a_round.times(number)], delta)) for number in shown]


def _merged(mechanisms: Sequence[Mechanism]) -> tuple[Mechanism, ...]:
    """Return the same releases with equal ones counted together; without sampling, all are one Gaussian."""
    steps: Counter[tuple[float, float]] = Counter()
    for each in mechanisms:
        steps[each.rate, each.noise] += each.steps
    merged = [Mechanism(rate, noise, count) for (rate, noise), count in sorted(steps.items())]
    # n Gaussians of noise s tell as much as one of s / sqrt(n).
    precision = sum(each.steps / each.noise**2 for each in merged if each.rate == 1.0)
    whole = [Mechanism(1.0, precision**-0.5, 1)] if precision else []
    return (*whole, *(each for each in merged if each.rate < 1.0))


@lru_cache(maxsize=4096)
def _epsilon(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """Return the least bound for merged mechanisms."""
    if not mechanisms:
        return 0.0
    least = _renyi(mechanisms, delta)
    remaining = delta - _ROUNDING * sum(each.steps for each in mechanisms)
    if remaining > delta / 2:
        for _ in range(2):  # the second time on the grid that fits the first's answer
            least = min(least, _loss_distribution(mechanisms, remaining, least))
    if not math.isfinite(least):
        raise ConfigError(f"no epsilon at delta = {delta} can be computed for {mechanisms[0]}; take more noise.")
    return least


def _renyi(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """Return the bound by Renyi DP; infinite where floats do not hold it."""
    from dp_accounting import dp_event, rdp

    accountant = rdp.RdpAccountant(_ORDERS)
    for each in mechanisms:
        gaussian = dp_event.GaussianDpEvent(each.noise)
        accountant.compose(dp_event.PoissonSampledDpEvent(each.rate, gaussian), each.steps)
    found = float(accountant.get_epsilon(delta))
    return math.inf if math.isnan(found) else found


def _loss_distribution(mechanisms: tuple[Mechanism, ...], delta: float, scale: float) -> float:
    """Return the bound by PLD, on a grid for an epsilon of about `scale`; infinite where numbers fail.

    The grid widens a step's loss by its interval at most, so the sum of n by sqrt(n) of it.
    """
    from dp_accounting.pld import privacy_loss_distribution as pld

    steps = sum(each.steps for each in mechanisms)
    span = max(0.5 / each.noise**2 + 20.0 / each.noise for each in mechanisms)
    interval = max(min(0.001, 0.01 / math.sqrt(steps)) * scale, span / _MOST_BINS)
    try:
        with np.errstate(over="raise", divide="raise", invalid="raise"):
            total = pld.identity(value_discretization_interval=interval)
            for each in mechanisms:
                one = pld.from_gaussian_mechanism(
                    each.noise, value_discretization_interval=interval, sampling_prob=each.rate
                )
                total = total.compose(one.self_compose(each.steps))
            return float(total.get_epsilon_for_delta(delta))
    except (ValueError, ArithmeticError):  # numbers beyond a float: the other bound stands
        return math.inf


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Return the first number from `low` at which something holds that holds from there on, at `high` surely."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _noise(place: int) -> float:
    """Return the number of four digits at a place among all of them in order: 0 is 1.000."""
    exponent, digits = divmod(place, 9000)
    return float(f"{1000 + digits}e{exponent - 3}")


def _place(noise: float) -> int:
    """Return the place of a power of ten."""
    return 9000 * round(math.log10(noise))
