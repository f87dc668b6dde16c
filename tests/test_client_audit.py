"""The audit log: every message in and out of a site is in it before the answer leaves, and nothing in it changes."""

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterable
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, tiny, write_labelled
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from warm import program

from wardround import simulate as simulation
from wardround.client import app as client_app
from wardround.client.audit import AuditLog, Crossing, Exchange, Row
from wardround.config import read_site
from wardround.errors import CheckpointError, WardroundError
from wardround.privacy.accounting import Mechanism, epsilon
from wardround.privacy.ledger import Intent, Ledger
from wardround.provision import provision
from wardround.report.audit import log_lines
from wardround.server.rounds import tasks_of
from wardround.server.run_folder import open_run
from wardround.server.tracking import audit_lines
from wardround.signatures import fingerprint
from wardround.simulate import InProcessGrid, simulate
from wardround.update import Task, Update
from wardround.wire import crossing, task_to_records

SITES = ("lyon", "oslo")
ROUNDS = {"training": {"rounds": 2, "local_steps": 1}}


class Wire(InProcessGrid):
    """Production's in-process Grid, which keeps what crosses and what the site had logged by then."""

    seen: list[tuple[str, list[bytes], list[dict[str, Any]]]]

    def _answer(self, message: Message) -> Message:
        site, path = self.files[message.metadata.dst_node_id]
        reply = super()._answer(message)
        logged = [row.flat() for row in AuditLog(read_site(path).work).rows()[0]]
        for way in (message, reply):
            self.seen.append((site, list(crossing(way.content)), logged))
        return reply


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Wire]:
    """Return the run folder of two rounds at two sites, and what crossed."""
    folder, wires = tmp_path_factory.mktemp("audit"), []

    class Kept(Wire):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.seen = []
            wires.append(self)

    data = write_labelled(folder / "data", dict.fromkeys(SITES, 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "InProcessGrid", Kept)
        simulate(tiny(**ROUNDS), data, folder / "run", f"sqlite:///{folder / 'mlflow.db'}", threads=1)
    return folder / "run", wires[0]


def log_of(run: Path, site: str) -> AuditLog:
    return AuditLog(run / "sites" / site)


def tamper(log: AuditLog, statement: str) -> None:
    """Change the file as somebody would who knows SQLite."""
    with closing(sqlite3.connect(log.path)) as db:
        for trigger in ("no_update", "no_delete", "after_the_last"):
            db.execute(f"DROP TRIGGER {trigger}")
        db.execute(statement)
        db.commit()


@pytest.fixture
def copied(finished: tuple[Path, Wire], tmp_path: Path) -> AuditLog:
    """Return a site's log to be spoilt, with the site's journal beside it and its site.toml."""
    shutil.copytree(finished[0] / "sites" / "lyon", tmp_path / "lyon")
    text = (tmp_path / "lyon" / "site.toml").read_text()
    path = tmp_path / "lyon" / "site.toml"
    path.write_text(text.replace(str((finished[0] / "sites" / "lyon").resolve()), str(tmp_path / "lyon")))
    return AuditLog(tmp_path / "lyon")


def wardround(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [str(program() / "wardround"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "160"})


def test_each_message_is_a_row_with_the_bytes_and_the_hash_of_what_crossed(finished: tuple[Path, Wire]) -> None:
    run, wire = finished
    for site in SITES:
        rows = [row.flat() for row in log_of(run, site).verified()[0]]
        ways = [(row["direction"], row["kind"], row["round"]) for row in rows]
        assert ways == [("in", "task", 1), ("out", "update", 1), ("in", "task", 2), ("out", "update", 2)]
        crossed = [parts for name, parts, _ in wire.seen if name == site]
        assert [row["bytes"] for row in rows] == [sum(map(len, parts)) for parts in crossed]
        assert [row["sha256"] for row in rows] == [sha256(b"".join(parts)).hexdigest() for parts in crossed]
        assert {row["peer"] for row in rows} == {"this process"} and {row["epsilon"] for row in rows} == {None}
        assert {row["protocol"] for row in rows} == {open_run(run).digest[:16]}


def test_a_row_is_on_disk_before_the_answer_is_handed_over(finished: tuple[Path, Wire]) -> None:
    for site, parts, logged in finished[1].seen:
        assert sha256(b"".join(parts)).hexdigest() in [row["sha256"] for row in logged], site


def test_the_logs_head_leaves_with_each_update_and_contradicts_what_is_cut_later(
    finished: tuple[Path, Wire], copied: AuditLog
) -> None:
    rows, heads = copied.verified()
    left = [Update.from_bytes(p.read_bytes()) for p in sorted(copied.work.glob("journal/*/*/update.safetensors"))]
    assert [update.declared.audit for update in left] == [f"{rows[n].seq}:{rows[n].hash}" for n in (0, 2)]
    assert heads == 2
    tamper(copied, "DELETE FROM ledger WHERE seq > 2")
    with pytest.raises(
        CheckpointError, match=r"holds up to row 2 \(.*\): an update left with a head of 3 rows that is"
    ):
        copied.verified()


def test_equal_rows_have_unequal_hashes_so_a_head_tells_nothing_of_them(tmp_path: Path) -> None:
    same = Crossing("in", "", "task", 1, "d", 3, "f" * 64)
    heads = {AuditLog(tmp_path / name).add(same) for name in "ab"}
    assert len(heads) == 2 and {head.partition(":")[0] for head in heads} == {"1"}


def test_the_file_is_for_the_site_alone_and_refuses_to_change(copied: AuditLog) -> None:
    assert copied.path.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(copied.path)) as db:
        for statement in ("UPDATE ledger SET content = '{}'", "DELETE FROM ledger"):
            with pytest.raises(sqlite3.IntegrityError, match="only added to"):
                db.execute(statement)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (
            "UPDATE ledger SET content = replace(content, 'update', 'replay') WHERE seq = 2",
            "up to row 1 .* row 2 was alt",
        ),
        ("DELETE FROM ledger WHERE seq = 1", "holds up to no row: row 2 does not follow row 0"),
        ("DELETE FROM ledger WHERE seq = 3", r"holds up to row 2 \(20.*: row 4 does not follow row 2"),
    ],
)
def test_an_altered_log_is_one_line_that_says_up_to_where_it_holds(
    statement: str, words: str, copied: AuditLog
) -> None:
    tamper(copied, statement)
    with pytest.raises(CheckpointError, match=words):
        copied.verified()


