"""Rounds that wait for nobody: what is folded with which weight, that each update counts once, and what is refused."""

import json
import os
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, TINY, merged, tiny, to_toml, write_labelled
from flwr.app import Message
from honest_sites import DECLARED, SITES, Cut, Sites, final, ignore, make_run
from test_kill_points import WALK
from test_network_smoke import CHANGES, deployment
from warm import program

import wardround.simulate
from wardround.config import FederationConfig, read_toml
from wardround.encoding import compress
from wardround.errors import ConfigError, UpdateError
from wardround.privacy.ledger import Ledger
from wardround.provision import provision
from wardround.server import app
from wardround.server.buffer import fill
from wardround.server.rounds import run_rounds
from wardround.server.run_folder import RunFolder, open_run
from wardround.simulate import InProcessGrid, simulate
from wardround.update import Declared, Refusal, State, Task, Update, pack

UNIFORM = {"aggregation": {"weights": "uniform"}}


class Timed(Sites):
    """Three honest sites, each of which takes so many seconds; where all take none, in the order of a simulation."""

    def __init__(self, run: RunFolder, seconds: Mapping[str, float] | None = None, cut_after: int = 10**9) -> None:
        super().__init__(run)
        self.seconds, self.left, self.now = seconds or {}, cut_after, 0.0
        self.out: dict[str, tuple[float, int, str, Task]] = {}

    def idle(self) -> list[str]:
        return sorted(set(SITES) - self.out.keys())

    def send(self, tasks: Mapping[str, Task]) -> None:
        for site, task in tasks.items():
            self.asked.append((site, task.round))
            self.out[site] = (self.now + self.seconds.get(site, 0.0), task.round, site, task)

    def busy(self) -> bool:
        return bool(self.out)

    def receive(self) -> tuple[str, bytes | Refusal] | None:
        if self.left == 0:
            raise Cut
        self.left -= 1
        self.now, _, site, task = min(self.out.values())
        del self.out[site]
        return site, self.answer(site, task)

    def wait_for(self, sites: list[str], least: int) -> dict[str, int]:
        return {}


def go_on(run: RunFolder, post: Any) -> None:
    run_rounds(run, Sites(run), ignore, partial(fill, post=post))


def buffered(path: Path, rounds: int, membership: Mapping[str, Any] | None = None, **changes: Any) -> RunFolder:
    return make_run(path, training={"rounds": rounds}, membership={"buffer": 2, **(membership or {})}, **changes)


def folded(run: RunFolder) -> list[tuple[str, int]]:
    """Return the key of each update that was folded, in the order of the rounds."""
    return [key for number in run.committed()[1:] for key in run.record(number)["base_rounds"].items()]


def delta(run: RunFolder, site: str, number: int) -> State:
    """Return what an honest site gives in a round, which does not depend on the state."""
    draw = np.random.default_rng([*site.encode(), number])
    shapes = {name: array.shape for name, array in sorted(run.checkpoint(0).state.items())}
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def close_to(run: RunFolder, number: int, shares: Mapping[tuple[str, int], float]) -> None:
    """Check that a round moved the state by the sum of these updates, each times its share."""
    before, after = run.checkpoint(number - 1).state, run.checkpoint(number).state
    deltas = {key: delta(run, *key) for key in shares}
    for name, array in after.items():
        moved = sum(share * deltas[key][name].astype(np.float64) for key, share in shares.items())
        np.testing.assert_allclose(array, before[name] + moved, rtol=1e-5, atol=1e-6)


