"""The ledger: what was charged stays, whatever is killed, altered, restored or deleted."""

import hashlib
import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from wardround.errors import BudgetExhausted, CheckpointError, PolicyRefusal
from wardround.privacy import chained_table
from wardround.privacy.accounting import Mechanism, epsilon, rounds_left, upward
from wardround.privacy.ledger import LEDGER, Intent, Ledger

DELTA = 1e-5
A_ROUND = Mechanism(rate=1.0, noise=30.0, steps=4)  # without sampling: a closed form, and fast
LYON = Intent("lungs", "a" * 64, 1, "patient", 1.0, A_ROUND)
OTHER = replace(LYON, federation="skin", protocol="b" * 64)
NO_LIMIT = 1000.0


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "work" / "ledger.db")


def charge(ledger: Ledger, intent: Intent = LYON, times: int = 1) -> str:
    """Charge rounds one after the other, as a coordinator that sees each; return the last head."""
    for _ in range(times):
        intent = replace(intent, seen=ledger.charge(intent, NO_LIMIT, DELTA))
    return intent.seen


def tamper(ledger: Ledger, *statements: str) -> None:
    """Change the file as somebody would who knows SQLite."""
    db = sqlite3.connect(ledger.path)
    for trigger in ("no_update", "no_delete", "after_the_last"):
        db.execute(f"DROP TRIGGER {trigger}")
    for statement in statements:
        db.execute(statement)
    db.commit()
    db.close()


def test_a_charge_is_there_for_whoever_opens_the_file_next(ledger: Ledger) -> None:
    assert ledger.head() == "0:" + "0" * 64
    head = ledger.charge(LYON, NO_LIMIT, DELTA)
    (row,) = Ledger(ledger.path).rows()
    assert (row.seq, row.kind, row.count, row.delta, row.intent) == (1, "intent", 1, DELTA, LYON)
    assert head == Ledger(ledger.path).head() == f"1:{row.hash}"
    assert Ledger(ledger.path).mechanisms() == [A_ROUND]


def test_the_chain_is_sha_256_over_number_previous_hash_and_canonical_json(ledger: Ledger) -> None:
    charge(ledger, times=3)
    db = sqlite3.connect(ledger.path)
    previous = "0" * 64
    for seq, before, content, found in db.execute("SELECT * FROM ledger ORDER BY seq"):
        assert before == previous
        assert content == json.dumps(json.loads(content), sort_keys=True, separators=(",", ":"))
        previous = hashlib.sha256(f"{seq}|{before}|{content}".encode()).hexdigest()
        assert found == previous
        assert "epsilon" not in content and '"noise":30.0' in content  # the mechanism, whatever accountant reads it
    db.close()


def test_the_file_is_for_the_site_alone(ledger: Ledger) -> None:
    charge(ledger)
    with chained_table.transaction(ledger.path, LEDGER) as db:
        chained_table.append(db, 2, "{}")  # the journal stands beside the file now
        assert {path.stat().st_mode & 0o777 for path in ledger.path.parent.iterdir()} == {0o600}
        assert len(list(ledger.path.parent.iterdir())) == 2


def test_a_commit_syncs_the_folder_too(ledger: Ledger) -> None:
    """FULL (2) does not: SQLite's journal, deleted at the commit, could be back after a power cut, and undo it."""
    with chained_table.transaction(ledger.path, LEDGER) as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (3,)  # EXTRA
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)  # one file: a copy of it is a copy


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledger SET content = '{}' WHERE seq = 1",
        "DELETE FROM ledger WHERE seq = 2",
        "INSERT OR REPLACE INTO ledger VALUES (1, '', '', '')",
        "INSERT INTO ledger VALUES (-1, '', '', '')",
    ],
)
def test_the_file_itself_refuses_to_change_or_lose_a_row(ledger: Ledger, statement: str) -> None:
    charge(ledger, times=2)
    before = ledger.rows()
    db = sqlite3.connect(ledger.path)
    with pytest.raises(sqlite3.IntegrityError, match="only added to"):
        db.execute(statement)
    db.close()
    assert ledger.rows() == before


