"""The mean and the server's optimisers: by hand-computed numbers, and beside Flower's and torch's."""

from typing import Any

import numpy as np
import pytest
import torch
from flower_replies import replies
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedYogi
from hypothesis import given
from hypothesis import strategies as st

from wardround.config.aggregation import AggregationConfig
from wardround.server.aggregate import fold, weighted_mean
from wardround.server.optimisers import advance
from wardround.update import Array, State

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
    mean = weighted_mean(read, {"lyon": 1.0, "oslo": 3.0}, "w")
    new, velocity = fold("w", np.array([10.0, 20.0], np.float32), {}, mean, AggregationConfig())
    assert new.tolist() == [13.25, 19.875]
    assert new.dtype == np.float32
    assert velocity == {}


def test_server_momentum_carries_the_mean_from_round_to_round() -> None:
    config = AggregationConfig(momentum=0.5, learning_rate=2.0)
    mean = weighted_mean(read, {"lyon": 1.0}, "w")
    state, velocity = fold("w", np.zeros(2, np.float32), {}, mean, config)
    assert state.tolist() == [2.0, -4.0]
    state, velocity = fold("w", state, velocity, mean, config)
    # v = 0.5 * [1, -2] + [1, -2] = [1.5, -3]; state = [2, -4] + 2 * v
    assert velocity["w"].tolist() == [1.5, -3.0]
    assert state.tolist() == [5.0, -10.0]


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


def test_flowers_fedavg_gives_the_same_mean() -> None:
    weights = {"lyon": 10.0, "oslo": 30.0, "wien": 2.0}
    theirs, _ = FedAvg().aggregate_train(1, replies({site: {"w": DELTAS[site]} for site in DELTAS}, weights))
    assert theirs is not None
    np.testing.assert_allclose(theirs["w"].numpy(), weighted_mean(read, weights, "w"), rtol=1e-6)


# Algorithm 2 of Reddi et al. by hand, for deltas 2 and then -4: the second moment begins at tau squared, 1.
BY_HAND = {
    # m = 0.5 * 2 = 1, v = 0.75 * 1 + 0.25 * 4 = 1.75; m = 0.5 - 2 = -1.5, v = 0.75 * 1.75 + 0.25 * 16 = 5.3125
    "adam": [(1.0, 1.75), (-1.5, 5.3125)],
    # v = 1 - 0.25 * 4 * sign(1 - 4) = 2; v = 2 - 0.25 * 16 * sign(2 - 16) = 6
    "yogi": [(1.0, 2.0), (-1.5, 6.0)],
    # v = 1 + 4 = 5; v = 5 + 16 = 21; without a first moment
    "adagrad": [(2.0, 5.0), (-4.0, 21.0)],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_adaptive_optimisers_are_algorithm_2(name: Any) -> None:
    betas = {} if name == "adagrad" else {"betas": (0.5, 0.75)}
    config = AggregationConfig(optimiser=name, tau=1.0, learning_rate=0.5, **betas)
    state, server = np.array([10.0], np.float32), State()
    expected = 10.0
    for delta, (first, second) in zip((2.0, -4.0), BY_HAND[name], strict=True):
        state, server = fold("w", state, server, np.array([delta]), config)
        expected += 0.5 * first / (second**0.5 + 1.0)
        assert state.tolist() == pytest.approx([expected], rel=1e-6)
        assert server["v.w"].tolist() == [second]
        assert all(array.dtype == np.float32 for array in [state, *server.values()])
    assert server.keys() == ({"v.w"} if name == "adagrad" else {"m.w", "v.w"})


def test_yogi_lowers_its_second_moment_by_no_more_than_the_delta() -> None:
    config = AggregationConfig(optimiser="yogi", betas=(0.0, 0.75), tau=1.0)
    _, after = advance(np.array([0.5]), {}, config)
    assert after["v."].tolist() == [1.0 - 0.25 * 0.25]  # 1 > 0.25: down; Adam's would be 0.75 + 0.0625
    _, after = advance(np.array([1.0]), {}, config)
    assert after["v."].tolist() == [1.0]  # equal: sign 0


def flowers(strategy: Any, deltas: list[Array]) -> Array:
    """Return where a strategy of Flower's ends from zero when every site moves by these deltas."""
    state = np.zeros_like(deltas[0])
    for round, delta in enumerate(deltas, start=1):
        strategy.current_arrays = {"w": state}
        arrays, _ = strategy.aggregate_train(round, replies({"lyon": {"w": state + delta}}, {"lyon": 1.0}))
        state = arrays["w"].numpy()
    return state


def ours(name: Any, deltas: list[Array], second: float | None, **keys: Any) -> Array:
    """Return where ours ends; `second` is what the second moment begins with, unset tau squared."""
    state = np.zeros_like(deltas[0])
    server: State = {} if second is None else {"v.w": np.full_like(deltas[0], second)}
    for delta in deltas:
        config = AggregationConfig(optimiser=name, tau=0.1, learning_rate=0.5, **keys)
        state, server = fold("w", state, server, delta, config)
    return state


MOVES = [np.array([0.3, -0.05, 2.0]), np.array([0.1, 0.4, -1.0])]


def test_flowers_yogi_and_adagrad_are_algorithm_2_but_begin_at_zero() -> None:
    adagrad = flowers(FedAdagrad(eta=0.5, tau=0.1), MOVES)
    yogi = flowers(FedYogi(eta=0.5, beta_1=0.9, beta_2=0.99, tau=0.1), MOVES)
    np.testing.assert_allclose(ours("adagrad", MOVES, second=0.0), adagrad, rtol=1e-6)
    np.testing.assert_allclose(ours("yogi", MOVES, second=0.0), yogi, rtol=1e-6)
    # From tau squared, as the paper has it, small deltas take smaller steps than that.
    assert abs(ours("adagrad", MOVES[:1], None)[1]) < 0.8 * abs(flowers(FedAdagrad(eta=0.5, tau=0.1), MOVES[:1])[1])
    assert abs(ours("yogi", MOVES[:1], None)[1]) < 0.6 * abs(flowers(FedYogi(eta=0.5, tau=0.1), MOVES[:1])[1])


def test_flowers_adam_corrects_a_bias_that_algorithm_2_does_not_and_counts_one_round_ahead() -> None:
    theirs = flowers(FedAdam(eta=0.5, beta_1=0.9, beta_2=0.99, tau=0.1), MOVES[:1])
    from_zero = ours("adam", MOVES[:1], second=0.0)
    correction = (1 - 0.99**2) ** 0.5 / (1 - 0.9**2)  # Adam's own (Kingma and Ba 2015, section 2) has power 1 here
    np.testing.assert_allclose(theirs, correction * from_zero, rtol=1e-6)
    assert not np.allclose(theirs, ours("adam", MOVES[:1], None), rtol=0.1)


def test_torchs_adam_takes_a_first_step_of_the_rate_whatever_the_delta() -> None:
    weights = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    theirs = torch.optim.Adam([weights], lr=0.5, betas=(0.9, 0.99))
    weights.grad = -torch.from_numpy(MOVES[0])
    theirs.step()
    assert weights.detach().numpy() == pytest.approx([0.5, -0.5, 0.5])
    mine = ours("adam", MOVES[:1], None)
    expected = 0.5 * 0.1 * MOVES[0] / (np.sqrt(0.99 * 0.1**2 + 0.01 * MOVES[0] ** 2) + 0.1)
    np.testing.assert_allclose(mine, expected, rtol=1e-12)
    assert abs(mine[2]) > 10 * abs(mine[1])
