"""Folding updates into a state: pure functions, one tensor in memory at a time."""

from collections.abc import Callable, Mapping
from functools import reduce

import numpy as np

from wardround.config.federation import AggregationConfig
from wardround.update import Array, State

Read = Callable[[str, str], Array]  # (site, tensor name) -> delta


def weighted_mean(read: Read, weights: Mapping[str, float], name: str) -> Array:
    """Return one tensor's mean delta over the sites, in float64 (FedAvg, McMahan et al. 2017, Algorithm 1).

    Sums in the order of the sites' names, so that the order of arrival cannot change a bit.

    >>> deltas = {"lyon": np.array([0.0]), "oslo": np.array([4.0])}
    >>> weighted_mean(lambda site, name: deltas[site], {"oslo": 3.0, "lyon": 1.0}, "w")
    array([3.])
    """
    total = sum(weights[site] for site in sorted(weights))
    mean: Array = reduce(
        np.add, (read(site, name).astype(np.float64) * (weights[site] / total) for site in sorted(weights))
    )
    return mean


def fold(state: State, velocity: State, mean: Callable[[str], Array], config: AggregationConfig) -> tuple[State, State]:
    """Return the next state and the server optimiser's next velocity; `mean` gives one tensor's mean delta.

    The optimiser is SGD on the mean delta: v = momentum * v + mean; state += learning_rate * v.
    Rate 1 without momentum is FedAvg; with momentum, FedAvgM (Hsu et al. 2019, equation 2).
    An empty `velocity` is zero; without momentum none is kept.
    """
    new_state: State = {}
    new_velocity: State = {}
    for name, old in state.items():
        step = mean(name)
        if config.momentum:
            step = step + config.momentum * velocity.get(name, np.zeros_like(old)).astype(np.float64)
            new_velocity[name] = step.astype(np.float32)
        new_state[name] = (old.astype(np.float64) + config.learning_rate * step).astype(old.dtype)
    return new_state, new_velocity
