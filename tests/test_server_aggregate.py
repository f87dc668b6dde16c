"""Folding, by hand-computed numbers."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wardround.config.federation import AggregationConfig
from wardround.server.aggregate import fold, weighted_mean
from wardround.update import Array

DELTAS = {
    "lyon": np.array([1.0, -2.0], np.float32),
    "oslo": np.array([4.0, 0.5], np.float32),
    "wien": np.array([0.0, 9.0], np.float32),
}


def read(site: str, name: str) -> Array:
    return DELTAS[site]


def test_the_mean_weighs_each_site() -> None:
    # (1 * 1 + 3 * 4) / 4 = 3.25; (1 * -2 + 3 * 0.5) / 4 = -0.125
    assert weighted_mean(read, {"lyon": 1.0, "oslo": 3.0}, "w").tolist() == [3.25, -0.125]


def test_fedavg_adds_the_mean_and_keeps_no_velocity() -> None:
    state = {"w": np.array([10.0, 20.0], np.float32)}
    new, velocity = fold(state, {}, partial(weighted_mean, read, {"lyon": 1.0, "oslo": 3.0}), AggregationConfig())
    assert new["w"].tolist() == [13.25, 19.875]
    assert new["w"].dtype == np.float32
    assert velocity == {}


def test_server_momentum_carries_the_mean_from_round_to_round() -> None:
    config = AggregationConfig(momentum=0.5, learning_rate=2.0)
    mean = partial(weighted_mean, read, {"lyon": 1.0})
    state, velocity = fold({"w": np.zeros(2, np.float32)}, {}, mean, config)
    assert state["w"].tolist() == [2.0, -4.0]
    state, velocity = fold(state, velocity, mean, config)
    # v = 0.5 * [1, -2] + [1, -2] = [1.5, -3]; state = [2, -4] + 2 * v
    assert velocity["w"].tolist() == [1.5, -3.0]
    assert state["w"].tolist() == [5.0, -10.0]


@given(st.permutations(["lyon", "oslo", "wien"]))
def test_the_order_of_arrival_changes_no_bit(order: list[str]) -> None:
    deltas = {
        site: np.random.default_rng(number).normal(size=50).astype(np.float32) for number, site in enumerate("abc")
    }
    names = dict(zip(sorted(order), "abc", strict=True))
    weights = {site: 1.0 + 0.1 * len(site) + ord(site[0]) / 7 for site in order}
    first = weighted_mean(lambda site, _: deltas[names[site]], weights, "w")
    again = weighted_mean(lambda site, _: deltas[names[site]], dict(sorted(weights.items())), "w")
    assert first.tobytes() == again.tobytes()


def test_equal_weights_are_the_plain_mean_in_float64() -> None:
    expected = np.mean([delta.astype(np.float64) for delta in DELTAS.values()], axis=0)
    assert weighted_mean(read, dict.fromkeys(DELTAS, 5.0), "w") == pytest.approx(expected, rel=1e-15)
