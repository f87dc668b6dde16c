"""Folding updates into a state: pure functions, one tensor in memory at a time."""

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Protocol

import numpy as np

from wardround.config.aggregation import AggregationConfig
from wardround.config.correction import VARIATE
from wardround.server.optimisers import KINDS, advance
from wardround.update import Array, State


class Read(Protocol):
    """What gives one tensor of one site's delta, or some of its first axis."""

    def __call__(self, site: str, name: str, part: slice = ..., /) -> Array:
        """Return the tensor `name` of a site's delta; of a scalar, there is only the whole."""


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


def fold(state: State, server: State, delta: Callable[[str], Array], config: AggregationConfig) -> tuple[State, State]:
    """Return the next state and the server optimiser's next tensors; `delta` gives one tensor's folded delta.

    state += learning_rate * step, where the step is the optimiser's: with sgd without momentum the delta
    itself. Arithmetic is in float64; what is kept is of the state's own type, and float32 for the optimiser.
    """
    new_state: State = {}
    new_server: State = {}
    for name, old in state.items():
        before = {kind: server[f"{kind}{name}"] for kind in KINDS[config.optimiser] if f"{kind}{name}" in server}
        step, after = advance(delta(name), before, config)
        new_server |= {f"{kind}{name}": array.astype(np.float32) for kind, array in after.items()}
        new_state[name] = (old.astype(np.float64) + config.learning_rate * step).astype(old.dtype)
    return new_state, new_server


def with_variates(state: State, server: State) -> State:
    """Return a state with the server's control variates beside it, as SCAFFOLD sends it; at first they are zero."""
    names = {name: f"{VARIATE}{name}" for name in state}
    return state | {mine: server.get(mine, np.zeros_like(state[name])) for name, mine in names.items()}


def next_variates(read: Read, sites: Iterable[str], members: int, state: State, server: State) -> State:
    """Return the server's control variates after a round: c + |S| / N * mean of the sites' changes.

    SCAFFOLD, Karimireddy et al. 2020 (arXiv:1910.06378), Algorithm 1, line 17; N is `members`, absent or not.
    """
    alike = dict.fromkeys(sites, 1.0)
    before = with_variates(state, server)
    return {
        name: (before[name] + len(alike) / members * weighted_mean(read, alike, name)).astype(before[name].dtype)
        for name in sorted(before.keys() - state.keys())
    }
