"""The server's optimisers: from the round's folded delta, and what they keep, to the step.

Adam, Yogi and Adagrad are Algorithm 2 of Reddi et al. 2021 (arXiv:2003.00295): no bias correction, and
a second moment that begins at tau squared.
"""

from collections.abc import Mapping

import numpy as np

from wardround.config.aggregation import AggregationConfig
from wardround.update import Array

VELOCITY, FIRST, SECOND = "", "m.", "v."  # what stands before a tensor's name in the checkpoint
KINDS = {"sgd": (VELOCITY,), "adam": (FIRST, SECOND), "yogi": (FIRST, SECOND), "adagrad": (SECOND,)}


def kinds(config: AggregationConfig) -> tuple[str, ...]:
    """Return what an optimiser keeps of each tensor, float32 of its shape: the keys of what `advance` returns."""
    return () if config.optimiser == "sgd" and not config.momentum else KINDS[config.optimiser]


def advance(delta: Array, before: Mapping[str, Array], config: AggregationConfig) -> tuple[Array, dict[str, Array]]:
    """Return one tensor's step, before the learning rate, and what the optimiser keeps of it, in float64.

    `before` is what it kept, by kind; empty in the first round.

    >>> config = AggregationConfig(momentum=0.5)
    >>> advance(np.array([1.0]), {"": np.array([4.0])}, config)
    (array([3.]), {'': array([3.])})
    """
    kept = {kind: array.astype(np.float64) for kind, array in before.items()}
    if config.optimiser == "sgd":
        return _sgd(delta, kept, config.momentum)
    first = kept.get(FIRST, 0.0)
    second = kept.get(SECOND, np.full_like(delta, config.tau**2, dtype=np.float64))
    square = np.square(delta)
    decay, slow = config.betas
    if config.optimiser == "adagrad":  # without the first moment, as in the paper's experiments
        second = second + square
        return delta / (np.sqrt(second) + config.tau), {SECOND: second}
    if config.optimiser == "yogi":
        second = second - (1 - slow) * square * np.sign(second - square)
    else:
        second = slow * second + (1 - slow) * square
    first = decay * first + (1 - decay) * delta
    return first / (np.sqrt(second) + config.tau), {FIRST: first, SECOND: second}


def _sgd(delta: Array, kept: Mapping[str, Array], momentum: float) -> tuple[Array, dict[str, Array]]:
    """Return v = momentum * v + delta, twice; none is kept without momentum (FedAvgM, Hsu et al. 2019)."""
    if not momentum:
        return delta, {}
    velocity = delta + momentum * kept.get(VELOCITY, np.zeros_like(delta))
    return velocity, {VELOCITY: velocity}
