"""Rules that a few sites cannot bend: by hand, beside Flower's own, and under a fixed memory budget."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny
from flower_replies import replies
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum, MultiKrum
from flwr.serverapp.strategy.multikrum import compute_distances
from honest_sites import SITES, Sites, ignore, make_run

from wardround.config.aggregation import AggregationConfig
from wardround.errors import ConfigError
from wardround.server import robust
from wardround.server.robust import bounded, folded, krum, norm, squared_distances
from wardround.server.rounds import run_rounds
from wardround.server.spool import Spool
from wardround.update import Array, State, Task, Update, layout, unpack


def reader(deltas: dict[str, State]) -> Any:
    return lambda site, name, *part: deltas[site][name][part] if part else deltas[site][name]


def drawn(sites: int, seed: int = 0) -> dict[str, State]:
    """Return deltas of so many sites: a matrix, a vector and a scalar each."""
    draw = np.random.default_rng(seed)
    shapes = {"a.weight": (7, 3), "a.bias": (5,), "scale": ()}
    return {
        f"s{place:03d}": {name: np.asarray(draw.normal(size=shape), np.float32) for name, shape in shapes.items()}
        for place in range(sites)
    }


def result(deltas: dict[str, State], **keys: Any) -> State:
    """Return the folded delta of all sites, which weigh alike."""
    config = AggregationConfig(weights="uniform", **keys)
    state = next(iter(deltas.values()))
    delta, _ = folded(reader(deltas), dict.fromkeys(deltas, 1.0), layout(state), config)
    return {name: delta(name) for name in state}


RULES: dict[str, dict[str, Any]] = {
    "median": {"rule": "median"},
    "trimmed_mean": {"rule": "trimmed_mean", "trim": 0.2},
    "krum": {"rule": "krum", "byzantine": 1},
    "multi_krum": {"rule": "multi_krum", "byzantine": 1, "keep": 3},
}


def test_the_median_and_the_trimmed_mean_are_of_each_number_by_itself() -> None:
    deltas = {
        "a": {"w": np.array([1.0, 50.0])},
        "b": {"w": np.array([2.0, 6.0])},
        "c": {"w": np.array([90.0, 4.0])},
        "d": {"w": np.array([4.0, 5.0])},
    }
    assert result(deltas, rule="median")["w"].tolist() == [3.0, 5.5]
    assert result(deltas, rule="trimmed_mean", trim=0.25)["w"].tolist() == [3.0, 5.5]
    deltas["e"] = {"w": np.array([7.0, -80.0])}
    assert result(deltas, rule="median")["w"].tolist() == [4.0, 5.0]
    # Without the lowest and the highest: (2 + 4 + 7) / 3 and (4 + 5 + 6) / 3.
    assert result(deltas, rule="trimmed_mean", trim=0.25)["w"].tolist() == pytest.approx([13 / 3, 5.0])


def test_krum_takes_the_update_with_the_closest_others() -> None:
    # On a line, n = 5 and f = 1: each score has the 5 - 1 - 2 = 2 nearest.
    # 0: 1 + 4.41; 1: 1 + 1.21; 2.1: 1.21 + 1.96; 3.5: 1.96 + 6.25; 90: far.
    deltas = {site: {"w": np.array([x])} for site, x in zip("abcde", (0.0, 1.0, 2.1, 3.5, 90.0), strict=True)}
    assert result(deltas, rule="krum", byzantine=1)["w"].tolist() == [1.0]
    assert result(deltas, rule="multi_krum", byzantine=1, keep=2)["w"].tolist() == [1.55]


def test_equal_scores_go_to_the_first_site_by_name() -> None:
    square = np.array([[0.0, 1, 1, 2], [1, 0, 2, 1], [1, 2, 0, 1], [2, 1, 1, 0]])
    assert krum(square, byzantine=0, keep=1) == [0]
    assert krum(square, byzantine=0, keep=3) == [0, 1, 2]


def test_distances_are_those_of_the_whole_delta() -> None:
    deltas = drawn(6)
    flat = np.stack([np.concatenate([a.ravel() for a in own.values()]) for own in deltas.values()]).astype(np.float64)
    expected = np.square(flat[:, None] - flat[None]).sum(axis=2)
    shapes = {name: a.shape for name, a in deltas["s000"].items()}
    np.testing.assert_allclose(squared_distances(reader(deltas), sorted(deltas), shapes), expected, atol=1e-12)


def test_a_long_delta_is_scaled_to_the_bound_before_the_rule_and_a_short_one_is_not() -> None:
    deltas = {"a": {"w": np.array([3.0]), "b": np.array([[4.0]])}, "b": {"w": np.array([1.0]), "b": np.array([[0.5]])}}
    read, shapes = reader(deltas), {"w": (1,), "b": (1, 1)}
    assert norm(read, "a", shapes) == 5.0
    found = bounded(read, {site: norm(read, site, shapes) for site in deltas}, 2.5)
    assert [found("a", name).item() for name in ("w", "b")] == [1.5, 2.0]
    assert [found("b", name).item() for name in ("w", "b")] == [1.0, 0.5]
    mean = result(deltas, norm_bound=2.5)
    assert [mean[name].item() for name in ("w", "b")] == [1.25, 1.25]


@pytest.mark.parametrize("keys", [*RULES.values(), {"norm_bound": 20.0}], ids=str)
def test_one_site_of_seven_that_sends_anything_cannot_take_the_result_away(keys: dict[str, Any]) -> None:
    honest = drawn(6)
    wild = {name: np.full_like(a, 1e6) for name, a in honest["s000"].items()}
    for name, found in result({**honest, "s999": wild}, **keys).items():
        assert np.abs(found).max() < 5.0, name
    assert result({**honest, "s999": wild})["scale"] > 1e5  # as the mean


@pytest.mark.parametrize("keys", RULES.values(), ids=RULES)
def test_the_order_of_arrival_changes_no_bit(keys: dict[str, Any]) -> None:
    deltas = drawn(7)
    first, again = result(deltas, **keys), result(dict(reversed(deltas.items())), **keys)
    assert {name: a.tobytes() for name, a in first.items()} == {name: a.tobytes() for name, a in again.items()}


@pytest.mark.parametrize(
    ("keys", "strategy"),
    [
        (RULES["median"], FedMedian()),
        (RULES["trimmed_mean"], FedTrimmedAvg(beta=0.2)),
        (RULES["krum"], Krum(num_malicious_nodes=1)),
        (RULES["multi_krum"], MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3)),
    ],
    ids=RULES,
)
@pytest.mark.parametrize("sites", [7, 8])
def test_flowers_rules_give_the_same(keys: dict[str, Any], strategy: Any, sites: int) -> None:
    deltas = drawn(sites, seed=sites)
    theirs, _ = strategy.aggregate_train(1, replies(deltas, dict.fromkeys(deltas, 9.0)))
    for name, found in result(deltas, **keys).items():
        np.testing.assert_allclose(found, theirs[name].numpy(), rtol=1e-5, atol=1e-6)


def test_flowers_multi_krum_lets_a_site_weigh_itself_and_ours_does_not() -> None:
    deltas = {site: {"w": np.array([x])} for site, x in zip("abcde", (0.0, 1.0, 2.1, 3.5, 90.0), strict=True)}
    claims = dict.fromkeys(deltas, 1.0) | {"c": 1e6}
    theirs, _ = MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2).aggregate_train(1, replies(deltas, claims))
    assert theirs is not None
    assert theirs["w"].numpy() == pytest.approx(2.1, abs=1e-3)
    assert result(deltas, rule="multi_krum", byzantine=1, keep=2)["w"].tolist() == [1.55]  # the paper's plain mean


def test_flowers_krum_measures_whole_states_in_float32_where_small_deltas_vanish() -> None:
    """Its squared distances are differences of squared norms; ours are of the deltas alone, in float64."""
    base = np.full(1000, 3.0, np.float32)
    deltas = {site: {"w": np.full(1000, x, np.float32)} for site, x in zip("abcde", (1, 2, 3, 4, 5), strict=True)}
    states = {site: {"w": base + 1e-4 * own["w"]} for site, own in deltas.items()}
    arrays = [message.content["arrays"] for message in replies(states, dict.fromkeys(states, 1.0))]
    theirs = compute_distances(arrays)  # type: ignore[arg-type]
    ours = 1e-8 * squared_distances(reader(deltas), sorted(deltas), {"w": (1000,)})
    assert ours[0, 4] == pytest.approx(1000 * (4 * 1e-4) ** 2)
    assert np.abs(theirs - ours).max() > ours.max()  # the error alone is larger than any distance


@pytest.mark.parametrize("keys", [*RULES.values(), {"norm_bound": 2.0}], ids=str)
def test_a_tensor_over_the_budget_is_taken_in_parts_with_the_same_result(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = drawn(7)
    whole = result(deltas, **keys)
    budget = 2 * 7 * 3 * 8  # two rows of the matrix, of all sites
    held = []

    def kept(read: Any, sites: Any, name: str, shape: Any, real: Any = robust.blocks) -> Any:
        for part, block in real(read, sites, name, shape):
            held.append(block.nbytes)
            yield part, block

    monkeypatch.setattr(robust, "MEMORY_BUDGET", budget)
    monkeypatch.setattr(robust, "blocks", kept)
    cut = result(deltas, **keys)
    assert max(held) <= budget and len(held) > 3
    for name, array in whole.items():
        np.testing.assert_allclose(cut[name], array, rtol=1e-14, atol=0)


@pytest.mark.parametrize("keys", RULES.values(), ids=RULES)
def test_peak_memory_does_not_grow_with_the_number_of_sites(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robust, "MEMORY_BUDGET", 200_000)
    shape = (2_000, 10)  # 80 kB of a site, 32 MB of 200 sites in float64
    state = {"w": np.zeros(shape, np.float32)}

    def read(site: str, name: str, *part: slice) -> Array:
        rows = np.arange(shape[0], dtype=np.float32)[part or slice(None)]
        return np.sin(rows * float(site))[:, None] * np.ones((1, 10), np.float32)

    def peak(sites: int) -> int:
        config = AggregationConfig(weights="uniform", **keys)
        tracemalloc.start()
        delta, _ = folded(read, {f"{place + 1:03d}": 1.0 for place in range(sites)}, layout(state), config)
        delta("w")
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    few, many = peak(10), peak(200)
    distances = 6 * 200 * 200 * 8 if "krum" in keys["rule"] else 0  # Krum's matrices are n x n
    assert many < few + 200_000 + distances
    assert many < 1_500_000 + distances


def test_a_run_folds_the_median_of_the_spooled_updates_part_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robust, "MEMORY_BUDGET", 5_000)
    keys = {"rule": "median", "weights": "uniform", "norm_bound": 1e6}
    run = make_run(tmp_path / "run", aggregation=keys, membership={"min_sites": 3}, training={"rounds": 1})
    sent: list[Update] = []

    class Seen(Sites):
        def update(self, site: str, task: Task) -> Update:
            sent.append(super().update(site, task))
            return sent[-1]

    run_rounds(run, Seen(run), ignore)
    before, after = run.checkpoint(0).state, run.checkpoint(1).state
    assert {update.site for update in sent} == set(SITES)
    for name, array in after.items():
        expected = before[name] + np.median([update.delta[name].astype(np.float64) for update in sent], axis=0)
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-6)


UNIFORM = {"weights": "uniform"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aggregation": {"rule": "median"}}, "counts every site alike, but weights = 'images'; set weights ="),
        ({"aggregation": {"rule": "krum", **UNIFORM}}, "rule = 'krum' needs the key 'byzantine'; add it"),
        ({"aggregation": {"trim": 0.1}}, "trim is a key of rule = 'trimmed_mean', not of 'mean'; remove it"),
        ({"aggregation": {"keep": 2, "rule": "krum", "byzantine": 0, **UNIFORM}}, "keep is a key of rule ="),
        ({"aggregation": {"optimiser": "adam", "momentum": 0.9}}, "momentum is a key of optimiser = 'sgd', not of"),
        ({"aggregation": {"optimiser": "adagrad", "betas": [0.5, 0.5]}}, "betas is a key of optimiser = 'adam' or"),
        ({"aggregation": {"optimiser": "adam", "betas": [0.5, 1.0]}}, r"betas = \[0.5, 1.0\]: expected values in"),
        (
            {"aggregation": {"rule": "krum", "byzantine": 1, **UNIFORM}, "membership": {"min_sites": 4}},
            r"folds no fewer than 5 updates with these keys; set \[membership\] min_sites = 5 or more",
        ),
        ({"aggregation": {"rule": "median", **UNIFORM}}, "folds no fewer than 3 updates"),
        (
            {
                "aggregation": {"norm_bound": 1.0, **UNIFORM},
                "privacy": {"unit": "site", "epsilon": 1.0, "delta": 1e-5, "clip": 1.0, "cohort": 5},
            },
            r"by its own clip; set \[aggregation\] rule = 'mean' and remove norm_bound",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny(**changes)


@pytest.mark.parametrize(
    ("keys", "least"),
    [
        ({"rule": "trimmed_mean", "trim": 0.1}, 10),
        ({"rule": "trimmed_mean", "trim": 0.3}, 4),
        ({"rule": "trimmed_mean", "trim": 0.49}, 3),
        ({"rule": "krum", "byzantine": 2}, 7),
        ({"rule": "multi_krum", "byzantine": 2, "keep": 5}, 9),
        ({"rule": "mean"}, 1),
    ],
)
def test_each_rule_says_how_few_sites_it_takes(keys: dict[str, Any], least: int) -> None:
    assert AggregationConfig(weights="uniform", **keys).least_sites == least
    result(drawn(least), **keys)
    if least > 1:
        with pytest.raises(ConfigError, match=f"folds no fewer than {least} updates .* and {least - 1} sites gave one"):
            result(drawn(least - 1), **keys)


def test_the_record_names_the_site_that_krum_kept(tmp_path: Path) -> None:
    kept = {"rule": "krum", "byzantine": 0, "weights": "uniform"}
    run = make_run(tmp_path / "run", aggregation=kept, membership={"min_sites": 3}, training={"rounds": 1})
    sites = Sites(run)
    run_rounds(run, sites, ignore)
    task = Task(1, "", 0, (run.round(0) / "checkpoint" / "state.safetensors").read_bytes())
    moved = {name: new - run.checkpoint(0).state[name] for name, new in run.checkpoint(1).state.items()}
    weights = {site: figures["weight"] for site, figures in run.record(1)["sites"].items()}
    assert sorted(weights.values()) == [0.0, 0.0, 1.0]
    deltas = {site: sites.update(site, task).delta for site in SITES}
    for name, change in moved.items():
        mean = sum(weights[site] * deltas[site][name].astype(np.float64) for site in SITES)
        np.testing.assert_allclose(change, mean, atol=1e-5)


def test_the_server_reads_a_spooled_tensor_in_part(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    sites = Sites(run)
    task = Task(1, "", 0, (run.round(0) / "checkpoint" / "state.safetensors").read_bytes())
    block = sites.update("oslo", task).to_bytes()
    spool = Spool(run.round(1))
    spool.add("oslo", block)
    closed = spool.close({}, {}, received={}, sent=0)
    whole, _ = unpack(block)
    name = max(whole, key=lambda one: whole[one].size)
    with spool.reader(closed) as read:
        assert read("oslo", name, slice(1, 3)).tobytes() == whole[name][1:3].tobytes()
        assert read("oslo", name).tobytes() == whole[name].tobytes()
