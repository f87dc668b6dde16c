"""Rounds whose numbers cross as bfloat16 or int8: what is committed, what is sent to whom, and what it costs."""

import dataclasses
import json
import os
import signal
import subprocess
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import KILLER, ROOT, TINY, begun, merged, tiny, to_toml
from flwr.app import Message
from honest_sites import DECLARED, SITES, Cut, Sites, final, ignore, make_run
from warm import program

from wardround import simulate as in_process
from wardround.client.app import run_task
from wardround.client.journal import Journal, _held
from wardround.client.local_round import local_round
from wardround.client.policy import checked_state
from wardround.config import read_site
from wardround.data import open_site
from wardround.encoding import SCALES, decode, encode, kept, stepped
from wardround.errors import ConfigError, PolicyRefusal
from wardround.plan import architecture, resolve
from wardround.server import rounds
from wardround.server.rounds import run_rounds
from wardround.server.run_folder import RunFolder, open_run
from wardround.server.spool import Spool
from wardround.simulate import simulate
from wardround.ssl.devices import Machine
from wardround.update import Array, Refusal, Start, State, Task, Update, layout, pack, state_hash

BOTH = pytest.mark.parametrize("kind", ["bfloat16", "int8"])
THREE = {"training": {"rounds": 3}}


class Encoding(Sites):
    """Three honest sites that hold states, add steps to them, and encode what they answer."""

    def __init__(self, run: RunFolder, held: dict[str, Start] | None = None, cut_after: int | None = None) -> None:
        super().__init__(run, cut_after)
        self.held: dict[str, Start] = {} if held is None else held
        self.sizes: list[tuple[int, str, int]] = []

    def answer(self, site: str, task: Task) -> bytes | Refusal:
        self.sizes.append((task.round, site, len(task.state)))
        start = checked_state(self.run.protocol, task, self.held.get(site))
        if start is None:
            return Refusal("state", "it does not hold the state that the step starts from")
        self.held[site] = start
        whole = dataclasses.replace(task, state=pack(start.state, {}))
        return self.encoded(super().update(site, whole)).to_bytes()

    def encoded(self, update: Update) -> Update:
        kind = self.run.protocol.encoding
        delta = {name: 0.01 * array for name, array in update.delta.items()}
        return dataclasses.replace(update, delta=encode(delta, kind, {})[0], encoding=kind)

    def to(self, number: int) -> dict[str, int]:
        """Return the bytes of a round's last task to each site."""
        return {site: size for round, site, size in self.sizes if round == number}


@BOTH
def test_what_is_committed_is_what_a_site_gets_that_adds_the_step(tmp_path: Path, kind: str) -> None:
    run = make_run(tmp_path / "run", encoding=kind, **THREE)
    sites = Encoding(run)
    run_rounds(run, sites, ignore)
    last = [run.checkpoint(number) for number in (0, 1, 2, 3)]
    assert last[0].step == {}
    for before, after in pairwise(last):
        assert state_hash(stepped(before.state, after.step, kind)) == state_hash(after.state)  # type: ignore[arg-type]
    for site in SITES:  # at the beginning of round 3 each held what round 2 had committed, and sent no more than steps
        assert sites.held[site].hash == state_hash(last[2].state)
        assert sites.to(3)[site] < (0.27 if kind == "int8" else 0.51) * sites.to(1)[site]


@BOTH
def test_what_the_step_loses_is_in_the_checkpoint_and_comes_next(tmp_path: Path, kind: Any) -> None:
    run = make_run(tmp_path / "run", encoding=kind, **THREE)
    wanted: dict[str, list[Array]] = {}
    real = rounds.publish

    def watched(kind: Any, name: str, old: Array, aim: Array, residual: State) -> Any:
        wanted.setdefault(name, []).append(aim.astype(np.float64) - old)
        return real(kind, name, old, aim, residual)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "publish", watched)
        run_rounds(run, Encoding(run), ignore)
    steps = [decode(run.checkpoint(number).step, kind) for number in (1, 2, 3)]
    residual, _ = kept(run.checkpoint(3).server)
    for name in run.checkpoint(0).state:
        came = sum(step[name].astype(np.float64) for step in steps)
        np.testing.assert_allclose(came + residual[name], sum(wanted[name]), atol=1e-7)
    assert any(array.any() for array in residual.values())