def test_a_stale_update_counts_less_and_the_mean_is_over_the_buffers_size(tmp_path: Path) -> None:
    run = buffered(tmp_path / "run", 3, **UNIFORM)
    go_on(run, Timed(run, {"lyon": 1, "oslo": 1.1, "wien": 2.5}))
    # lyon and oslo fill rounds 1 and 2; wien comes to the third, two rounds late, and lyon fills that.
    assert [run.record(number)["base_rounds"] for number in (1, 2, 3)] == [
        {"lyon": 1, "oslo": 1}, {"lyon": 2, "oslo": 2}, {"lyon": 3, "wien": 1},
    ]  # fmt: skip
    assert run.record(3)["staleness"] == {"lyon": 0, "wien": 2}
    assert run.record(3)["training"] == {"oslo": 3}
    assert run.record(3)["last_folded"] == {"lyon": 3, "oslo": 2, "wien": 1}
    close_to(run, 2, {("lyon", 2): 0.5, ("oslo", 2): 0.5})
    close_to(run, 3, {("lyon", 3): 0.5, ("wien", 1): 0.5 * 3**-0.5})


def test_staleness_and_images_weigh_together(tmp_path: Path) -> None:
    run = buffered(tmp_path / "run", 3, {"staleness": 2.0})
    go_on(run, Timed(run, {"lyon": 1, "oslo": 1.1, "wien": 2.5}))
    lyon, wien = (len(site) + ord(site[0]) for site in ("lyon", "wien"))  # what honest sites say that they have
    close_to(run, 3, {("lyon", 3): lyon / (lyon + wien), ("wien", 1): wien / (lyon + wien) / 9})
    weights = {site: figures["weight"] for site, figures in run.record(3)["sites"].items()}
    assert weights == pytest.approx({"lyon": 9 * lyon / (9 * lyon + wien), "wien": wien / (9 * lyon + wien)})


def test_a_lone_stale_update_is_not_weighed_up_again(tmp_path: Path) -> None:
    run = buffered(tmp_path / "run", 3, {"buffer": 1}, **UNIFORM)
    go_on(run, Timed(run, {"lyon": 1, "oslo": 1.5, "wien": 50}))
    assert folded(run) == [("lyon", 1), ("oslo", 1), ("lyon", 2)]
    close_to(run, 2, {("oslo", 1): 2**-0.5})


def test_a_site_that_never_answers_costs_the_others_nothing(tmp_path: Path) -> None:
    run = buffered(tmp_path / "run", 6)
    post = Timed(run, {"lyon": 1, "oslo": 1, "wien": 1000})
    go_on(run, post)
    assert post.now == 6
    assert post.asked.count(("wien", 1)) == 1 and {site for site, _ in folded(run)} == {"lyon", "oslo"}


def test_a_site_is_asked_again_from_the_commit_that_it_is_in(tmp_path: Path) -> None:
    run = buffered(tmp_path / "run", 4)
    post = Timed(run, {"lyon": 1, "oslo": 1.1, "wien": 2.5})
    go_on(run, post)
    assert [number for site, number in post.asked if site == "wien"] == [1, 4]  # its first is in round 3
    for site in SITES:
        asked = [number for name, number in post.asked if name == site]
        assert asked == sorted(set(asked)), "a site's rounds only go forward"


def test_a_buffer_of_all_sites_gives_the_bits_of_rounds_that_wait(tmp_path: Path) -> None:
    whole, all_sites = make_run(tmp_path / "whole"), make_run(tmp_path / "run", membership={"buffer": 3})
    run_rounds(whole, Sites(whole), ignore)
    go_on(all_sites, Timed(all_sites, {"lyon": 3, "oslo": 2, "wien": 1}))
    assert final(all_sites) == final(whole)


@pytest.mark.parametrize("cut_after", range(9))
def test_cut_anywhere_it_asks_for_the_same_rounds_again_and_ends_with_the_same_bits(
    tmp_path: Path, cut_after: int
) -> None:
    whole, run = buffered(tmp_path / "whole", 4), buffered(tmp_path / "run", 4)
    go_on(whole, Timed(whole))
    first, again = Timed(run, cut_after=cut_after), Timed(run)
    with pytest.raises(Cut):
        go_on(run, first)
        raise Cut  # the last of them comes after the end
    go_on(open_run(tmp_path / "run"), again)
    assert final(run) == final(whole)
    assert folded(run) == folded(whole) and len(set(folded(run))) == len(folded(run))
    unanswered = {(site, task.round) for site, (_, _, _, task) in first.out.items()}
    assert unanswered <= set(again.asked) or run.committed()[-1] == 4