@pytest.mark.parametrize(
    ("statements", "first_bad"),
    [
        (["UPDATE ledger SET content = replace(content, '30.0', '90.0') WHERE seq = 2"], "row 2 was altered"),
        (["DELETE FROM ledger WHERE seq = 2"], "row 3 does not follow row 1"),
        (["DELETE FROM ledger WHERE seq = 1"], "row 2 does not follow row 0"),
        (["UPDATE ledger SET seq = seq + 10 WHERE seq = 2"], "row 3 does not follow row 1"),
        (
            [
                "UPDATE ledger SET seq = 9 WHERE seq = 2",
                "UPDATE ledger SET seq = 2 WHERE seq = 3",
                "UPDATE ledger SET seq = 3 WHERE seq = 9",
            ],
            "row 2 was altered",
        ),
    ],
)
def test_an_altered_removed_or_reordered_row_is_named(ledger: Ledger, statements: list[str], first_bad: str) -> None:
    charge(ledger, times=4)
    tamper(ledger, *statements)
    with pytest.raises(CheckpointError, match=first_bad):
        ledger.rows()
    with pytest.raises(CheckpointError, match=first_bad):
        ledger.charge(LYON, NO_LIMIT, DELTA)


@pytest.mark.parametrize("block", [b"not a database, " * 400, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_file_that_is_no_ledger_is_an_error_with_a_remedy(ledger: Ledger, block: bytes) -> None:
    ledger.path.parent.mkdir()
    ledger.path.write_bytes(block)
    with pytest.raises(CheckpointError, match=r"cannot be used as this site's ledger: .* ledger recover"):
        ledger.rows()


def test_past_the_ceiling_nothing_is_written_and_one_line_says_why(ledger: Ledger) -> None:
    fits = rounds_left([], A_ROUND, 1.0, DELTA)
    for _ in range(fits):
        ledger.charge(LYON, 1.0, DELTA)
    before = ledger.rows()
    with pytest.raises(BudgetExhausted) as stop:
        ledger.charge(LYON, 1.0, DELTA)
    spent, after = (epsilon([A_ROUND] * count, DELTA) for count in (fits, fits + 1))
    assert spent <= 1.0 < after
    assert upward(spent) in str(stop.value) and upward(after) in str(stop.value) and "ceiling 1 " in str(stop.value)
    assert "\n" not in str(stop.value)
    assert ledger.rows() == before
    ledger.charge(replace(LYON, mechanism=Mechanism(1.0, 1000.0, 1)), 1.0, DELTA)  # what does fit still goes


def test_the_budget_spans_all_federations(ledger: Ledger) -> None:
    for _ in range(rounds_left([], A_ROUND, 1.0, DELTA)):
        ledger.charge(OTHER, 1.0, DELTA)
    with pytest.raises(BudgetExhausted):
        ledger.charge(LYON, 1.0, DELTA)


def test_a_rerun_is_charged_again(ledger: Ledger) -> None:
    for _ in range(3):
        ledger.charge(LYON, NO_LIMIT, DELTA)
    assert epsilon(ledger.mechanisms(), DELTA) == epsilon([A_ROUND.times(3)], DELTA)


def test_the_first_row_fixes_delta_and_unit(ledger: Ledger) -> None:
    charge(ledger)
    with pytest.raises(BudgetExhausted, match="kept at 1e-05, as its first row fixed; set it back"):
        ledger.charge(LYON, NO_LIMIT, 1e-6)
    with pytest.raises(BudgetExhausted, match="unit is 'image', and this site's ledger counts by the patient"):
        ledger.charge(replace(LYON, unit="image"), NO_LIMIT, DELTA)
    assert len(ledger.rows()) == 1


# Charges in another process until the budget is spent, and says each head once `charge` has returned it.
CHARGER = """
import sys
from pathlib import Path
from wardround.errors import BudgetExhausted
from wardround.privacy.accounting import Mechanism, epsilon
from wardround.privacy.ledger import Intent, Ledger
path, protocol, ceiling = sys.argv[1:]
ledger = Ledger(Path(path))
intent = Intent("lungs", protocol * 64, 1, "patient", 1.0, Mechanism(1.0, 30.0, 4))
epsilon([intent.mechanism], 1e-5)
print("ready", flush=True)
sys.stdin.readline()
try:
    while True:
        print(ledger.charge(intent, float(ceiling), 1e-5), flush=True)
except BudgetExhausted:
    pass
"""


def charger(ledger: Ledger, protocol: str, ceiling: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHARGER, str(ledger.path), protocol, str(ceiling)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_two_processes_cannot_both_spend_the_last_of_the_budget(ledger: Ledger) -> None:
    both = [charger(ledger, protocol, 1.0) for protocol in "ab"]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    heads = [process.communicate()[0].split() for process in both]
    rows = ledger.rows()
    assert [process.returncode for process in both] == [0, 0]
    assert len(rows) == rounds_left([], A_ROUND, 1.0, DELTA)
    assert sorted(heads[0] + heads[1]) == sorted(
        f"{row.seq}:{row.hash}" for row in rows
    )  # none is lost, none said twice


def test_a_site_killed_at_any_moment_keeps_every_charge_that_was_reported(ledger: Ledger) -> None:
    draw, reported = random.Random(7), 0
    for _ in range(4):
        process = charger(ledger, "a", NO_LIMIT)
        process.stdin.write("go\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        time.sleep(draw.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        heads = process.communicate()[0].split()
        rows = ledger.rows()  # opens, and the chain is whole
        assert set(heads) <= {f"{row.seq}:{row.hash}" for row in rows}
        reported += len(heads)
        assert reported <= len(rows) <= reported + 1  # at most the one that was on disk, and not yet said
        reported = len(rows)
    assert reported > 0


def test_what_a_killed_process_left_half_written_is_taken_back(ledger: Ledger) -> None:
    head = charge(ledger, times=2)
    code = """
import os, signal, sys
from pathlib import Path
from wardround.privacy import chained_table
from wardround.privacy.ledger import LEDGER
with chained_table.transaction(Path(sys.argv[1]), LEDGER) as db:
    db.execute("PRAGMA cache_size = 1")  # pages go to the file before the commit
    for seq in range(3, 300):
        chained_table.append(db, seq, "x" * 5000)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    size = ledger.path.stat().st_size
    done = subprocess.run([sys.executable, "-c", code, str(ledger.path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert ledger.path.stat().st_size > size and len(list(ledger.path.parent.iterdir())) == 2  # torn, indeed
    assert ledger.head() == head
    assert ledger.path.stat().st_size == size


def restored(ledger: Ledger) -> None:
    """Charge three rounds, copy the file, charge five more, put the copy back."""
    charge(ledger, times=3)
    shutil.copy(ledger.path, ledger.path.with_name("copy.db"))
    charge(ledger, replace(LYON, seen=ledger.head()), times=5)


def put_back(ledger: Ledger) -> None:
    shutil.move(ledger.path.with_name("copy.db"), ledger.path)


def deleted(ledger: Ledger) -> None:
    ledger.path.unlink()


@pytest.mark.parametrize("lose", [put_back, deleted])
def test_a_ledger_restored_or_deleted_stops_rounds_until_the_gap_is_charged(
    ledger: Ledger, lose: Callable[[Ledger], None]
) -> None:
    restored(ledger)
    seen, truth = ledger.head(), ledger.mechanisms()
    lose(ledger)
    task = replace(LYON, seen=seen)
    for _ in range(2):
        with pytest.raises(PolicyRefusal, match=r"older than what left this site.*ledger recover SITE.toml"):
            ledger.charge(task, NO_LIMIT, DELTA)
    with pytest.raises(PolicyRefusal, match="older"):  # nor anybody else's, against a ledger that says too little
        ledger.charge(OTHER, NO_LIMIT, DELTA)
    assert Ledger(ledger.path).gaps() == [task]  # on disk: recovery asks nobody
    (row,) = ledger.recover(DELTA)
    assert (row.kind, row.seq, row.intent.seen) == ("recovered", 9, seen)
    assert epsilon(ledger.mechanisms(), DELTA) >= epsilon(truth, DELTA)
    assert ledger.gaps() == []
    head = ledger.charge(task, NO_LIMIT, DELTA)
    assert head.startswith("10:")  # longer than all that was seen: the newest is the longest
    charge(ledger, replace(task, seen=head), times=2)


def test_a_recovery_charges_all_from_the_last_head_that_both_sides_knew(ledger: Ledger) -> None:
    restored(ledger)
    seen = ledger.head()
    put_back(ledger)
    assert ledger.rows()[-1].intent.seen.startswith("2:")  # row 3 was written under a task that had seen row 2
    with pytest.raises(PolicyRefusal):
        ledger.confirm(replace(LYON, seen=seen))
    (row,) = ledger.recover(DELTA)
    assert row.count == 8 - 2  # five were lost; that row 3 is the coordinator's row 3 too, nobody here can know


def test_a_ledger_that_went_on_from_an_old_copy_is_noticed_though_it_is_longer(ledger: Ledger) -> None:
    restored(ledger)
    seen, truth = ledger.head(), ledger.mechanisms()
    put_back(ledger)
    charge(ledger, OTHER, times=9)  # another coordinator, which had seen nothing yet
    with pytest.raises(PolicyRefusal, match="older"):
        ledger.charge(replace(LYON, seen=seen), NO_LIMIT, DELTA)
    ledger.recover(DELTA)
    assert sum(each.steps for each in ledger.mechanisms()) >= sum(each.steps for each in truth) + 9 * 4
    ledger.charge(replace(LYON, seen=seen), NO_LIMIT, DELTA)


def test_what_was_lost_is_charged_as_the_costliest_that_is_known(ledger: Ledger) -> None:
    cheap, dear = Mechanism(1.0, 90.0, 4), Mechanism(1.0, 20.0, 4)
    ledger.charge(replace(OTHER, mechanism=dear), NO_LIMIT, DELTA)
    with pytest.raises(PolicyRefusal):
        ledger.confirm(replace(LYON, mechanism=cheap, seen="5:" + "e" * 64))
    assert ledger.recover(DELTA)[0].mechanism == dear.times(5)
    with pytest.raises(PolicyRefusal):
        ledger.confirm(replace(LYON, mechanism=dear, protocol="c" * 64, seen="6:" + "f" * 64))
    assert ledger.recover(DELTA)[0].mechanism == dear.times(6)


def test_without_a_gap_a_recovery_charges_nothing(ledger: Ledger) -> None:
    charge(ledger, times=2)
    assert ledger.recover(DELTA) == []
    assert len(ledger.rows()) == 2


def test_a_coordinator_that_missed_the_last_updates_is_served(ledger: Ledger) -> None:
    older = charge(ledger, times=2)
    charge(ledger, OTHER, times=3)
    assert ledger.charge(replace(LYON, seen=older), NO_LIMIT, DELTA).startswith("6:")
    assert ledger.gaps() == []


def test_only_the_head_that_was_recovered_passes_afterwards(ledger: Ledger) -> None:
    lost = replace(LYON, seen="5:" + "e" * 64)
    with pytest.raises(PolicyRefusal):
        ledger.confirm(lost)
    ledger.recover(DELTA)
    ledger.confirm(lost)
    with pytest.raises(PolicyRefusal):
        ledger.confirm(replace(LYON, seen="5:" + "d" * 64))


@pytest.mark.parametrize("seen", ["5", "5:xyz", "-1:" + "0" * 64, "9" * 30 + ":" + "0" * 64, "x:" + "0" * 64])
def test_a_head_that_is_none_is_refused_and_leaves_no_gap(ledger: Ledger, seen: str) -> None:
    with pytest.raises(PolicyRefusal, match="no LENGTH:HASH"):
        ledger.confirm(replace(LYON, seen=seen))
    assert ledger.gaps() == []


@pytest.mark.parametrize("seed", [39, 46, 48])
def test_whatever_is_restored_all_that_a_coordinator_has_heard_of_is_charged(ledger: Ledger, seed: int) -> None:
    """Random histories of two coordinators: trainings, answers lost on the way, copies made and put back."""
    draw, copies = random.Random(seed), [b""]
    training: dict[str, int] = {}  # hash of a row -> number of the training that it charged
    seen, heard = {"a": "", "b": ""}, {"a": set[int](), "b": set[int]()}
    for number in range(60):
        who = draw.choice("ab")
        head = asked(ledger, replace(LYON, protocol=who * 64, seen=seen[who]))
        training[head] = number
        if draw.random() < 0.7:  # the answer arrives
            seen[who] = head
            heard[who] |= {training[f"{row.seq}:{row.hash}"] for row in ledger.rows() if row.kind == "intent"}
        if draw.random() < 0.3:
            copies.append(ledger.path.read_bytes())
        if draw.random() < 0.15:
            ledger.path.write_bytes(draw.choice(copies))
    for who in draw.sample("ab", 2):
        asked(ledger, replace(LYON, protocol=who * 64, seen=seen[who]))
        assert sum(row.count for row in ledger.rows()) > len(heard[who])
    assert sum(row.count for row in ledger.rows()) > len(heard["a"] | heard["b"]) + 1


def asked(ledger: Ledger, intent: Intent) -> str:
    """Charge an intent, after a recovery where one is needed; return the new head."""
    try:
        return ledger.charge(intent, NO_LIMIT, DELTA)
    except PolicyRefusal:
        ledger.recover(DELTA)
        return ledger.charge(intent, NO_LIMIT, DELTA)
