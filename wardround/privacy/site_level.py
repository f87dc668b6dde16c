"""Privacy of a whole site: its delta is clipped, and noise hides what is left of it.

A round is one Gaussian mechanism on the sum of the clipped deltas: a site more or less moves the sum
by C at the most. Rounds compose without amplification, for who is asked follows from a known seed.
What is divided by is the declared cohort, since the number that answered tells who was there.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wardround.config.privacy import SitePrivacyConfig
from wardround.errors import ConfigError
from wardround.privacy.accounting import Mechanism, calibrate, epsilon
from wardround.update import Array, State

CLIP = "privacy.clip"  # the C that adapts, among the server optimiser's tensors; a state's begin with backbone or head
_RATE = 0.2  # of the norm's steps: eta_C of Andrew et al. 2021, section 3.2


@dataclass(frozen=True)
class Noise:
    """What a round's noise is, as standard deviations."""

    delta: float  # of the noise on the sum of deltas, in units of C: z
    count: float  # of the noise on the count of deltas that fit C; 0 where C is fixed


def noise(config: SitePrivacyConfig, rounds: int) -> Noise:
    """Return the noise of each of so many rounds, which together spend the config's epsilon.

    Where C adapts, sum and count together cost what the sum alone would (Andrew et al. 2021,
    arXiv:1905.03871, theorem 1 and section 3.2: a deviation of cohort / 20 on the count).
    Raises ConfigError where that leaves nothing for the sum.
    """
    whole = _whole(config, rounds)
    if config.clip_quantile is None:
        return Noise(whole, 0.0)
    count = config.cohort / 20
    if 2 * count <= whole:
        raise ConfigError(
            f"[privacy] clip_quantile: the count of {config.cohort} sites would itself spend more than epsilon = "
            f"{config.epsilon} over {rounds} rounds; that takes a cohort above {math.floor(10 * whole)}. Remove it."
        )
    return Noise((whole**-2 - (2 * count) ** -2) ** -0.5, count)


def spent(config: SitePrivacyConfig, rounds: int, done: int) -> float:
    """Return the epsilon after some of the rounds, at the config's delta; add/remove adjacency of a site."""
    if done == 0:
        return 0.0
    return epsilon([Mechanism(rate=1.0, noise=_whole(config, rounds), steps=done)], config.delta)


def privatise(delta: State, config: SitePrivacyConfig, rounds: int) -> State:
    """Return a site's delta, clipped, with noise of its own: what may cross where noise = "site".

    Every call draws fresh noise and is another release, to be paid for. A delta that is not finite
    counts as zero, so that nothing which depends on images stops the round.
    """
    kept = factor(norm(delta.items()), config.clip)
    deviation = noise(config, rounds).delta * config.clip
    return {
        name: (clipped(array, kept) + deviation * _draw(array.shape)).astype(array.dtype)
        for name, array in delta.items()
    }


def noisy_mean(
    read: Callable[[str, str], Array],
    sites: Iterable[str],
    state: Mapping[str, Array],
    config: SitePrivacyConfig,
    rounds: int,
    clip: float,
) -> tuple[Callable[[str], Array], float]:
    """Return a function that gives one tensor of the state's noised mean delta, and the next round's C.

    `read(site, name)` gives one tensor of a site's delta. It is read twice, for the norm and for the
    sum, so that one tensor is in memory at a time. Every call draws fresh noise: publish one result only.
    """
    scale = noise(config, rounds)
    norms = {site: norm((name, read(site, name)) for name in state) for site in sorted(sites)}

    def mean(name: str) -> Array:
        total = scale.delta * clip * _draw(state[name].shape)
        for site, length in norms.items():
            total = total + clipped(read(site, name), factor(length, clip))
        return total / config.cohort

    if config.clip_quantile is None:
        return mean, clip
    chance = scale.count * float(_draw(()))
    return mean, next_clip(clip, norms, config.clip_quantile, config.cohort, chance)


def next_clip(clip: float, norms: Mapping[str, float], quantile: float, cohort: int, chance: float = 0.0) -> float:
    """Return C moved towards the quantile of the norms (Andrew et al. 2021, algorithm 1).

    Each site counts as one half more or less, so that the sum moves by one half where a site comes or
    goes; who is missing counts as neither. `chance` is the noise on the sum.

    >>> next_clip(1.0, {"lyon": 0.5, "oslo": 2.0}, quantile=0.5, cohort=2)
    1.0
    """
    halves = sum(0.5 if length <= clip else -0.5 for length in norms.values())
    share = (halves + chance) / cohort + 0.5
    return clip * math.exp(-_RATE * (share - quantile))


def norm(tensors: Iterable[tuple[str, Array]]) -> float:
    """Return the norm over all tensors, scalars too, in float64. Raises ConfigError for whole numbers."""
    squares = 0.0
    for name, array in tensors:
        if not np.issubdtype(array.dtype, np.floating):
            raise ConfigError(
                f"[privacy] unit = 'site': tensor '{name}' holds {array.dtype}, which takes no Gaussian noise. "
                "Take a method or backbone whose state is of floating-point numbers."
            )
        squares += float(np.square(array, dtype=np.float64).sum())
    return math.sqrt(squares)


def factor(length: float, clip: float) -> float:
    """Return what a delta of some norm is multiplied by to fit C; 0 where the norm is not finite."""
    if not math.isfinite(length):
        return 0.0
    return 1.0 if length <= clip else clip / length * (1 - 1e-12)  # never above C by rounding


def clipped(array: Array, kept: float) -> NDArray[np.float64]:
    """Return a tensor times its delta's factor, in float64; zeros for 0, whatever the tensor holds."""
    return kept * array.astype(np.float64) if kept else np.zeros(array.shape)


def _whole(config: SitePrivacyConfig, rounds: int) -> float:
    """Return a round's noise multiplier if all of the budget goes to the sum."""
    return calibrate(config.epsilon, config.delta, rate=1.0, steps=rounds)


def _draw(shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return standard normal numbers; secure, as one draw a round costs little beside its training."""
    from wardround.privacy.noise import standard_normal  # loads torch, which a server without this noise goes without

    return standard_normal(shape, "secure").numpy().astype(np.float64)