@BOTH
def test_the_spool_decodes_part_of_a_tensor_as_it_does_the_whole(tmp_path: Path, kind: Any) -> None:
    delta = {"kernel": np.random.default_rng(0).normal(size=(9, 5, 13)).astype(np.float32)}
    block = Update("lyon", "d", 1, "s", DECLARED, encode(delta, kind, {})[0], kind).to_bytes()
    spool = Spool(tmp_path)
    spool.add("lyon", block)
    with spool.reader(spool.close({}, {}, {}, 0)) as read:
        whole = read("lyon", "kernel")
        np.testing.assert_allclose(whole, delta["kernel"], atol=0.02)
        for low in range(7):  # safetensors refuses a part that ends behind the tensor
            assert np.array_equal(read("lyon", "kernel", slice(low, low + 3)), whole[low : low + 3])
        assert np.array_equal(read("lyon", "kernel", slice(None, 4)), whole[:4])


def test_float32_has_neither_step_nor_residual(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run_rounds(run, Sites(run), ignore)
    folder = run.round(2) / "checkpoint"
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "server.safetensors",
        "state.safetensors",
    ]
    assert run.checkpoint(2).server == {}


def test_who_lost_its_copy_gets_the_whole_state_in_the_same_round(tmp_path: Path) -> None:
    run, calm = (make_run(tmp_path / name, encoding="int8", **THREE) for name in ("run", "calm"))
    run_rounds(calm, Encoding(calm), ignore)

    class Forgetful(Encoding):
        def answer(self, site: str, task: Task) -> bytes | Refusal:
            if site == "oslo" and task.round == 2:
                self.held.pop(site, None)
            if site == "wien" and task.round == 3:
                self.held[site] = begun({name: array + 1 for name, array in self.held[site].state.items()})
            return super().answer(site, task)

    sites = Forgetful(run)
    run_rounds(run, sites, ignore)
    assert [site for site, number in sites.asked if number == 2] == ["wien", "oslo", "lyon", "oslo"]
    assert [site for site, number in sites.asked if number == 3] == ["wien", "oslo", "lyon", "wien"]
    assert [run.record(number)["refused"] for number in (1, 2, 3)] == [{}, {}, {}]
    assert final(run) == final(calm)
    assert run.record(2)["bytes_sent"] == sum(size for round, _, size in sites.sizes if round == 2)


