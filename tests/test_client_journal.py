"""The site's journal: a round is done once, memory follows what was folded, and the limit holds."""

from pathlib import Path

import numpy as np
import pytest

from wardround.client import journal as module
from wardround.client.journal import STEPS, Journal
from wardround.encoding import encode, stepped
from wardround.errors import BudgetExhausted, CheckpointError, PolicyRefusal, WardroundError
from wardround.registry.tensors import TensorFile
from wardround.update import Declared, Start, State, Update, state_hash

DECLARED = Declared(steps=1, version="0.1.0", images=3, patients=2, loss=0.25)


def block(round: int, state: str = "s") -> bytes:
    return Update("lyon", "d", round, state, DECLARED, {"w": np.full(2, round, np.float32)}).to_bytes()


def memory(round: int) -> State:
    return {"m": np.full(2, round, np.float32)}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path, "d" * 64, 2)


def test_a_finished_round_is_replayed_byte_for_byte_from_the_same_state_only(journal: Journal) -> None:
    assert journal.replay(1, "s") is None
    journal.finish(1, block(1), memory(1), 0)
    assert journal.replay(1, "s") == block(1)
    assert journal.replay(1, "another") is None


def test_the_round_before_is_replayed_too_while_it_is_kept_and_never_trained_again(journal: Journal) -> None:
    journal.finish(1, block(1), memory(1), 0)
    journal.finish(2, block(2), memory(2), last_folded=1)
    assert journal.replay(1, "s") == block(1)
    for state, spoilt in (("another", block(1)), ("s", block(1)[:-1])):
        (journal.folder / "round-00001/update.safetensors").write_bytes(spoilt)
        with pytest.raises(PolicyRefusal, match="round 1 lies behind round 2"):
            journal.replay(1, state)


def begin(journal: Journal, round: int) -> None:
    with journal.training(round):
        pass


def test_rounds_only_go_forward(journal: Journal) -> None:
    journal.finish(2, block(2), memory(2), 1)
    with pytest.raises(PolicyRefusal, match="round 1 lies behind round 2"):
        journal.replay(1, "s")


def test_a_round_is_trained_no_oftener_than_the_site_allows(journal: Journal) -> None:
    for _ in range(2):
        begin(journal, 1)
    with pytest.raises(PolicyRefusal, match="round 1 was trained 2 times already"):
        begin(journal, 1)
    begin(journal, 2)


def test_a_full_disk_is_noticed_before_a_training_is_counted(journal: Journal) -> None:
    journal.check_room(1000)
    with pytest.raises(WardroundError, match="MB are free, and a round may write 1,152,921,504,607 MB; make room"):
        journal.check_room(2**60)


def test_a_training_that_a_refusal_stopped_is_not_counted(journal: Journal) -> None:
    for _ in range(3):
        with pytest.raises(BudgetExhausted), journal.training(1):
            raise BudgetExhausted("no budget")
    begin(journal, 1)


def test_two_rounds_of_memory_are_kept(journal: Journal) -> None:
    for round in (1, 2, 3):
        begin(journal, round)
        journal.finish(round, block(round), memory(round), round - 1)
    assert journal.memory(0) == {}
    assert journal.memory(1) is None
    assert [journal.memory(round)["m"][0] for round in (2, 3)] == [2.0, 3.0]  # type: ignore[index]


def test_the_memory_of_what_was_folded_outlasts_any_number_of_dropped_rounds(journal: Journal) -> None:
    for round in (1, 2, 3, 4):
        journal.finish(round, block(round), memory(round), last_folded=1)
    assert [journal.memory(round)["m"][0] for round in (1, 4)] == [1.0, 4.0]  # type: ignore[index]
    assert journal.memory(2) is None and journal.memory(3) is None


def test_what_a_round_left_that_was_never_finished_goes_with_the_next_one(journal: Journal) -> None:
    journal.finish(1, block(1), memory(1), 0)
    begin(journal, 2)
    journal.midway(2).write_bytes(b"as large as state, teacher and moments")  # cut; the coordinator went on without it
    begin(journal, 3)
    assert journal.midway(2).exists()
    journal.finish(3, block(3), memory(3), last_folded=1)
    assert sorted(folder.name for folder in journal.folder.glob("round-*")) == ["round-00001", "round-00003"]
    with pytest.raises(PolicyRefusal, match="round 2 lies behind round 3"):
        journal.replay(2, "s")


