"""Child processes: they see a clean environment, and none outlives who started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from wardround.errors import ConfigError
from wardround.processes import NewLines, alone, environment, open_log, running

# A program with a child of its own, in a session of its own as SuperLink's is; it prints the child's number.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""


def first_line(log: Path) -> str:
    """Return a log's first line, as soon as it is there."""
    deadline = time.monotonic() + 20
    while "\n" not in (text := log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline, "the program printed nothing for 20 s"
        time.sleep(0.02)
    return text.splitlines()[0]


def gone(number: int) -> bool:
    """Return whether a process ends within five seconds; a zombie, which only awaits its parent, has."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if psutil.Process(number).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_leaving_the_block_ends_a_program_and_its_children(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "program.log"
    with running([sys.executable, "-c", PARENT], tmp_path / "home", log, tmp_path) as process:
        child = int(first_line(log))
    assert process.returncode is not None
    assert gone(child)


def test_a_program_that_ignores_sigterm_is_ended_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wardround.processes._PATIENCE", 0.5)
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    )
    log = tmp_path / "program.log"
    with running([sys.executable, "-c", stubborn], tmp_path / "home", log, tmp_path) as process:
        assert first_line(log) == "on"
    assert gone(process.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent was killed")
def test_a_program_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    owner = f"""
import sys, time
from pathlib import Path
from wardround.processes import running
folder = Path({str(tmp_path)!r})
program = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
with running([sys.executable, "-c", program], folder / "home", folder / "program.log", folder):
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", owner])
    child = int(first_line(tmp_path / "program.log"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gone(child)


def test_what_a_killed_owner_left_on_a_folder_is_ended_before_the_next_begins(tmp_path: Path) -> None:
    home = tmp_path / "home"
    code = "import time; print('on', flush=True); time.sleep(60)"
    left = subprocess.Popen([sys.executable, "-c", code], env=environment(home), stdout=subprocess.PIPE)
    with left:
        assert left.stdout is not None
        left.stdout.readline()
        with alone(home, "wardround coordinate"):
            assert gone(left.pid)


def test_a_shell_that_names_the_folder_itself_is_spared(tmp_path: Path) -> None:
    home = tmp_path / "home"
    code = "import sys, pathlib, wardround.processes as p\nwith p.alone(pathlib.Path(sys.argv[1]), 'x'): print('held')"
    inner = [sys.executable, "-c", code, str(home)]
    shell = f"import subprocess; subprocess.run({inner!r}, check=True); print('spared')"
    said = subprocess.run([sys.executable, "-c", shell], env=environment(home), capture_output=True, check=True)
    assert said.stdout.split() == [b"held", b"spared"]


def test_one_folder_is_held_by_one_process(tmp_path: Path) -> None:
    name = "wardround site run"
    with (
        alone(tmp_path, name),
        pytest.raises(ConfigError, match=f"another '{name}' works in it"),
        alone(tmp_path, name),
    ):
        pass
    with alone(tmp_path, name):
        pass


def test_flower_sends_nothing_home_and_takes_no_setting_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("FLWR_HOME", "elsewhere")
    monkeypatch.setenv("NO_PROXY", "example.org")
    seen = environment(tmp_path)
    assert {name: value for name, value in seen.items() if name.startswith("FLWR_")} == {
        "FLWR_HOME": str(tmp_path),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    assert seen["NO_PROXY"] == seen["no_proxy"] == "example.org,localhost,127.0.0.1"
    assert seen["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_logs_can_be_read_by_nobody_else_and_are_added_to(tmp_path: Path) -> None:
    for word in (b"one\n", b"two\n"):
        with open_log(tmp_path / "logs" / "x.log") as log:
            log.write(word)
    assert (tmp_path / "logs" / "x.log").read_text() == "one\ntwo\n"
    assert (tmp_path / "logs" / "x.log").stat().st_mode & 0o077 == 0


def test_new_lines_are_whole_lines_that_came_since(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("old\n")
    lines = NewLines(path)
    with path.open("a") as log:
        for text, expected in (("a\nb", ["a"]), ("c\n", ["bc"]), ("", [])):
            log.write(text)
            log.flush()
            assert lines.read() == expected


def test_a_log_that_is_cut_by_its_rotation_is_read_on(tmp_path: Path) -> None:
    log = tmp_path / "rounds.log"
    log.write_text("of an earlier start\n")
    lines = NewLines(log)
    with log.open("a") as file:
        file.write("round 1\n")
    assert lines.read() == ["round 1"]
    log.write_text("error: a remedy\n")
    assert lines.read() == ["error: a remedy"]
    assert lines.read() == []
