"""Folding updates into a state: pure functions, one tensor in memory at a time."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np

from wardround.config.aggregation import AggregationConfig
from wardround.config.correction import VARIATE
from wardround.server.optimisers import advance, kinds
from wardround.update import Array, Layout, State


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
    first, *others = sorted(weights)
    total = sum(weights[site] for site in sorted(weights))
    mean = np.asarray(np.multiply(read(first, name), weights[first] / total, dtype=np.float64))
    for site in others:
        mean += np.multiply(read(site, name), weights[site] / total, dtype=np.float64)
    return mean


def fold(
    name: str, old: Array, server: Mapping[str, Array], delta: Array, config: AggregationConfig
) -> tuple[Array, State]:
    """Return one tensor of the next state, and the server optimiser's next tensors of it, from its folded delta.

    state += learning_rate * step, where the step is the optimiser's: with sgd without momentum the delta
    itself. Arithmetic is in float64; what is kept is of the state's own type, and float32 for the optimiser.
    """
    before = {kind: server[f"{kind}{name}"] for kind in kinds(config) if f"{kind}{name}" in server}
    step, after = advance(delta, before, config)
    kept = {f"{kind}{name}": array.astype(np.float32) for kind, array in after.items()}
    return np.asarray((old.astype(np.float64) + config.learning_rate * step).astype(old.dtype)), kept


def with_variates(state: Mapping[str, Array], server: Mapping[str, Array]) -> State:
    """Return a state with the server's control variates beside it, as SCAFFOLD sends it; at first they are zero."""
    names = {name: f"{VARIATE}{name}" for name in state}
    return {**state} | {mine: _variate(state[name], server, mine) for name, mine in names.items()}


def variates_layout(layout: Layout) -> Layout:
    """Return the layout of a state's control variates."""
    return {f"{VARIATE}{name}": place for name, place in layout.items()}


def next_variates(
    read: Read, sites: Iterable[str], members: int, state: Mapping[str, Array], server: Mapping[str, Array]
) -> Iterator[tuple[str, Array]]:
    """Yield the server's control variates after a round: c + |S| / N * mean of the sites' changes.

    SCAFFOLD, Karimireddy et al. 2020 (arXiv:1910.06378), Algorithm 1, line 17; N is `members`, absent or not.
    """
    alike = dict.fromkeys(sites, 1.0)
    for name in sorted(state):
        mine = f"{VARIATE}{name}"
        before = _variate(state[name], server, mine)
        yield mine, (before + len(alike) / members * weighted_mean(read, alike, mine)).astype(before.dtype)


def _variate(tensor: Array, server: Mapping[str, Array], mine: str) -> Array:
    """Return a tensor's control variate, zero at first."""
    return server[mine] if mine in server else np.zeros_like(tensor)