def test_the_command_shows_verifies_and_ends_with_2_on_a_cut_log(copied: AuditLog) -> None:
    toml = copied.work / "site.toml"
    shown = wardround("site", "log", toml, "--last", "2")
    assert shown.returncode == 0, shown.stderr
    words = [line.split() for line in shown.stdout.splitlines()]
    assert [row[:1] + row[2:5] for row in words if row[0] in ("2", "3", "4")] == [
        ["3", "in", "task", "2"],
        ["4", "out", "update", "2"],
    ]
    machine = json.loads(wardround("site", "log", toml, "--all", "--json").stdout)
    assert [row["seq"] for row in machine] == [1, 2, 3, 4] and all(len(row["sha256"]) == 64 for row in machine)
    whole = wardround("site", "log", toml, "--verify")
    assert whole.stdout.strip() == "The chain of 4 rows is whole, with 2 heads that left with updates kept here."
    tamper(copied, "DELETE FROM ledger WHERE seq > 1")
    cut = wardround("site", "log", toml, "--verify")
    assert cut.returncode == 2 and cut.stderr.startswith("error: the audit log holds up to row 1 (")
    assert cut.stderr.count("\n") == 1 and "it was cut" in cut.stderr


def test_what_cannot_be_logged_is_not_answered_and_the_reason_does_not_cross(
    copied: AuditLog, caplog: pytest.LogCaptureFixture
) -> None:
    copied.path.write_bytes(b"not a database, " * 400)
    toml = copied.work / "site.toml"
    with pytest.raises(WardroundError) as stop:
        train(toml, task_to_records(Task(1, "{}", 0, b"state"), "lyon", None))
    assert str(stop.value) == "no answer: the reason stands in the site's own log"
    assert stop.value.__cause__ is None and stop.value.__suppress_context__
    assert f"{copied.path}: cannot be used as this site's audit log" in caplog.text


