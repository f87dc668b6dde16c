"""Rules that a few sites cannot bend: medians, trimmed means, Krum, and a bound on each delta's norm.

Each reads the spooled updates block by block: what is in memory of all sites at once stays under a
budget, whatever their number. Sites come in the order of their names.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from wardround.config.aggregation import AggregationConfig, trimmed
from wardround.errors import ConfigError
from wardround.server.aggregate import Read, weighted_mean
from wardround.update import Array, Layout

MEMORY_BUDGET = 256 * 2**20  # bytes of all sites at once; at the least, one row of a tensor's first axis
_NUMBER = 8  # bytes: blocks are float64

Floats = NDArray[np.float64]


def folded(
    read: Read, weights: Mapping[str, float], layout: Layout, config: AggregationConfig
) -> tuple[Callable[[str], Array], Mapping[str, float]]:
    """Return a function that gives one tensor of the cohort's delta by the config's rule, in float64; and who counts.

    Those are the weights, or of Krum the sites that it keeps, all alike. Krum and the bound read everything once
    before; the function then reads one tensor of the sites. Raises ConfigError where too few sites are there
    for the rule.
    """
    sites, shapes = sorted(weights), {name: shape for name, (shape, _) in layout.items()}
    if len(sites) < config.least_sites:
        raise ConfigError(
            f"[aggregation] rule = '{config.rule}' folds no fewer than {config.least_sites} updates with these keys, "
            f"and {len(sites)} sites gave one; remove the round's folder and start again with more sites."
        )
    if config.norm_bound is not None:
        read = bounded(read, {site: norm(read, site, shapes) for site in sites}, config.norm_bound)
    if config.rule == "median":
        return lambda name: coordinatewise(read, sites, name, shapes[name], median), weights
    if config.trim is not None:
        cut = trimmed(len(sites), config.trim)
        return lambda name: coordinatewise(read, sites, name, shapes[name], partial(trimmed_mean, cut=cut)), weights
    if config.byzantine is not None:
        chosen = krum(squared_distances(read, sites, shapes), config.byzantine, config.keep or 1)
        weights = {sites[place]: 1.0 for place in chosen}
    return partial(weighted_mean, read, weights), weights


def median(block: Floats) -> Floats:
    """Return the median over the sites of each number: [sites, ...] -> [...] (Yin et al. 2018, definition 1).

    The block's order is lost.
    """
    return np.asarray(np.median(block, axis=0, overwrite_input=True))


def trimmed_mean(block: Floats, cut: int) -> Floats:
    """Return the mean over the sites of each number, without the `cut` lowest and highest: [sites, ...] -> [...].

    Yin et al. 2018 (arXiv:1803.01498), definition 2. The block's order is lost.

    >>> trimmed_mean(np.array([9.0, 1.0, 3.0, -99.0]), cut=1)
    array(2.)
    """
    block.partition((cut, len(block) - cut - 1), axis=0)
    return np.asarray(block[cut : len(block) - cut].mean(axis=0))


def krum(distances: Floats, byzantine: int, keep: int) -> list[int]:
    """Return the places of the `keep` sites with the lowest scores (Blanchard et al. 2017, arXiv:1703.02757).

    A score is the sum of the squared distances to the n - f - 2 nearest others. Equal scores: the first by name.

    distances: [n, n], squared; keep = 1 is Krum.

    >>> line = np.array([0.0, 1.0, 2.1, 3.5, 90.0])
    >>> krum(np.square(line[:, None] - line), byzantine=1, keep=2)
    [1, 2]
    """
    count = len(distances)
    others = np.sort(distances + np.diag(np.full(count, np.inf)), axis=1)  # oneself comes last
    scores = others[:, : count - byzantine - 2].sum(axis=1)
    return sorted(int(place) for place in np.argsort(scores, kind="stable")[:keep])


def squared_distances(read: Read, sites: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> Floats:
    """Return the squared L2 distance of each two sites' deltas, summed tensor by tensor: [n, n]."""
    total = np.zeros((len(sites), len(sites)))
    for name, shape in shapes.items():
        for _, block in blocks(read, sites, name, shape):
            flat = block.reshape(len(sites), -1)
            flat -= flat.mean(axis=0)  # the same for all: the products below then lose no digits to it
            products = flat @ flat.T
            lengths = np.diag(products)
            total += np.maximum(lengths[:, None] + lengths - 2 * products, 0.0)
    return total


def norm(read: Read, site: str, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Return the L2 norm of a site's whole delta."""
    squares = (
        np.square(block).sum() for name, shape in shapes.items() for _, block in blocks(read, [site], name, shape)
    )
    return float(np.sqrt(sum(squares)))


def bounded(read: Read, norms: Mapping[str, float], bound: float) -> Read:
    """Return a function that reads deltas of at most a norm: longer ones are scaled to it, in float64.

    Sun et al. 2019 (arXiv:1911.07963), section 3.
    """

    def shortened(site: str, name: str, *part: slice) -> Array:
        return read(site, name, *part).astype(np.float64) * (bound / max(norms[site], bound))

    return shortened


def coordinatewise(
    read: Read, sites: Sequence[str], name: str, shape: tuple[int, ...], rule: Callable[[Floats], Floats]
) -> Floats:
    """Return one tensor of the given shape, each number by a rule over the sites' numbers at its place."""
    out = np.empty(shape)
    for part, block in blocks(read, sites, name, shape):
        out[part] = rule(block)
    return out


def blocks(
    read: Read, sites: Sequence[str], name: str, shape: tuple[int, ...]
) -> Iterator[tuple[slice | tuple[()], Floats]]:
    """Yield one tensor of all sites, as many rows of its first axis at a time as the budget takes.

    Yields the place in the tensor and the numbers there, [sites, rows, ...]; () and [sites] of a scalar.
    Blocks share their memory: take what is needed before the next.
    """
    if not shape:
        yield (), np.array([read(site, name) for site in sites], np.float64)
        return
    row = max(1, math.prod(shape[1:])) * len(sites) * _NUMBER
    rows = max(1, min(shape[0], MEMORY_BUDGET // row))
    memory = np.empty(rows * row // _NUMBER)
    for first in range(0, shape[0], rows):
        part = slice(first, min(first + rows, shape[0]))
        block = memory[: (part.stop - first) * row // _NUMBER].reshape(len(sites), -1, *shape[1:])
        for place, site in enumerate(sites):
            block[place] = read(site, name, part)
        yield part, block