def test_who_refuses_the_whole_state_too_is_named_and_asked_no_third_time(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", encoding="int8", membership={"min_sites": 2})

    class Stubborn(Encoding):
        def answer(self, site: str, task: Task) -> bytes | Refusal:
            return Refusal("state", "no") if (site, task.round) == ("oslo", 2) else super().answer(site, task)

    sites = Stubborn(run)
    run_rounds(run, sites, ignore)
    assert [site for site, number in sites.asked if number == 2].count("oslo") == 2
    assert run.record(2)["refused"] == {"oslo": "state: no"}


def test_who_was_not_folded_gets_the_whole_state(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", encoding="int8", membership={"min_sites": 2}, **THREE)

    class Away(Encoding):
        def answer(self, site: str, task: Task) -> bytes | Refusal:
            return Refusal("failed", "no") if (site, task.round) == ("oslo", 1) else super().answer(site, task)

    sites = Away(run)
    run_rounds(run, sites, ignore)
    assert sites.to(2)["oslo"] > 3 * sites.to(2)["wien"] == 3 * sites.to(2)["lyon"]
    assert sites.to(3)["oslo"] == sites.to(3)["wien"]
    assert "oslo" not in run.record(1)["sites"] and "oslo" in run.record(2)["sites"]


@pytest.mark.parametrize("arrived", [0, 2])
def test_a_server_cut_and_started_again_commits_the_same_bits(tmp_path: Path, arrived: int) -> None:
    whole, run = (make_run(tmp_path / name, encoding="int8", **THREE) for name in ("whole", "run"))
    run_rounds(whole, Encoding(whole), ignore)
    held: dict[str, State] = {}
    with pytest.raises(Cut):
        run_rounds(run, Encoding(run, held), lambda number: (_ for _ in ()).throw(Cut) if number == 1 else None)
    with pytest.raises(Cut):
        run_rounds(open_run(run.path), Encoding(run, held, cut_after=arrived), ignore)
    run_rounds(open_run(run.path), Encoding(run, held), ignore)
    for number in (1, 2, 3):
        one, two = whole.checkpoint(number), run.checkpoint(number)
        assert state_hash(one.state) == state_hash(two.state)
        assert state_hash(one.server) == state_hash(two.server)


class Wrong(Encoding):
    """Sites of which 'oslo' sends something else."""

    change: Any = None

    def answer(self, site: str, task: Task) -> bytes | Refusal:
        answer = super().answer(site, task)
        return type(self).change(answer) if site == "oslo" else answer


def foreign(block: bytes) -> bytes:
    update = Update.from_bytes(block)
    return dataclasses.replace(update, delta=decode(update.delta, "int8"), encoding="float32").to_bytes()


def mislabelled(block: bytes) -> bytes:
    update = Update.from_bytes(block)
    unsigned = {name: a if name.endswith(SCALES) else a.view(np.uint8) for name, a in update.delta.items()}
    return dataclasses.replace(update, delta=unsigned).to_bytes()


def altered(block: bytes) -> bytes:
    update = Update.from_bytes(block)
    scales = next(name for name in update.delta if name.endswith(SCALES))
    return dataclasses.replace(update, delta=update.delta | {scales: update.delta[scales] * np.inf}).to_bytes()


def bomb(_: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(bytes(5_000_000))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (foreign, "bytes, expected at most"),
        (mislabelled, "is uint8"),
        (altered, "holds NaN or infinity"),
        (lambda block: block[:-1], "cut or altered"),
        (bomb, "has 5000000 bytes, expected at most"),
    ],
)
def test_what_is_encoded_otherwise_or_altered_is_not_folded(tmp_path: Path, change: Any, words: str) -> None:
    run = make_run(tmp_path / "run", encoding="int8", membership={"min_sites": 2}, training={"rounds": 1})
    run_rounds(run, type("Changed", (Wrong,), {"change": staticmethod(change)})(run), ignore)
    assert words in run.record(1)["refused"]["oslo"]
    assert run.record(1)["sites"].keys() == {"lyon", "wien"}


def test_an_encoding_that_fits_the_bytes_but_not_the_protocol_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", membership={"min_sites": 2}, training={"rounds": 1})

    class Int8(Sites):
        def update(self, site: str, task: Task) -> Update:
            update = super().update(site, task)
            if site != "oslo":
                return update
            return dataclasses.replace(update, delta=encode(update.delta, "int8", {})[0], encoding="int8")

    run_rounds(run, Int8(run), ignore)
    assert "its update says encoding int8, expected float32" in run.record(1)["refused"]["oslo"]


def test_a_step_is_held_to_the_architecture_and_to_the_state_that_it_names() -> None:
    plan = resolve(tiny(encoding="int8", **THREE))
    text = json.dumps(plan.protocol.model_dump(mode="json"))
    step, _ = encode({name: np.full_like(array, 0.25) for name, array in plan.state.items()}, "int8", {})
    after = stepped(plan.state, step, "int8")
    hashes = {"from": state_hash(plan.state), "to": state_hash(after)}

    def asked(tensors: State, held: Start | None, **header: str) -> Start | None:
        return checked_state(plan.protocol, Task(2, text, 1, pack(tensors, hashes | header)), held)

    for held in (begun(plan.state), begun(after)):  # after: this round was begun before
        found = asked(step, held)
        assert found is not None and state_hash(found.state) == found.hash == hashes["to"]
    assert asked(step, None) is None
    other = {name: array * 2 for name, array in after.items()}
    assert asked(step, begun(other)) is None
    for said in hashes.values():  # what was damaged on disk, and says it is not
        assert asked(step, Start(other, said)) is None
    assert asked(step, begun(plan.state), to="0" * 64) is None
    first = next(iter(plan.state))
    with pytest.raises(PolicyRefusal, match=f"the coordinator's step: tensor '{first}' is float32"):
        asked(step | {first: plan.state[first]}, begun(plan.state))


def test_int8_and_noise_at_the_server_are_refused_together() -> None:
    privacy = {"unit": "site", "epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "cohort": 3}
    aggregation = {"weights": "uniform"}
    with pytest.raises(ConfigError, match=r"encoding = 'int8' .* take encoding = 'bfloat16' or 'float32'"):
        tiny(encoding="int8", privacy=privacy, aggregation=aggregation)
    for allowed in ({"encoding": "bfloat16"}, {"encoding": "int8", "privacy": {"noise": "site"}}):
        tiny(**merged({"privacy": privacy, "aggregation": aggregation}, allowed))


def test_the_encoding_is_part_of_what_sites_approve() -> None:
    digests = {tiny(encoding=kind).protocol("0" * 64).digest() for kind in ("float32", "bfloat16", "int8")}
    assert len(digests) == 3


DEEP = {"name": "tiny", "encoding": "int8", "backbone": {"depth": 2}, "training": {"rounds": 3}}
DEEP["evaluation_set"] = {"kind": "procedural", "count": 8}


@dataclasses.dataclass
class Crossed:
    """A run, and every byte of an array that Flower was given on its way."""

    run: RunFolder
    down: dict[int, list[int]]
    up: dict[int, list[int]]


@pytest.fixture(scope="module")
def crossed(data: Path, store: str, tmp_path_factory: pytest.TempPathFactory) -> Crossed:
    """Return a run of int8 both ways on a ViT-Tiny of two blocks that nobody cut, and what crossed."""
    down: dict[int, list[int]] = {}
    up: dict[int, list[int]] = {}

    def count(message: Message, into: dict[int, list[int]], number: int) -> None:
        arrays = [array for record in message.content.array_records.values() for array in record.values()]
        into.setdefault(number, []).append(sum(array.numpy().nbytes for array in arrays))

    class Counting(in_process.InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            for message in messages:
                count(message, down, int(message.metadata.group_id))
            return super().push_messages(messages)

        def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
            for message in super().pull_messages(message_ids):
                count(message, up, int(message.metadata.group_id))
                yield message

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_process, "InProcessGrid", Counting)
        folder = tmp_path_factory.mktemp("whole") / "run"
        run = simulate(tiny(**DEEP), data, folder, store, threads=1)
    return Crossed(run, down, up)


def test_a_round_of_int8_both_ways_moves_a_quarter_of_float32s_bytes(crossed: Crossed) -> None:
    float32 = sum(array.nbytes for array in crossed.run.checkpoint(0).state.values())
    for number in (2, 3):
        assert len(crossed.down[number]) == len(crossed.up[number]) == 2
        assert sum(crossed.down[number] + crossed.up[number]) <= 0.27 * 4 * float32
    assert sum(crossed.down[1]) > 2 * 0.7 * float32  # nobody holds anything yet


def test_the_record_says_the_bytes_that_crossed(crossed: Crossed) -> None:
    for number in (1, 2, 3):
        record = crossed.run.record(number)
        assert record["bytes_sent"] == sum(crossed.down[number])
        assert record["bytes_received"] == sum(crossed.up[number])


def test_killed_while_updates_of_the_second_round_arrive_it_ends_bit_equal(
    crossed: Crossed, data: Path, store: str, tmp_path: Path
) -> None:
    """By SIGKILL, once: tests/test_kill_points.py walks through the places."""
    config = tmp_path / "tiny.toml"
    config.write_text(to_toml(merged(TINY, DEEP)))
    command = ["simulate", str(config), "--data", str(data), "--out", str(tmp_path / "run")]
    command += ["--tracking", store, "--threads", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [program() / "python", "-c", KILLER, "wardround.server.spool.Spool.add", "4", *command],
        cwd=ROOT, env=environment, capture_output=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    subprocess.run([str(program() / "wardround"), *command], cwd=ROOT, env=environment, check=True)
    run = open_run(tmp_path / "run")
    assert final(run) == final(crossed.run)
    assert state_hash(run.checkpoint(3).server) == state_hash(crossed.run.checkpoint(3).server)


def site_of(crossed: Crossed, folder: Path) -> Any:
    """Return a copy of a site whose journal is empty."""
    text = (crossed.run.path / "sites" / "lyon" / "site.toml").read_text()
    folder.mkdir()
    lines = [f'work = "{folder}"' if line.startswith("work") else line for line in text.splitlines()]
    (folder / "site.toml").write_text("\n".join(lines))
    return read_site(folder / "site.toml")


def test_a_dropped_update_takes_its_residual_with_it(crossed: Crossed, tmp_path: Path) -> None:
    run = crossed.run
    text = json.dumps(run.protocol.model_dump(mode="json"))
    states = [pack(run.checkpoint(number).state, {}) for number in (0, 1, 2)]

    def delta(site: Any, number: int, folded: int) -> State:
        answer = run_task(site, Task(number, text, folded, states[number - 1]))
        assert isinstance(answer, bytes)
        return Update.from_bytes(answer).delta

    dropped, absent = (site_of(crossed, tmp_path / name) for name in ("dropped", "absent"))
    assert state_hash(delta(dropped, 1, 0)) == state_hash(delta(absent, 1, 0))
    delta(dropped, 2, 1)  # sent, and not folded
    assert state_hash(delta(dropped, 3, 1)) == state_hash(delta(absent, 3, 1))
    memory = Journal(dropped.work, run.digest, 2).memory(3)
    assert memory is not None and kept(memory)[0].keys() == run.checkpoint(0).state.keys()


def test_a_site_encodes_its_delta_with_what_the_round_before_lost(crossed: Crossed, tmp_path: Path) -> None:
    run = crossed.run
    site = site_of(crossed, tmp_path / "lyon")
    images, state = open_site(site, run.config.data), run.checkpoint(0).state
    residual = {name: np.full_like(array, 0.5) for name, array in state.items()}
    memory = {f"residual.{name}": array for name, array in residual.items()}
    made = [local_round(run.protocol, "lyon", 1, begun(state), m, images, Machine(threads=1)) for m in ({}, memory)]
    plain = run.protocol.model_copy(update={"encoding": "float32"})
    true = local_round(plain, "lyon", 1, begun(state), {}, images, Machine(threads=1))[0].delta
    for (update, after), extra in zip(made, (0.0, 0.5), strict=True):
        came, lost = decode(update.delta, "int8"), kept(after)[0]
        for name, array in true.items():
            np.testing.assert_allclose(came[name] + lost[name], array + extra, atol=1e-6)
    assert layout(true) == architecture(run.protocol)


def test_a_site_that_lost_its_state_says_so_without_training(crossed: Crossed, tmp_path: Path) -> None:
    run = crossed.run
    site = site_of(crossed, tmp_path / "lyon")
    last = run.checkpoint(1)
    hashes = {"from": state_hash(run.checkpoint(0).state), "to": state_hash(last.state)}
    task = Task(2, json.dumps(run.protocol.model_dump(mode="json")), 1, pack(last.step, hashes))
    answer = run_task(site, task)
    assert isinstance(answer, Refusal) and answer.code == "state"
    journal = Journal(site.work, run.digest, 2)
    journal.hold(begun(run.checkpoint(0).state))
    trained = run_task(site, task)
    assert isinstance(trained, bytes)
    assert Update.from_bytes(trained).state == hashes["to"]
    for _ in ("in this process", "in the next"):
        held = journal.held("int8")
        assert held is not None and state_hash(held.state) == held.hash == hashes["to"]
        _held.clear()
    assert run_task(site, task) == trained  # replayed: what is held is now where the step leads
    path = journal.folder / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert journal.held("int8") is None