def test_an_update_that_comes_twice_is_folded_once(tmp_path: Path) -> None:
    whole, run = buffered(tmp_path / "whole", 4), buffered(tmp_path / "run", 4)
    go_on(whole, Timed(whole))

    class Stutter(Timed):
        """Each answer comes again after the next one."""

        last: tuple[str, bytes | Refusal] | None = None
        turn = 0

        def receive(self) -> tuple[str, bytes | Refusal] | None:
            self.turn += 1
            if self.turn % 3 == 0:
                return self.last
            came = super().receive()
            self.last = came if self.turn % 3 == 1 else self.last
            return came

    go_on(run, Stutter(run))
    assert len(set(folded(run))) == len(folded(run)) == 8


def test_an_update_of_another_round_or_state_than_was_asked_is_not_folded(tmp_path: Path) -> None:
    run = buffered(tmp_path / "run", 3)

    class Repeats(Timed):
        """Oslo gives its first update for ever."""

        def answer(self, site: str, task: Task) -> bytes | Refusal:
            if site == "oslo" and task.round > 1:
                return first
            return super().answer(site, task)

    task = Task(1, "", 0, compress(pack(run.checkpoint(0).state, {})))
    first = Sites(run).answer("oslo", task)
    post = Repeats(run)
    go_on(run, post)
    assert [key for key in folded(run) if key[0] == "oslo"] == [("oslo", 1)]
    assert "its update says round 1, expected 3" in run.record(3)["refused"]["oslo"]


def test_too_old_an_update_is_dropped_counted_and_named_and_its_site_asked_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = buffered(tmp_path / "run", 9, {"max_staleness": 1})
    post = Timed(run, {"lyon": 1, "oslo": 1.1, "wien": 3.5}, cut_after=10)
    with pytest.raises(Cut):
        go_on(run, post)
    again = Timed(run, {"lyon": 1, "oslo": 1.1, "wien": 3.5})
    go_on(open_run(tmp_path / "run"), again)
    dropped = [
        (number, run.record(number)["dropped"]) for number in run.committed()[1:] if run.record(number)["dropped"]
    ]
    assert dropped == [(4, {"wien": 1}), (8, {"wien": 4})]
    assert run.record(4)["refused"]["wien"] == "stale: its update of round 1 came 3 rounds late"
    assert [line.getMessage().partition(" (")[2][:8] for line in caplog.records] == ["1 so far", "2 so far"]
    assert "wien" not in run.record(9)["last_folded"]
    assert [number for site, number in [*post.asked, *again.asked] if site == "wien"] == [1, 4, 4, 8]


def test_who_refuses_is_asked_again_with_the_next_round(tmp_path: Path) -> None:
    run = buffered(tmp_path / "run", 3)

    class OneRefusesAtFirst(Timed):
        def answer(self, site: str, task: Task) -> bytes | Refusal:
            refuses = site == "oslo" and task.round == 1
            return Refusal("failed", "not yet") if refuses else super().answer(site, task)

    post = OneRefusesAtFirst(run)
    go_on(run, post)
    assert [number for site, number in post.asked if site == "oslo"] == [1, 2, 3]
    assert run.record(1)["refused"] == {"oslo": "failed: not yet"}
    assert ("oslo", 2) in folded(run)


