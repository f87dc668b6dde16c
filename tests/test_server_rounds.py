"""The durable loop: cut anywhere, it ends with the same state; and what it refuses to fold."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from honest_sites import DECLARED, SITES, Cut, Sites, final, ignore, make_run
from safetensors.numpy import save

from wardround.errors import CheckpointError, ConfigError, UpdateError
from wardround.registry.tensors import TensorWriter
from wardround.server import rounds, run_folder
from wardround.server.rounds import run_rounds
from wardround.server.run_folder import RunFolder, open_run
from wardround.server.tracking import round_line
from wardround.update import META, Array, Refusal, State, Task, Update, pack, unpack


def cut_before_folding(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process once the first round is closed."""
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "fold", lambda *_: (_ for _ in ()).throw(Cut))
        with pytest.raises(Cut):
            run_rounds(run, Sites(run), ignore)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the hash of the final state of a run that nobody cut."""
    run = make_run(tmp_path_factory.mktemp("whole") / "run")
    run_rounds(run, Sites(run), ignore)
    return final(run)


def test_a_run_commits_every_round_and_drops_the_updates(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    told: list[int] = []
    run_rounds(run, Sites(run), told.append)
    assert told == [1, 2]
    assert run.committed() == [0, 1, 2]
    assert not list((tmp_path / "run").rglob("updates"))
    assert run.record(2)["last_folded"] == dict.fromkeys(SITES, 2)
    assert sum(site["weight"] for site in run.record(2)["sites"].values()) == pytest.approx(1)


@pytest.mark.parametrize("arrived", [0, 1, 2])
def test_cut_while_updates_arrive_asks_only_who_is_missing(tmp_path: Path, whole: str, arrived: int) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(Cut):
        run_rounds(run, Sites(run, cut_after=arrived), ignore)
    again = Sites(run)
    run_rounds(open_run(tmp_path / "run"), again, ignore)
    assert len([site for site, number in again.asked if number == 1]) == 3 - arrived
    assert final(run) == whole


def test_cut_between_closing_and_commit_folds_the_same_set_without_asking(
    tmp_path: Path, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    cut_before_folding(run, monkeypatch)
    again = Sites(run)
    run_rounds(open_run(tmp_path / "run"), again, ignore)
    assert all(number == 2 for _, number in again.asked)
    assert final(run) == whole


def test_cut_while_the_checkpoint_is_written_leaves_no_half_of_it(
    tmp_path: Path, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    real, written = TensorWriter.put, list[str]()

    def cut_at_second_tensor(file: TensorWriter, name: str, array: Array) -> None:
        written.append(name)
        if len(written) == 2:
            raise Cut
        real(file, name, array)

    with monkeypatch.context() as patch:
        patch.setattr(TensorWriter, "put", cut_at_second_tensor)
        with pytest.raises(Cut):
            run_rounds(run, Sites(run), ignore)
    assert run.committed() == [0]
    run_rounds(open_run(tmp_path / "run"), Sites(run), ignore)
    assert final(run) == whole


def test_updates_are_folded_by_name_and_not_by_arrival(tmp_path: Path, whole: str) -> None:
    run = make_run(tmp_path / "run")

    class Forward(Sites):
        def __call__(self, tasks: Mapping[str, Task]) -> Iterator[tuple[str, bytes | Refusal]]:
            yield from ((site, self.answer(site, task)) for site, task in sorted(tasks.items()))

    run_rounds(run, Forward(run), ignore)
    assert final(run) == whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"site": "lyon"}, "its update says site lyon, expected oslo"),
        ({"protocol": "0" * 64}, "its update says protocol 0000000000000000, expected"),
        ({"round": 7}, "its update says round 7, expected 1"),
        ({"state": "1" * 64}, "its update says state 1111111111111111, expected"),
        ({"declared": dataclasses.replace(DECLARED, images=0)}, "declares 0 images"),
        ({"delta": {}}, "lacks"),
    ],
)
def test_an_update_that_is_not_what_it_should_be_is_not_folded(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    run = make_run(tmp_path / "run", membership={"min_sites": 2})

    class Wrong(Sites):
        def update(self, site: str, task: Task) -> Update:
            update = super().update(site, task)
            return dataclasses.replace(update, **change) if site == "oslo" else update

    run_rounds(run, Wrong(run), ignore)
    assert run.record(1)["sites"].keys() == {"lyon", "wien"}
    assert words in run.record(1)["refused"]["oslo"]
    assert "oslo" not in run.record(2)["last_folded"]


def test_a_non_finite_delta_and_a_huge_block_are_not_folded(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", membership={"min_sites": 1})

    class Broken(Sites):
        def answer(self, site: str, task: Task) -> bytes | Refusal:
            update = self.update(site, task)
            if site == "oslo":
                next(iter(update.delta.values())).flat[0] = np.nan
            return update.to_bytes() + b"\0" * (2_000_000 if site == "wien" else 0)

    run_rounds(run, Broken(run), ignore)
    assert "holds NaN or infinity" in run.record(1)["refused"]["oslo"]
    assert "expected at most" in run.record(1)["refused"]["wien"]


def with_declared(update: Update, **changes: Any) -> bytes:
    """Return an update's bytes with values in its header that `Declared` would not take."""
    delta, header = unpack(update.to_bytes())
    return pack(delta, {**header, "declared": header["declared"] | changes})


