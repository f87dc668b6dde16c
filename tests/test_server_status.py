"""How a federation stands: from its run folder alone, for a person, for machines, and line by line in its logs."""

import io
import json
import logging
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, tiny
from flwr.app import Message
from honest_sites import SITES, Cut, Sites, ignore, make_run
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from warm import program

import wardround.simulate
from wardround.errors import CheckpointError, ConfigError
from wardround.logs import JsonFormatter, message
from wardround.processes import NewLines, alone, free_port
from wardround.report.status import Status, show, to_json, view
from wardround.server import app, live
from wardround.server.live import Live, Now, read_live
from wardround.server.metrics import serving
from wardround.server.rounds import run_rounds
from wardround.server.run_folder import RunFolder
from wardround.server.status import Watch, status_of
from wardround.simulate import InProcessGrid, simulate


def record(sites: dict[str, dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Return a committed round's record with round numbers."""
    figures = {"seconds": 10.0, "bytes_sent": 3_000_000, "bytes_received": 1_000_000, "refused": {}}
    return {"sites": sites, **figures, **changes}


def text(status: Status, now: float | None = None) -> str:
    """Return what a person reads, without a terminal."""
    console = Console(file=io.StringIO(), width=200)
    console.print(view(status, time.time() if now is None else now))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_run_that_nobody_has_worked_on_says_so(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    status = Watch(tmp_path / "run").look()
    assert (status.committed, status.rounds, status.heard, status.seconds_left) == (0, 2, None, None)
    assert status.open is not None and status.open.state == "not begun"
    assert {site: one.online for site, one in status.sites.items()} == dict.fromkeys(SITES)
    assert "Nobody has worked on this run yet." in text(status)


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no run folder"):
        Watch(tmp_path).look()


def test_an_open_round_that_was_cut_shows_what_arrived_and_who_is_awaited(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(Cut):
        run_rounds(run, Sites(run, cut_after=1), ignore)
    opened = Watch(run.path).look().open
    assert opened is not None and (opened.number, opened.arrived, opened.awaited) == (1, ["wien"], ["lyon", "oslo"])
    run_rounds(run, Sites(run), ignore)
    status = Watch(run.path).look()
    assert (status.open, status.committed, status.updates, status.seconds_left) == (None, 2, 6, 0.0)
    assert status.sites["oslo"].images == len("oslo") + ord("o") and status.sites["oslo"].rounds == 2


def test_figures_are_sums_and_time_left_is_the_mean_of_the_last_five_rounds(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", training={"rounds": 10})
    seconds = [100.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    records = {number: record({"lyon": {"images": 7}}, seconds=each) for number, each in enumerate(seconds, start=1)}
    status = status_of(run, records, Now(), 0.0)
    assert status.seconds_left == pytest.approx(6.0 * 4)  # (2 + 4 + 6 + 8 + 10) / 5 a round, four rounds are left
    assert (status.seconds, status.bytes_out, status.bytes_in, status.updates) == (130.0, 18_000_000, 6_000_000, 6)
    assert [one.number for one in status.recent] == [2, 3, 4, 5, 6]
    # (3 + 1) MB in 6 s
    assert "A round takes 6 s, 3.0 MB out and 1.0 MB in, 0.67 MB/s (mean of the last 5)." in text(status)


def test_who_missed_rounds_is_shown_with_the_last_reason(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", training={"rounds": 5})
    records = {
        1: record({"lyon": {"images": 7}}, refused={"oslo": "silent: was not connected after 600 s"}),
        2: record({"lyon": {"images": 7}}, refused={"oslo": "policy: protocol 1234 is not approved"}),
    }
    status = status_of(run, records, Now(), 0.0)
    assert (status.sites["oslo"].missed, status.refusals) == (2, {"policy": 1, "silent": 1})
    assert "'oslo' missed 2 rounds; the last: round 2: policy: protocol 1234 is not approved" in text(status)


def test_under_privacy_declared_numbers_and_epsilon_stand_where_images_are_withheld(tmp_path: Path) -> None:
    privacy = {"unit": "patient", "epsilon": 8.0, "delta": 1e-5}
    run = make_run(tmp_path / "run", privacy=privacy, membership={"units": dict.fromkeys(SITES, 2000)})
    records = {1: record({"lyon": {"images": None, "units": 2000, "epsilon": 3.1411, "version": "0.1.0"}})}
    status = status_of(run, records, Now(), 0.0)
    assert (status.withheld, status.sites["lyon"].images, status.sites["lyon"].epsilon) == (True, None, 3.1411)
    shown = text(status)
    assert "withheld; 2,000 patients declared" in shown
    assert "3.142 of 8" in shown, "epsilon is rounded up"
    assert "under adding or removing one patient, at delta = 1e-05" in " ".join(shown.split())


def test_a_whole_site_as_unit_spends_for_all(tmp_path: Path) -> None:
    privacy = {"unit": "site", "epsilon": 8.0, "delta": 1e-3, "clip": 1.0, "cohort": 3}
    run = make_run(tmp_path / "run", privacy=privacy, aggregation={"weights": "uniform"})
    assert status_of(run, {}, Now(), 0.0).spent == 0.0
    whole = status_of(run, {1: record({}), 2: record({})}, Now(), 0.0).spent
    assert whole == pytest.approx(8.0, rel=1e-3), "all rounds spend what is promised"


def test_word_that_is_old_says_nothing_of_who_is_connected(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    now = Now(at=1000.0, online=["lyon"], seen={"lyon": 1000.0, "oslo": 400.0})
    fresh, old = (status_of(run, {}, now, at).sites for at in (1003.0, 1100.0))
    assert [fresh[site].online for site in SITES] == [True, False, False]
    assert [old[site].online for site in SITES] == [None, None, None]
    shown = text(status_of(run, {}, now, 1003.0), now=1003.0)
    assert "3 s ago" in shown and "10 min ago" in shown


class Watched(InProcessGrid):
    """A Grid that has a look at the run folder before each answer; in round 1 that of oslo is none."""

    seen: list[Status]
    run_folder: Path

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.seen.append(Watch(self.run_folder).look())
        (message_id,) = message_ids
        task = self.waiting[message_id]
        replies = list(super().pull_messages([message_id]))
        if self.files[task.metadata.dst_node_id][0] == "oslo" and task.metadata.group_id == "1":
            del replies[0].content.array_records["update"]
        return replies


@pytest.fixture(scope="module")
def watched(data: Path, store: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, list[Status]]:
    """Return a run of two sites, one of which is refused in round 1, and how it stood before each answer."""
    folder = tmp_path_factory.mktemp("watched")
    Watched.seen, Watched.run_folder = [], folder / "run"
    config = tiny(membership={"min_sites": 1, "round_seconds": 100.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wardround.simulate, "InProcessGrid", Watched)
        patch.setattr(live, "EVERY", 0.0)  # else a reader may be five seconds behind
        patch.setattr(app, "POLL_SECONDS", 0.0)
        run = simulate(config, data, folder / "run", store, threads=1)
    return run, Watched.seen


def test_a_round_is_followed_while_it_is_open(watched: tuple[RunFolder, list[Status]]) -> None:
    first, second, third, *_ = watched[1]
    assert first.open is not None and second.open is not None and third.open is not None
    assert (first.open.state, first.open.awaited, first.open.arrived) == ("training", ["lyon", "oslo"], [])
    assert first.open.deadline is not None and 90 < first.open.deadline - time.time() + 60 < 170
    assert {site: (one.online, one.doing) for site, one in first.sites.items()} == {
        "lyon": (True, "asked"),
        "oslo": (True, "asked"),
    }
    assert (second.open.awaited, second.open.arrived) == (["oslo"], ["lyon"])
    assert second.sites["lyon"].doing == "arrived"
    assert third.open.number == 2 and third.open.refused == {}, "what was refused in another round is that round's"
    assert third.sites["oslo"].reason == "round 1: invalid: the answer is neither an update nor a refusal"


def test_a_refusal_shows_while_the_round_is_still_open(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(Cut):
        run_rounds(run, Sites(run, cut_after=1), ignore)
    Live(run.path).tell(Now(time.time(), ["lyon"], {}, {"lyon": (1, 5e9)}, {"oslo": (1, "policy: not approved")}))
    opened = Watch(run.path).look().open
    assert opened is not None
    assert (opened.awaited, opened.refused, opened.deadline) == (["lyon"], {"oslo": "policy: not approved"}, 5e9)
    assert "Round 1, without 'oslo': policy: not approved" in text(Watch(run.path).look())


def test_a_site_that_said_nothing_is_silent_and_one_that_said_no_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(Cut):
        run_rounds(run, Sites(run, cut_after=1), ignore)
    refused = {"lyon": (1, "silent: was not connected after 600 s"), "oslo": (1, "policy: not approved")}
    Live(run.path).tell(Now(time.time(), [], {}, {}, refused))
    sites = Watch(run.path).look().sites
    assert {site: one.doing for site, one in sites.items()} == {"lyon": "silent", "oslo": "refused", "wien": "arrived"}


def test_a_coordinator_that_has_ended_is_told_of_and_one_that_runs_is_not(tmp_path: Path) -> None:
    run, ended = make_run(tmp_path / "run"), "has ended: start the same command again to go on"
    with pytest.raises(Cut):
        run_rounds(run, Sites(run, cut_after=1), ignore)
    Live(run.path).tell(Now(time.time(), ["lyon"], {}, {"lyon": (1, 5e9)}))
    with alone(run.path / "flower", "wardround coordinate"):
        status = Watch(run.path).look()
        assert status.open is not None and (status.open.state, status.open.deadline) == ("training", 5e9)
        assert ended not in text(status)
    status = Watch(run.path).look()
    assert status.open is not None and (status.open.state, status.open.deadline) == ("ended", None)
    assert f"Round 1: the coordinator {ended}; 1 arrived; awaited: lyon, oslo." in text(status)
    late = text(status, time.time() + 600)
    assert "last gave word 10 min ago." in late and "busy" not in late
    with alone(run.path / "flower", "wardround coordinate"):
        pass  # whoever looked holds nothing


def test_a_finished_run_is_still_told_of(watched: tuple[RunFolder, list[Status]]) -> None:
    run, _ = watched
    status = Watch(run.path).look()
    assert (status.open, status.committed, status.updates, status.refusals) == (None, 2, 3, {"invalid": 1})
    assert status.sites["oslo"].version and status.sites["oslo"].images == 18
    assert status.bytes_in > 0 and status.bytes_out > 0 and status.heard is not None


def test_the_last_word_is_written_where_something_changes_and_otherwise_seldom(tmp_path: Path) -> None:
    said = Live(tmp_path)
    now = Now(time.time(), ["lyon"])
    said.tell(now)
    first = (tmp_path / "live.json").stat().st_mtime_ns
    said.tell(replace(now, at=now.at + 1, seen={"lyon": now.at + 1}))
    assert (tmp_path / "live.json").stat().st_mtime_ns == first
    said.tell(replace(now, online=[]))
    assert read_live(tmp_path).online == []
    assert [path.name for path in tmp_path.iterdir()] == ["live.json"]


def test_a_disk_that_refuses_stops_no_round_and_a_cut_word_is_none(tmp_path: Path) -> None:
    Live(tmp_path / "gone").tell(Now(time.time()))
    (tmp_path / "live.json").write_text('{"at": 1')
    assert read_live(tmp_path) == Now()


def test_a_site_was_seen_before_the_process_began_anew(tmp_path: Path) -> None:
    Live(tmp_path).tell(Now(5.0, [], {"lyon": 4.0}))
    assert Live(tmp_path).last.seen == {"lyon": 4.0}


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    call = [str(program() / "wardround"), *map(str, arguments)]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_machines_get_json_and_a_pipe_gets_one_print(watched: tuple[RunFolder, list[Status]]) -> None:
    run, _ = watched
    found = json.loads(command("status", run.path, "--json").stdout)
    assert found == json.loads(to_json(Watch(run.path).look()))
    assert found["sites"]["oslo"]["missed"] == 1
    printed = command("status", run.path)
    assert printed.returncode == 0 and "2 of 2 rounds are committed" in printed.stdout
    assert "\x1b[" not in printed.stdout


def test_a_run_that_is_not_there_is_an_error_of_one_line(tmp_path: Path) -> None:
    done = command("status", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is no run folder" in done.stderr


def test_a_terminal_is_drawn_anew_until_the_last_round(
    watched: tuple[RunFolder, list[Status]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wardround.report.status.REFRESH", 0.0)
    states = iter([*watched[1][:2], Watch(watched[0].path).look()])
    drawn = io.StringIO()
    show(lambda: next(states), Console(file=drawn, force_terminal=True, width=120))
    assert "0 of 2 rounds" in drawn.getvalue() and "2 of 2 rounds" in drawn.getvalue()
    assert next(states, None) is None


def test_ctrl_c_ends_a_look_without_an_error(watched: tuple[RunFolder, list[Status]]) -> None:
    looks = iter(watched[1][:1])

    def look() -> Status:
        for status in looks:
            return status
        raise KeyboardInterrupt

    show(look, Console(file=io.StringIO(), force_terminal=True, width=120))


def scraped(port: int) -> dict[tuple[str, ...], float]:
    """Return every sample by its name and its labels' values."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_metrics_are_the_statuss_numbers(watched: tuple[RunFolder, list[Status]]) -> None:
    run, _ = watched
    status, port = Watch(run.path).look(), free_port()
    with serving(run.path, port):
        found = scraped(port)
    assert found["wardround_rounds_committed_total", "tiny"] == 2
    assert found["wardround_updates_folded_total", "tiny"] == 3
    assert found["wardround_refused_total", "tiny", "invalid"] == 1
    assert found["wardround_bytes_received_total", "tiny"] == status.bytes_in
    assert found["wardround_round_seconds_total", "tiny"] == pytest.approx(status.seconds)
    assert not any(name[0].startswith("python_") for name in found), "of the federation only"


def test_the_deadline_of_the_open_round_counts_down(tmp_path: Path) -> None:
    run, port = make_run(tmp_path / "run"), free_port()
    with pytest.raises(Cut):
        run_rounds(run, Sites(run, cut_after=1), ignore)
    Live(run.path).tell(Now(time.time(), ["lyon"], {}, {"lyon": (1, time.time() + 50)}))
    with serving(run.path, port):
        found = scraped(port)
    assert 40 < found["wardround_round_deadline_seconds", "tiny"] <= 50
    assert found["wardround_sites_online", "tiny"] == 1 and found["wardround_site_online", "tiny", "oslo"] == 0
    assert found["wardround_round_awaited", "tiny"] == 2


def test_metrics_listen_on_loopback_alone_and_only_when_asked(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path, None), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 1)
    with serving(tmp_path, port):
        assert scraped(port) == {}, "there is no run folder yet"
        with socket.socket() as other:  # another address of loopback, on which a server of all addresses would listen
            other.settimeout(1)
            assert other.connect_ex(("127.0.0.2", port)) != 0
    refused = pytest.raises(ConfigError, match=r"--metrics .* in use; give")
    with socket.create_server(("127.0.0.1", port)), refused, serving(tmp_path, port):
        pass


def lines(text: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in text.splitlines()]


def test_each_line_of_a_command_is_an_object(watched: tuple[RunFolder, list[Status]], tmp_path: Path) -> None:
    said = lines(command("--log-json", "status", watched[0].path).stdout)
    assert all(line.keys() == {"time", "level", "logger", "message"} for line in said)
    assert any(line["message"].startswith("2 of 2 rounds are committed.") for line in said)
    failed = command("--log-json", "check", tmp_path / "absent.toml")
    (line,) = lines(failed.stderr)
    assert failed.returncode == 2 and line["level"] == "ERROR" and line["message"].startswith("error: ")


def test_a_reader_that_hangs_up_leaves_no_trace(watched: tuple[RunFolder, list[Status]]) -> None:
    call = [sys.executable, "-m", "wardround.cli", "--log-json", "status", str(watched[0].path)]
    with subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


def test_a_process_in_the_background_writes_what_its_watcher_still_understands(tmp_path: Path) -> None:
    code = """
import logging
from wardround import logs
logs.begin()
print("round 1", flush=True)
logging.getLogger("wardround.client.app").warning("site '%s' refuses: %s", "lyon", "not approved")
logging.getLogger("httpx").info("POST")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("x").exception("failed")
"""
    log = tmp_path / "node.log"
    log.touch()
    new, env = NewLines(log), {"WARDROUND_LOG_JSON": "1", "PATH": ""}
    with log.open("ab") as file:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=file, stderr=file, check=True)
    said = lines(log.read_text())
    assert [(line["level"], line["logger"]) for line in said[:2]] == [
        ("INFO", "wardround"),
        ("WARNING", "wardround.client.app"),
    ]
    assert len(said) == 3 and "ZeroDivisionError" in said[2]["message"], "a trace is one line"
    assert new.read()[:2] == ["round 1", "site 'lyon' refuses: not approved"]


def test_a_line_of_json_is_read_for_its_message_and_any_other_as_it_is() -> None:
    line = JsonFormatter().format(logging.LogRecord("x", logging.INFO, "", 1, "round %d", (7,), None))
    assert message(line) == "round 7"
    assert message('{"time": "cut') == '{"time": "cut'