def test_what_other_federations_spend_at_a_site_does_not_cross_in_a_refusal(
    copied: AuditLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither how much, nor by which unit: the ledger counts them all together."""
    ledger = Ledger(copied.work / "ledger.db")
    mechanism = Mechanism(0.5, 1.0, 3)
    ledger.charge(Intent("another", "1" * 64, 1, "patient", 1.0, mechanism, ""), 1e9, 1e-5)

    def charged(*_: Any) -> bytes:
        ledger.charge(Intent("tiny", "2" * 64, 1, "image", 1.0, mechanism, ""), 1e9, 1e-5)
        raise AssertionError("charged by another unit")

    monkeypatch.setitem(client_app.ANSWERS, "task", charged)
    reply = train(copied.work / "site.toml", task_to_records(Task(1, "{}", 0, b"state"), "lyon", None))
    crossed = b"".join(crossing(reply.content))
    assert b"the site's privacy ledger does not admit this round; see its own log" in crossed
    assert b"patient" not in crossed and b"another" not in crossed
    assert "this site's ledger counts by the patient" in caplog.text


def train(toml: Path, records: RecordDict) -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
    message = Message(records, 1, "train", group_id="1")
    message.metadata.__dict__["_message_id"] = "m"
    return client_app.app(message, Context(1, 1, {"site-config": str(toml)}, RecordDict(), {}))


def kinds(log: AuditLog) -> list[tuple[str, str, int]]:
    return [(row.crossing.peer, row.crossing.kind, row.crossing.round) for row in log.verified()[0]]


def test_a_message_that_the_coordinator_did_not_sign_is_logged_as_nobodys(tmp_path: Path) -> None:
    provision(tiny(), tmp_path / "kits", ["lyon", "oslo"], "localhost:1")
    path = tmp_path / "kits" / "lyon" / "site.toml"
    path.write_text(path.read_text().replace('# folder = "/data/images"', 'folder = "images"'))
    site = read_site(path)
    (own, public) = client_app.keys(site)
    assert own is not None and public is not None
    (signing,) = [
        load_pem_private_key(file.read_bytes(), None) for file in (tmp_path / "kits" / "coordinator").glob("*signing*")
    ]
    train(path, task_to_records(Task(7, "{}", 0, b"state"), "lyon", own))
    train(path, task_to_records(Task(7, "{}", 0, b"state"), "lyon", signing))  # type: ignore[arg-type]
    mark = fingerprint(public)
    assert kinds(AuditLog(site.work)) == [
        ("", "unreadable", 0),
        ("", "refusal: policy", 0),
        (mark, "task", 7),
        (mark, "refusal: policy", 7),
    ]


def test_a_replay_is_told_from_an_update(finished: tuple[Path, Wire], copied: AuditLog) -> None:
    run = open_run(finished[0])
    asked = tasks_of(run, run.checkpoint(1), 2, ["lyon"], True)["lyon"]
    train(copied.work / "site.toml", task_to_records(asked, "lyon", None))
    assert kinds(copied)[4:] == [("this process", "task", 2), ("this process", "replay", 2)]
    rows = [row.crossing for row in copied.verified()[0]]
    assert rows[5].sha256 == rows[3].sha256  # byte for byte what had left


@pytest.mark.slow
def test_what_a_private_round_spent_stands_beside_its_update(tmp_path: Path) -> None:
    """Only a trained private round shows that the log and the ledger say the same."""
    privacy = {"unit": "patient", "epsilon": 4.0, "delta": 1e-5, "clip": 0.5}
    config = tiny(
        privacy=privacy, membership={"units": {"lyon": 4, "oslo": 4}}, **ROUNDS, aggregation={"weights": "uniform"}
    )
    data = write_labelled(tmp_path / "data", dict.fromkeys(SITES, 20))
    run = simulate(config, data, tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}", threads=1)
    rows = [row.crossing for row in log_of(run.path, "lyon").verified()[0]]
    spent = Ledger(run.path / "sites/lyon/ledger.db").mechanisms()
    assert [row.epsilon for row in rows] == [None, epsilon(spent[:1], 1e-5), None, epsilon(spent, 1e-5)]
    declared = run.record(2)["sites"]["lyon"]
    assert declared["audit"].startswith("3:") and declared["drift"] is None


def test_a_person_reads_an_epsilon_that_is_rounded_up_and_under_what_it_is_meant() -> None:
    row = Row(1, "a" * 64, "2026-01-01T00:00:00Z", Crossing("out", "peer", "update", 1, "d" * 16, 1, "b" * 64, 3.1411))
    shown = "\n".join(log_lines([row.flat()]))
    assert "3.142" in shown and "adding or removing one of its\nunits" in shown


def test_a_row_is_one_line_of_a_terminal_of_80_columns_below_its_day_and_peer() -> None:
    widest = Crossing(
        "out", "SHA256:" + "k" * 43, "refusal: training", 99_999, "d" * 16, 999_999_999, "b" * 64, 123.456
    )
    unsigned = Crossing("in", "", "unreadable", 0, "", 12, "c" * 64)
    days = ["2026-01-01T23:59:59Z", "2026-01-01T23:59:59Z", "2026-01-02T00:00:00Z"]
    rows = [Row(9_997 + number, "a" * 64, day, widest).flat() for number, day in enumerate(days)]
    lines = log_lines([*rows, Row(10_000, "a" * 64, days[2], unsigned).flat()])
    assert max(len(line) for text in lines for line in text.splitlines()) <= 80
    (kind,) = {line.index("refusal") for line in lines if "refusal" in line}
    assert lines[1].index("kind") == kind  # below its head
    assert [line for line in lines if line.startswith("2026")] == [
        "2026-01-01, with the coordinator of key kkkkkkkk",
        "2026-01-02, with the coordinator of key kkkkkkkk",
        "2026-01-02, with nobody known: the coordinator had not signed it",
    ]


def heads(*lengths: int) -> list[dict[str, dict[str, Any]]]:
    return [{"lyon": {"audit": f"{length}:{'a' * 64}"}, "oslo": {"audit": None}} for length in lengths]


def test_the_coordinator_says_whose_log_did_not_grow() -> None:
    def said(*lengths: int) -> Iterable[str]:
        *before, now = heads(*lengths)
        return audit_lines(now, before)

    assert said(1) == [] and said(1, 3) == [] and said(5, 3, 6) == []
    for lengths in ((1, 3, 3), (5, 2), (9, 3, 8)):
        (line,) = said(*lengths)
        assert line.startswith(
            f"warning: site 'lyon': its audit log has {lengths[-1]} rows, and had {max(lengths[:-1])}"
        )


def test_a_log_put_back_between_two_rounds_is_said_at_the_coordinator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Forgetful(InProcessGrid):
        def _answer(self, message: Message) -> Message:
            site, path = self.files[message.metadata.dst_node_id]
            if (site, message.metadata.group_id) == ("lyon", "2"):
                (read_site(path).work / "audit.db").unlink()
            return super()._answer(message)

    monkeypatch.setattr(simulation, "InProcessGrid", Forgetful)
    data = write_labelled(tmp_path / "data", dict.fromkeys(SITES, 20))
    run = simulate(tiny(**ROUNDS), data, tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}", threads=1)
    assert "warning: site 'lyon': its audit log has 1 rows, and had 1 before: it was cut" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="it was cut"):  # the journal kept what left
        log_of(run.path, "lyon").verified()


def test_an_exchange_that_failed_is_told_as_far_as_it_came() -> None:
    exchange = Exchange("peer", round=3, protocol="d" * 16, epsilon=1.5)
    made = exchange.crossing("out", "refusal: failed", [b"ab", b"c"])
    assert (made.bytes, made.sha256, made.epsilon) == (3, sha256(b"abc").hexdigest(), 1.5)