def test_who_is_revoked_in_the_middle_of_a_buffer_is_named_and_the_others_fill_it(tmp_path: Path) -> None:
    run = buffered(tmp_path / "run", 5)

    class Revoked(Timed):
        def idle(self) -> list[str]:
            return [site for site in super().idle() if site != "wien" or self.now == 0]

        def answer(self, site: str, task: Task) -> bytes | Refusal:
            return app.REVOKED if site == "wien" else super().answer(site, task)

    post = Revoked(run, {"lyon": 1, "oslo": 1, "wien": 2.5})  # its update is out when the third buffer is open
    go_on(run, post)
    assert post.asked.count(("wien", 1)) == 1 and {site for site, _ in folded(run)} == {"lyon", "oslo"}
    named = [number for number in run.committed()[1:] if "wien" in run.record(number)["refused"]]
    assert named == [3] and run.record(3)["refused"]["wien"].startswith("revoked")
    assert "wien" not in run.record(5)["training"], "nobody waits for it any more"


def test_who_lacks_the_state_that_a_step_starts_from_is_asked_once_more_for_the_same_round(tmp_path: Path) -> None:
    run = buffered(tmp_path / "run", 3)

    class Forgetful(Timed):
        def answer(self, site: str, task: Task) -> bytes | Refusal:
            lacks = site == "lyon" and self.asked.count((site, task.round)) == 1
            return Refusal("state", "it does not hold it") if lacks else super().answer(site, task)

    post = Forgetful(run)
    go_on(run, post)
    assert [number for site, number in post.asked if site == "lyon"] == [1, 1, 2, 2, 3, 3]
    assert [base for site, base in folded(run) if site == "lyon"] == [1, 2, 3]


def test_with_nobody_left_to_wait_for_it_stops_with_each_sites_reason_and_keeps_what_came(tmp_path: Path) -> None:
    whole, run = buffered(tmp_path / "whole", 3), buffered(tmp_path / "run", 3)
    go_on(whole, Timed(whole))

    class OnlyLyon(Timed):
        def idle(self) -> list[str]:
            return [site for site in super().idle() if site != "wien"]

        def answer(self, site: str, task: Task) -> bytes | Refusal:
            return super().answer(site, task) if site == "lyon" else Refusal("images", "none")

    words = (
        r"round 1: 1 of 3 sites gave an update, 2 are needed\. 'oslo' images: none; 'wien' silent: was not connected"
    )
    with pytest.raises(UpdateError, match=words):
        go_on(run, OnlyLyon(run))
    again = Timed(run)
    go_on(open_run(tmp_path / "run"), again)
    assert ("lyon", 1) not in again.asked
    assert final(run) == final(whole)


def test_a_run_may_change_between_waiting_and_a_buffer_without_a_new_approval(tmp_path: Path) -> None:
    def stop(number: int) -> None:
        raise Cut

    digests = set()
    for membership in ({}, {"buffer": 2}, {}, {"buffer": 1}):
        run = make_run(tmp_path / "run", training={"rounds": 4}, membership=membership)
        digests.add(run.digest)
        with pytest.raises(Cut):
            run_rounds(run, Sites(run), stop, partial(fill, post=Timed(run)))
    assert run.committed() == [0, 1, 2, 3, 4]
    assert [len(run.record(number)["sites"]) for number in (1, 2, 3, 4)] == [3, 2, 3, 1]
    assert len(digests) == 1


