"""The site's journal: a round is done once, memory follows what was folded, and the limit holds."""

from pathlib import Path

import numpy as np
import pytest

from wardround.client.journal import Journal
from wardround.errors import BudgetExhausted, PolicyRefusal, WardroundError
from wardround.update import Declared, State, Update

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