def replaced(update: Update, **changes: Any) -> bytes:
    return dataclasses.replace(update, **changes).to_bytes()


HOSTILE: dict[str, Callable[[Update], bytes]] = {
    "a count without end": lambda update: with_declared(update, images=10**400),
    "a loss that nobody can draw": lambda update: with_declared(update, loss=1e308),
    "brackets without end": lambda update: save(update.delta, metadata={META: "[" * 4000 + "]" * 4000}),
    "a list for a name": lambda update: pack(update.delta, unpack(update.to_bytes())[1] | {"site": [["oslo"]]}),
    "no block": lambda update: b"\0",
    "numbers that no site would train from": lambda update: replaced(
        update, delta={name: np.full_like(array, 3e38) for name, array in update.delta.items()}
    ),
}
FORGED = "\x1b]0;owned\x07\nwarning: site 'wien': its key was stolen"
LINES: dict[str, Callable[[Update], bytes]] = {
    "a tensor's name": lambda update: replaced(update, delta={FORGED: np.zeros(1, np.float32)} | update.delta),
    "half of a character": lambda update: replaced(update, site="\ud800"),
    "an encoding": lambda update: replaced(update, encoding=FORGED),
    "an endless state": lambda update: replaced(update, state="e" * 10_000),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_whatever_one_site_sends_is_its_own_refusal_and_the_round_goes_on(tmp_path: Path, kind: str) -> None:
    run = make_run(tmp_path / "run", membership={"min_sites": 2})

    class Hostile(Sites):
        def answer(self, site: str, task: Task) -> bytes | Refusal:
            update = self.update(site, task)
            return HOSTILE[kind](update) if site == "oslo" else update.to_bytes()

    run_rounds(run, Hostile(run), ignore)
    assert run.committed() == [0, 1, 2]
    for number in (1, 2):
        assert run.record(number)["sites"].keys() == {"lyon", "wien"}
        assert run.record(number)["refused"]["oslo"].startswith("invalid: ")


@pytest.mark.parametrize("kind", LINES)
def test_what_a_site_sends_is_told_on_one_short_line_that_moves_no_cursor(tmp_path: Path, kind: str) -> None:
    run = make_run(tmp_path / "run", membership={"min_sites": 2}, training={"rounds": 1})

    class Hostile(Sites):
        def answer(self, site: str, task: Task) -> bytes | Refusal:
            return LINES[kind](self.update(site, task)) if site == "oslo" else super().answer(site, task)

    run_rounds(run, Hostile(run), ignore)
    assert run.record(1)["refused"]["oslo"].startswith("invalid: site 'oslo': ")
    assert len(run.record(1)["refused"]["oslo"]) <= 512
    assert round_line(run, 1).isprintable()


def test_a_refusal_is_kept_as_one_short_line_whoever_handed_it_in(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", membership={"min_sites": 2}, training={"rounds": 1})

    class Hostile(Sites):
        def answer(self, site: str, task: Task) -> bytes | Refusal:
            return Refusal(FORGED, FORGED * 100) if site == "oslo" else super().answer(site, task)

    run_rounds(run, Hostile(run), ignore)
    kept = run.record(1)["refused"]["oslo"]
    assert kept.startswith("?]0;owned??warning: : ?]0;owned??warning: site 'wien'")
    assert kept.isprintable() and len(kept) < 530


def test_too_few_answers_stop_with_each_sites_reason_and_keep_what_came(tmp_path: Path, whole: str) -> None:
    run = make_run(tmp_path / "run")

    class OneRefuses(Sites):
        def answer(self, site: str, task: Task) -> bytes | Refusal:
            return Refusal("policy", "not today") if site == "oslo" else super().answer(site, task)

    with pytest.raises(
        UpdateError, match=r"round 1: 2 of 3 sites gave an update, 3 are needed\. 'oslo' policy: not today\. "
    ):
        run_rounds(run, OneRefuses(run), ignore)
    again = Sites(run)
    run_rounds(run, again, ignore)
    assert again.asked[0] == ("oslo", 1)
    assert final(run) == whole


def test_a_spooled_update_that_changed_after_closing_is_not_folded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    cut_before_folding(run, monkeypatch)
    path = next((tmp_path / "run").rglob("oslo.safetensors"))
    path.write_bytes(path.read_bytes()[:-4] + b"\1\1\1\1")
    with pytest.raises(CheckpointError, match=r"differs from what closed\.json names"):
        run_rounds(run, Sites(run), ignore)


@pytest.mark.parametrize("damage", ["cut", "altered", "missing", "manifest"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    run = make_run(tmp_path / "run")
    path = run.round(0) / "checkpoint" / ("manifest.json" if damage == "manifest" else "state.safetensors")
    if damage == "missing":
        path.unlink()
    elif damage == "altered":
        path.write_bytes(path.read_bytes()[:-1] + b"\7")
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"it is damaged\. Restore it"):
        run_rounds(run, Sites(run), ignore)


def test_a_folder_of_another_config_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=r"belongs to another config \(training\.local_steps is 3 there, 4 here\)"
    ):
        make_run(tmp_path / "run", training={"local_steps": 4})
    assert open_run(tmp_path / "run").config.training.local_steps == 3


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="is not empty and no run of Wardround"):
        make_run(tmp_path)
    with pytest.raises(CheckpointError, match="is no run folder"):
        run_folder.open_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_declared_weights_come_from_the_membership(tmp_path: Path) -> None:
    membership = {"sites": {"lyon": 1.0, "oslo": 2.0, "wien": 5.0}}
    run = make_run(tmp_path / "run", membership=membership, aggregation={"weights": "declared"})
    run_rounds(run, Sites(run), ignore)
    assert {site: v["weight"] for site, v in run.record(1)["sites"].items()} == {
        "lyon": 0.125,
        "oslo": 0.25,
        "wien": 0.625,
    }
    bare = make_run(tmp_path / "bare", aggregation={"weights": "declared"})
    with pytest.raises(ConfigError, match="no declared weight for 'lyon'"):
        run_rounds(bare, Sites(bare), ignore)


def test_server_momentum_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", aggregation={"momentum": 0.9})
    run_rounds(run, Sites(run), ignore)
    one, two = (run.checkpoint(number) for number in (1, 2))
    expected: State = {name: one.state[name] + two.server[name] for name in one.state}
    for name, array in two.state.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)


def test_a_clock_that_is_set_back_in_a_round_makes_it_no_shorter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, clock = make_run(tmp_path / "run"), iter(range(10**9, 0, -3600))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    run_rounds(run, Sites(run), ignore)
    assert all(run.record(number)["seconds"] > 0 for number in (1, 2))