def test_with_noise_at_the_sites_the_sum_is_divided_by_the_declared_cohort(tmp_path: Path) -> None:
    privacy = {"unit": "site", "epsilon": 50.0, "delta": 1e-3, "clip": 1.0, "cohort": 5, "noise": "site"}
    run = buffered(tmp_path / "run", 3, privacy=privacy, **UNIFORM)

    class Tacit(Timed):
        def update(self, site: str, task: Task) -> Update:
            declared = Declared(steps=3, version=DECLARED.version)
            update = super().update(site, task)
            return Update(site, update.protocol, update.round, update.state, declared, update.delta)

    go_on(run, Tacit(run, {"lyon": 1, "oslo": 1.1, "wien": 2.5}))
    close_to(run, 3, {("lyon", 3): 1 / 5, ("wien", 1): 3**-0.5 / 5})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"privacy": {"unit": "site", "epsilon": 8.0, "delta": 1e-3, "clip": 1.0, "cohort": 3}, **UNIFORM},
            r"one site more changes which .* share a round, which \[privacy\] noise = 'server' does not hide",
        ),
        (
            {"training": {"optimiser": "sgd", "correction": {"name": "scaffold"}}, **UNIFORM},
            r"correction = 'scaffold' corrects towards one; take 'fedprox'",
        ),
        (
            {"aggregation": {"weights": "uniform", "rule": "median"}},
            r"rule = 'median' would cast out honest ones for it; take rule = 'mean', with a norm_bound",
        ),
        ({"membership": {"min_sites": 2}}, r"min_sites = 2: with buffer, all sites are asked and none is waited for"),
        ({"membership": {"sites_per_round": 2}}, "sites_per_round = 2: with buffer"),
        ({"membership": {"buffer": None, "staleness": 1.0}}, "staleness = 1.0: is a key of rounds with a buffer"),
        ({"membership": {"buffer": None, "max_staleness": 4}}, "max_staleness = 4: is a key of rounds with a buffer"),
        ({"membership": {"sites": {"lyon": 1.0}}}, "buffer = 2: only 1 sites are listed"),
    ],
)
def test_what_a_buffer_is_not_sound_or_not_meant_with_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny(**merged({"membership": {"buffer": 2}}, changes))


def test_a_buffer_larger_than_the_federation_is_refused_before_training(tmp_path: Path) -> None:
    run = buffered(tmp_path / "run", 2, {"buffer": 4})
    post = Timed(run)
    with pytest.raises(ConfigError, match="buffer = 4: there are 3 sites"):
        go_on(run, post)
    assert post.asked == []


class Slow(InProcessGrid):
    """Oslo's answer is there only when it was asked for so many times."""

    patience = 4

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.polls: dict[str, int] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (message_id,) = message_ids
        number = self.waiting[message_id].metadata.dst_node_id
        self.polls[message_id] = self.polls.get(message_id, 0) + 1
        late = self.files[number][0] == "oslo" and self.polls[message_id] <= self.patience
        return [] if late else super().pull_messages([message_id])


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled"), {"lyon": 20, "oslo": 30, "pisa": 12})


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Slow]]:
    monkeypatch.setattr(wardround.simulate, "InProcessGrid", Slow)
    monkeypatch.setattr(app, "POLL_SECONDS", 0.0)
    yield Slow


def test_a_slow_sites_update_is_folded_late_over_flowers_grid(
    three: Path, store: str, tmp_path: Path, slow: type[Slow]
) -> None:
    config = tiny(training={"rounds": 4}, membership={"buffer": 2})
    run = simulate(config, three, tmp_path / "run", store, threads=1)
    assert [run.record(number)["base_rounds"] for number in (1, 2)] == [{"lyon": 1, "pisa": 1}, {"lyon": 2, "pisa": 2}]
    (late,) = [number for number in (3, 4) if "oslo" in run.record(number)["base_rounds"]]
    assert run.record(late)["staleness"]["oslo"] == late - 1


