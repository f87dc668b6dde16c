"""Corrections of a site's drift: by hand, on problems whose answer is known, and through whole rounds."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny, write_labelled
from honest_sites import DECLARED, Cut, Sites, ignore, make_run
from torch import Tensor, nn

from wardround import ssl as methods
from wardround.client import local_round
from wardround.client.app import run_task
from wardround.client.correction import drift, finish, gradient_term, mixed, next_variates, parted, start
from wardround.client.local_round import join, split
from wardround.client.policy import received
from wardround.config import FederationConfig, read_site
from wardround.config.correction import FedEMAConfig, FedProxConfig, FedUConfig, NoCorrectionConfig, ScaffoldConfig
from wardround.encoding import inflate
from wardround.errors import ConfigError
from wardround.plan import resolve
from wardround.server.aggregate import next_variates as servers_variates
from wardround.server.rounds import run_rounds
from wardround.server.run_folder import RunFolder, create
from wardround.simulate import index_sites
from wardround.ssl.engine import Plain
from wardround.ssl.optimiser import learning_rate
from wardround.ssl.pretrain import pretrain
from wardround.update import Refusal, State, Task, Update, state_hash, unpack

CPU = torch.device("cpu")
SGD = {"optimiser": "sgd", "learning_rate": 0.05, "weight_decay": 0.0}
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 1, 16, 16), dtype=np.uint8)


class Weights(nn.Module):
    """Parameters by name, with gradients."""

    def __init__(self, weights: dict[str, list[float]], slopes: dict[str, list[float]]) -> None:
        super().__init__()
        for name, values in weights.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(values, dtype=torch.float64)))
        for name, parameter in self.named_parameters():
            parameter.grad = torch.tensor(slopes[name], dtype=torch.float64) if name in slopes else None

    @property
    def slopes(self) -> dict[str, list[float]]:
        return {name: p.grad.tolist() for name, p in self.named_parameters() if p.grad is not None}


def test_fedprox_pulls_each_travelling_weight_towards_what_came_in() -> None:
    method = Weights({"w": [3.0, 1.0], "stays": [5.0], "unused": [7.0]}, {"w": [1.0, -1.0], "stays": [2.0]})
    incoming = {"w": np.array([1.0, 2.0]), "unused": np.array([0.0])}
    correct = gradient_term(FedProxConfig(name="fedprox", mu=0.5), incoming, {}, {}, CPU)
    assert correct is not None
    correct(method)  # type: ignore[arg-type]  # of a method, it takes parameters by name alone
    # 1 + 0.5 * (3 - 1) and -1 + 0.5 * (1 - 2)
    assert method.slopes == {"w": [2.0, -1.5], "stays": [2.0]}


def test_scaffold_adds_the_servers_variate_and_takes_the_sites_own_away() -> None:
    method = Weights({"w": [3.0, 1.0]}, {"w": [1.0, -1.0]})
    server, own = {"w": np.array([0.5, 0.25])}, {"w": np.array([2.0, -1.0])}
    correct = gradient_term(ScaffoldConfig(name="scaffold"), {"w": np.zeros(2)}, server, own, CPU)
    assert correct is not None
    correct(method)  # type: ignore[arg-type]
    assert method.slopes == {"w": [-0.5, 0.25]}
    # c_i - c + (x - y) / rates = [2, -1] - [0.5, 0.25] + ([1, 1] - [0, 3]) / 0.5
    after = next_variates({"w": np.ones(2)}, server, own, {"w": np.array([0.0, 3.0])}, rates=0.5)
    assert after["w"].tolist() == [3.5, -5.25]


def test_the_servers_variate_moves_by_the_sites_changes_over_all_members() -> None:
    changes = {"lyon": np.array([3.0]), "oslo": np.array([6.0])}
    read: Any = lambda site, name: changes[site] if name == "scaffold.w" else None  # noqa: E731
    server = {"scaffold.w": np.array([1.0]), "w": np.array([99.0])}  # and an optimiser's own
    # 1 + 2/3 * mean(3, 6): wien was not there
    assert dict(servers_variates(read, changes, 3, {"w": np.zeros(1)}, server)) == {"scaffold.w": np.array([4.0])}
    assert dict(servers_variates(read, changes, 3, {"w": np.zeros(1)}, {})) == {"scaffold.w": np.array([3.0])}


CURVES, OPTIMA = {"lyon": 1.0, "oslo": 4.0}, {"lyon": 0.0, "oslo": 10.0}  # of a / 2 * (w - b)^2


def rounds_of_two_sites(
    correction: Any, rounds: int, steps: int = 20, rate: float = 0.1, lost: int | None = None
) -> float:
    """Return where two sites end that each descend their own parabola; the sum's lowest point is at 8.

    Before the round `lost`, one of them loses its site memory.
    """
    state: State = {"w": np.zeros(1)}
    server: State = {}
    own: dict[str, State] = {site: {} for site in CURVES}
    for number in range(rounds):
        if number == lost:
            own["oslo"] = {}
        ends, changes = {}, {}
        for site in CURVES:
            variates = parted(server)[1]
            correct = gradient_term(correction, state, variates, own[site], CPU)
            weights = Weights({"w": state["w"].tolist()}, {})
            for _ in range(steps):
                weights.w.grad = CURVES[site] * (weights.w.detach() - OPTIMA[site])
                if correct is not None:
                    correct(weights)  # type: ignore[arg-type]
                weights.w.data -= rate * weights.w.grad
            ends[site] = weights.w.detach().numpy()
            after = next_variates(state, variates, own[site], {"w": ends[site]}, steps * rate)
            changes[site] = after["w"] - own[site].get("w", 0.0)
            own[site] = after
        server = dict(servers_variates(lambda site, _, changes=changes: changes[site], CURVES, 2, state, server))
        state = {"w": np.asarray(sum(ends.values()) / 2)}
    return float(state["w"].item())


def test_scaffold_reaches_the_optimum_that_fedavg_drifts_away_from_and_fedprox_comes_closer_to() -> None:
    assert rounds_of_two_sites(ScaffoldConfig(name="scaffold"), rounds=60) == pytest.approx(8.0, abs=1e-3)
    plain = rounds_of_two_sites(NoCorrectionConfig(), rounds=60)
    near = rounds_of_two_sites(FedProxConfig(name="fedprox", mu=2.0), rounds=60)
    assert plain < 6.0
    assert plain + 0.5 < near < 8.0


def test_a_variate_that_a_site_lost_stays_in_the_servers_and_pulls_for_good() -> None:
    """The server's variate is no mean of the sites' any more, nor ever again: docs/coordinator.md warns of it."""
    ends = [rounds_of_two_sites(ScaffoldConfig(name="scaffold"), rounds, lost=60) for rounds in (60, 120, 240)]
    assert ends == pytest.approx([8.0, 9.6, 9.6], abs=1e-3)


def test_scaffolds_variate_is_the_mean_gradient_of_the_round_weighted_by_the_schedule() -> None:
    config = tiny(training={**SGD, "correction": {"name": "scaffold"}}, aggregation={"weights": "uniform"})
    method = methods.build(config)
    incoming = methods.get_state(method)
    engine = Plain(method, IMAGES, config, "lyon")
    seen: list[dict[str, Tensor]] = []

    def note(method: methods.Method) -> None:
        seen.append({name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None})

    pretrain(method, engine, 3, 3, {}, "x", note)  # round 2
    own, beside = finish(config.training, 2, incoming, {}, {}, methods.get_state(method))
    rates = [learning_rate(config.training, step) for step in (3, 4, 5)]
    assert rates[0] > 2 * rates[2]
    for name in seen[0]:
        mean = sum(rate * slopes[name].double() for rate, slopes in zip(rates, seen, strict=True)) / sum(rates)
        np.testing.assert_allclose(own[name], mean, rtol=1e-2, atol=2e-5)  # x - y in float32
    assert beside.keys() == {f"scaffold.{name}" for name in incoming}


HERE: State = {"backbone.w": np.array([0.0, 0.0]), "head.predictor.w": np.array([0.0])}
THERE: State = {"backbone.w": np.array([3.0, 4.0]), "head.predictor.w": np.array([100.0])}


def test_fedema_mixes_by_the_encoders_distance_and_the_predictor_with_it() -> None:
    assert drift(HERE, THERE) == 5.0  # the predictor does not count
    half = start(FedEMAConfig(name="fedema", scale=0.1), HERE, THERE)
    assert {name: a.tolist() for name, a in half.items()} == {"backbone.w": [1.5, 2.0], "head.predictor.w": [50.0]}
    far = start(FedEMAConfig(name="fedema", scale=7.0), HERE, THERE)
    assert state_hash(far) == state_hash(THERE)
    first = start(FedEMAConfig(name="fedema", scale=7.0), HERE, {})
    assert state_hash(first) == state_hash(HERE)


def test_mixing_equal_networks_changes_no_bit_and_all_of_one_is_that_one() -> None:
    draw = np.random.default_rng(1)
    here, there = ({"w": draw.normal(size=1000).astype(np.float32)} for _ in range(2))
    assert state_hash(mixed(here, here, 0.3)) == state_hash(here)
    assert state_hash(mixed(here, there, 1.0)) == state_hash(there)


@pytest.mark.parametrize(("threshold", "predictor"), [(5.1, 0.0), (5.0, 100.0)])
def test_fedu_keeps_the_sites_predictor_where_its_encoder_drifted(threshold: float, predictor: float) -> None:
    found = start(FedUConfig(name="fedu", threshold=threshold), HERE, THERE)
    assert found["backbone.w"].tolist() == [0.0, 0.0]
    assert found["head.predictor.w"].tolist() == [predictor]


def test_site_memory_gives_back_each_kind_of_tensor() -> None:
    training = tiny().training
    parts = [{"exp_avg.backbone.w": np.ones(1)}, {"teacher.w": np.zeros(2)}, {"backbone.w": np.full(3, 2.0)}]
    again = split(join(*parts, training))
    assert [list(part) for part in again] == [list(part) for part in parts]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_cut_in_two_ends_bit_equal(momentum: float) -> None:
    config = tiny(training={**SGD, "local_momentum": momentum})

    def train(spans: list[tuple[int, int]]) -> str:
        state, moments = methods.get_state(methods.build(config)), {}
        for first, steps in spans:
            method = methods.build(config)
            methods.set_state(method, state)
            engine = Plain(method, IMAGES, config, "lyon")
            moments = pretrain(method, engine, first, steps, moments, "x").moments
            state = methods.get_state(method)
        assert {name.partition(".")[0] for name in moments} == ({"momentum_buffer"} if momentum else set())
        return state_hash(state)

    assert train([(0, 6)]) == train([(0, 2), (2, 4)])


BYOL = {"name": "byol", "hidden_dim": 16, "output_dim": 8}
RUNS: dict[str, dict[str, Any]] = {
    "fedprox": {"training": {"correction": {"name": "fedprox", "mu": 0.1}}},
    "scaffold": {"training": {**SGD, "correction": {"name": "scaffold"}}, "aggregation": {"weights": "uniform"}},
    "fedema": {"method": BYOL, "training": {"correction": {"name": "fedema", "scale": 0.5}}},
    "fedu": {"method": BYOL, "training": {"correction": {"name": "fedu", "threshold": 1e-3}}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled"), {"lyon": 20, "oslo": 30})


def federation(config: FederationConfig, data: Path, out: Path) -> RunFolder:
    """Return the run folder of a federation that has run through, or goes on where it was cut."""
    members = dict.fromkeys(index_sites(config, data, out, threads=1), "")

    def ask(tasks: Mapping[str, Task]) -> Iterator[tuple[str, bytes | Refusal]]:
        for site, task in sorted(tasks.items()):
            yield site, run_task(read_site(out / "sites" / site / "site.toml"), task)

    run = create(out, resolve(config), members, "")
    run_rounds(run, ask, ignore)
    return run


@pytest.fixture(scope="module")
def uncorrected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunFolder]:
    """Return a function that gives the run of one of RUNS without its correction; of one kind, one run."""
    runs: dict[str, RunFolder] = {}

    def find(name: str) -> RunFolder:
        training = {key: value for key, value in RUNS[name]["training"].items() if key != "correction"}
        changes = {**RUNS[name], "training": training}
        if str(changes) not in runs:
            runs[str(changes)] = federation(tiny(**changes), data, tmp_path_factory.mktemp("plain") / "run")
        return runs[str(changes)]

    return find


@pytest.mark.parametrize("name", RUNS)
def test_a_corrected_federation_cut_in_training_ends_bit_equal(
    name: str,
    data: Path,
    uncorrected: Callable[[str], RunFolder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny(**RUNS[name])
    whole = federation(config, data, tmp_path / "whole")
    calls = []

    def cut_in_the_last(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:  # the second site in the second round
            raise Cut
        return pretrain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(local_round, "pretrain", cut_in_the_last)
        with pytest.raises(Cut):
            federation(config, data, tmp_path / "cut")
    again = federation(config, data, tmp_path / "cut")
    assert again.committed() == [0, 1, 2]
    assert state_hash(again.checkpoint(2).state) == state_hash(whole.checkpoint(2).state)
    assert state_hash(again.checkpoint(2).server) == state_hash(whole.checkpoint(2).server)
    plain = uncorrected(name)
    assert state_hash(plain.checkpoint(2).state) != state_hash(whole.checkpoint(2).state)
    same_first = state_hash(plain.checkpoint(1).state) == state_hash(whole.checkpoint(1).state)
    assert same_first == (name != "fedprox")  # the others begin with what a first round leaves


def test_a_private_federation_is_pulled_after_the_noise(data: Path, tmp_path: Path) -> None:
    """A pull that is far longer than the noise holds the state where it came in."""
    privacy = {"unit": "patient", "epsilon": 8.0, "delta": 1e-3, "clip": 0.01}

    def moved(mu: float) -> float:
        training = {**SGD, "rounds": 1, "correction": {"name": "fedprox", "mu": mu}}
        config = tiny(privacy=privacy, membership={"units": {"lyon": 5, "oslo": 8}}, training=training)
        run = federation(config, data, tmp_path / f"{mu}")
        return drift(run.checkpoint(0).state, run.checkpoint(1).state)

    # Rates 0.05, 0.0375, 0.0125: a pull of 20 leaves 1 - 0.0375 * 20 = 1/4 of the first step, then 3/4 of that.
    assert moved(20.0) < 0.75 * moved(1e-6)


def test_control_variates_cross_with_the_state_and_the_update_and_no_site_may_leave_them_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **RUNS["scaffold"], membership={"min_sites": 2})
    sent: dict[str, Update] = {}
    names = run.checkpoint(0).state.keys()

    class OneLacksThem(Sites):
        def update(self, site: str, task: Task) -> Update:
            state, _ = unpack(inflate(task.state, received(run.protocol), "float32", "the state"))
            draw = np.random.default_rng([*site.encode(), task.round])
            delta = {name: draw.normal(size=a.shape).astype(np.float32) for name, a in sorted(state.items())}
            update = Update(site, run.digest, task.round, state_hash(state), DECLARED, delta)
            if site == "oslo":
                return dataclasses.replace(update, delta={n: a for n, a in delta.items() if n in names})
            sent[f"{task.round} {site}"] = update
            return update

    run_rounds(run, OneLacksThem(run), ignore)
    assert f"lacks {len(names)} of {2 * len(names)} tensors (first: 'scaffold." in run.record(1)["refused"]["oslo"]
    assert run.checkpoint(2).state.keys() == names
    server = run.checkpoint(2).server
    for name in names:
        total = sum(update.delta[f"scaffold.{name}"].astype(np.float64) for update in sent.values())
        np.testing.assert_allclose(server[f"scaffold.{name}"], total / 3, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"correction": {"name": "scaffold"}}}, "which only plain SGD keeps; set optimiser = 'sgd'"),
        (
            {"training": {**SGD, "local_momentum": 0.9, "correction": {"name": "scaffold"}}},
            "which only plain SGD keeps",
        ),
        ({"training": {"local_momentum": 0.9}}, "local_momentum is a key of optimiser = 'sgd'; remove it"),
        ({"training": {**SGD, "correction": {"name": "scaffold"}}}, "set .aggregation. rule = 'mean' and weights ="),
        ({**RUNS["scaffold"], "encoding": "int8"}, "control variates cross as they are; set encoding = 'float32'"),
        (
            {**RUNS["scaffold"], "privacy": {"unit": "patient", "epsilon": 8.0, "delta": 1e-3}},
            r"leave beside the update without noise; with \[privacy\] unit = 'patient' take 'fedprox'",
        ),
        (
            {"training": {"correction": {"name": "fedema", "scale": 1.0}}},
            "needs a method with a predictor, which 'mae'",
        ),
        ({"training": {"correction": {"name": "fedprox"}}}, r"\[training.correction\] the key 'mu' is missing; add it"),
        ({"training": {"correction": {"name": "fedproxy"}}}, "did you mean 'fedprox'?"),
    ],
)
def test_corrections_that_would_mean_something_else_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny(**changes)