def test_a_damaged_update_is_not_replayed(journal: Journal) -> None:
    journal.finish(1, block(1), memory(1), 0)
    path = next(journal.folder.glob("*/update.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    assert journal.replay(1, "s") is None


def test_memory_that_was_cut_counts_as_lost(journal: Journal) -> None:
    journal.finish(1, block(1), memory(1), 0)
    path = next(journal.folder.glob("*/memory.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    assert journal.memory(1) is None


def test_what_the_journal_writes_is_for_the_site_alone(journal: Journal) -> None:
    begin(journal, 1)
    journal.finish(1, block(1), memory(1), 0)
    assert {path.stat().st_mode & 0o777 for path in journal.folder.rglob("*.*") if path.is_file()} == {0o600}


def states(count: int) -> list[Start]:
    """Return states of which each but the first came by a step from the one before."""
    draw, state = np.random.default_rng(0), {"w": np.zeros(600, np.float32), "n": np.zeros((), np.float32)}
    found = [Start(state, state_hash(state))]
    for _ in range(count - 1):
        delta = {name: np.asarray(draw.normal(size=array.shape), np.float32) for name, array in state.items()}
        step, _ = encode(delta, "int8", {})
        state = stepped(state, step, "int8")
        found.append(Start(state, state_hash(state), step))
    return found


def read_anew(journal: Journal) -> str | None:
    """Return the hash of what another process would find, after seeing that it is that state's."""
    module._held.clear()
    found = journal.held("int8")
    if found is None:
        return None
    assert state_hash(found.state) == found.hash
    return found.hash


def files(journal: Journal) -> list[str]:
    return sorted(path.name for path in journal.folder.glob("*.safetensors"))


def test_a_state_that_came_as_a_step_is_kept_as_one(journal: Journal) -> None:
    for start in states(4):
        journal.hold(start)
        held = journal.held("int8")
        assert held is not None and held.hash == start.hash and held.state is start.state
    whole = TensorFile(journal.folder / "state.safetensors").header["hash"]
    assert files(journal) == ["state.safetensors", *(f"step-0000{number}.safetensors" for number in (1, 2, 3))]
    assert whole == states(1)[0].hash
    assert read_anew(journal) == states(4)[-1].hash
    assert {path.stat().st_mode & 0o777 for path in journal.folder.glob("*.safetensors")} == {0o600}


def test_after_so_many_steps_or_a_restart_the_state_is_written_whole(journal: Journal) -> None:
    all_of_them = states(STEPS + 4)
    for start in all_of_them[: STEPS + 2]:
        journal.hold(start)
    assert files(journal) == ["state.safetensors"]
    journal.hold(all_of_them[STEPS + 2])
    assert len(files(journal)) == 2
    assert read_anew(journal) == all_of_them[STEPS + 2].hash
    journal.hold(all_of_them[-1])
    assert files(journal) == ["state.safetensors"] and read_anew(journal) == all_of_them[-1].hash


def test_a_state_that_came_whole_ends_the_steps(journal: Journal) -> None:
    for start in states(3):
        journal.hold(start)
    other = {"w": np.ones(600, np.float32), "n": np.ones((), np.float32)}
    journal.hold(Start(other, state_hash(other)))
    assert files(journal) == ["state.safetensors"] and read_anew(journal) == state_hash(other)


def test_steps_that_a_kill_left_beside_a_newer_state_are_passed_over(journal: Journal) -> None:
    all_of_them = states(STEPS + 2)
    for start in all_of_them[:-1]:
        journal.hold(start)
    left = {path: path.read_bytes() for path in journal.folder.glob("step-*.safetensors")}
    journal.hold(all_of_them[-1])
    for path, content in left.items():
        path.write_bytes(content)
    assert len(left) == STEPS and read_anew(journal) == all_of_them[-1].hash


def test_what_is_held_is_the_state_before_or_after_whatever_a_write_leaves(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = states(3)
    journal.hold(first)
    journal.hold(second)

    def full(*_: object) -> None:
        raise CheckpointError("no space")

    with monkeypatch.context() as broken, pytest.raises(CheckpointError):
        broken.setattr(module, "write_tensors", full)
        journal.hold(third)
    assert read_anew(journal) == second.hash


def test_a_damaged_or_lacking_step_loses_no_more_than_what_is_held(journal: Journal) -> None:
    for start in states(4):
        journal.hold(start)
    middle = journal.folder / "step-00002.safetensors"
    whole = middle.read_bytes()
    middle.write_bytes(whole[:-1])
    assert read_anew(journal) is None, "the coordinator then sends the whole state"
    middle.unlink()
    assert read_anew(journal) == states(2)[-1].hash, "an earlier state, which no step of the coordinator's starts from"