def test_who_is_silent_too_long_is_asked_anew_and_what_then_comes_is_dropped(
    three: Path, store: str, tmp_path: Path, slow: type[Slow], caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny(training={"rounds": 6}, membership={"buffer": 2, "round_seconds": 1e-9})
    run = simulate(config, three, tmp_path / "run", store, threads=1)
    assert {site for site, _ in folded(run)} == {"lyon", "pisa"}
    assert "silent: sent nothing" in run.record(1)["refused"]["oslo"]
    assert "site 'oslo': its answer to round" in caplog.text and "is dropped" in caplog.text


def test_each_training_is_charged_and_no_site_trains_more_rounds_than_the_noise_is_for(
    three: Path, store: str, tmp_path: Path
) -> None:
    privacy = {"unit": "patient", "epsilon": 8.0, "delta": 1e-3}
    membership = {"buffer": 1, "units": {"lyon": 10, "oslo": 15, "pisa": 6}}
    config = tiny(training={"rounds": 4}, privacy=privacy, membership=membership)
    run = simulate(config, three, tmp_path / "run", store, threads=1)
    for site in ("lyon", "oslo", "pisa"):
        charged = [row.intent.round for row in Ledger(tmp_path / "run/sites" / site / "ledger.db").rows()]
        assert charged == sorted(set(charged)) and set(charged) <= {1, 2, 3, 4}
        assert {base for name, base in folded(run) if name == site} <= set(charged)
    spent = [figures["epsilon"] for number in (1, 2, 3, 4) for figures in run.record(number)["sites"].values()]
    assert max(spent) <= 8.0


POINTS = [  # as in test_kill_points.py
    ("server", "wardround.server.spool:Spool.open", "before", 2),
    ("server", "wardround.server.spool:Spool.add", "after", 3),
    ("server", "wardround.server.spool:Spool.close", "after", 2),
    ("server", "wardround.registry.checkpoint:write", "after", 3),  # the initial state is the first
    ("site", "wardround.ssl.engine:Plain.gradients", "after", 8),  # the middle of a training
    ("site", "wardround.client.journal:Journal.finish", "after", 4),
]


@pytest.fixture(scope="module")
def walked(three: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all runs: `whole`, which nobody killed, and one a point; steps and updates are int8."""
    folder = tmp_path_factory.mktemp("walk")
    changes = {"training": {"rounds": 3}, "encoding": "int8", "membership": {"buffer": 2}}
    (folder / "tiny.toml").write_text(to_toml(merged(TINY, changes)))
    store, environment = f"sqlite:///{folder / 'mlflow.db'}", os.environ | {"OMP_NUM_THREADS": "1"}
    whole = ["simulate", folder / "tiny.toml", "--data", three, "--out", folder / "runs/whole", "--tracking", store]
    command = [str(program() / "wardround"), *map(str, whole), "--threads", "1"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    arguments = [folder / "tiny.toml", three, folder / "runs", store, json.dumps(POINTS)]
    done = subprocess.run(
        [program() / "python", "-c", WALK, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    return folder / "runs"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(POINTS)), ids=[" ".join(map(str, point[1:])) for point in POINTS])
def test_killed_there_it_ends_with_the_same_updates_and_bits(walked: Path, number: int) -> None:
    """Only a real kill shows that what was asked, and of whom, is on disk before it matters."""
    killed, finished = json.loads((walked / "found.json").read_text())[str(number)]
    assert killed == -signal.SIGKILL, "the point was never reached"
    assert finished == 0
    whole, run = open_run(walked / "whole"), open_run(walked / str(number))
    assert folded(run) == folded(whole) and len(set(folded(run))) == 6
    assert [max(run.record(number)["staleness"].values()) for number in (1, 2, 3)] == [0, 1, 1]
    assert final(run) == final(whole)


@pytest.mark.slow
@pytest.mark.network
def test_over_the_network_neither_a_site_that_is_not_there_nor_a_killed_coordinator_stops_it(
    three: Path, tmp_path: Path
) -> None:
    """Only a network has sites that train while others are asked, and answers of a run that is over."""
    with deployment(tmp_path, three) as deployed:
        deployed.config.write_text(to_toml(merged(TINY, merged(CHANGES, {"membership": {"buffer": 1}}))))
        federation = read_toml(deployed.config, FederationConfig)
        provision(federation, tmp_path / "kits", ["lyon", "oslo", "pisa"], f"localhost:{deployed.port}")
        deployed.coordinate()
        for site in ("lyon", "oslo"):
            deployed.join(site)  # what each approved is still the digest: [membership] is outside of it
        deployed.wait_until("coordinator", "round 1 of 2", 180)
        deployed.running["coordinator"].kill()
        deployed.running["coordinator"].wait()
        deployed.coordinate()
        assert deployed.running["coordinator"].wait(240) == 0, deployed.said("coordinator")
        run = open_run(deployed.run)
        assert run.committed() == [0, 1, 2]
        assert len(set(folded(run))) == len(folded(run)) == 2
