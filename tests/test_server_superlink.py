"""The command that watches SuperLink and the rounds: what it passes on of their logs is for a terminal to show."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from honest_sites import make_run

from wardround.processes import running
from wardround.server import superlink
from wardround.server.superlink import Died, Link

EVIL = "warning: site 'oslo': \x1b]0;owned\x07\x1b[2J"


def link(folder: Path, code: str) -> Link:
    """Return a SuperLink that is this program, and has ended or will."""
    (folder / "server.crt").touch()
    process = subprocess.Popen([sys.executable, "-c", code])
    return Link(folder, folder, folder / "secret", folder, 1, process)


def test_a_line_of_the_rounds_is_passed_on_as_one_that_moves_no_cursor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextlib.contextmanager
    def rounds(_: list[str], home: Path, log: Path, *others: Any) -> Iterator[subprocess.Popen[bytes]]:
        with running([sys.executable, "-c", f"print({EVIL!r})"], home, log, *others) as process:
            yield process

    monkeypatch.setattr(superlink, "flwr", lambda *_: {"run-id": 1})
    monkeypatch.setattr(superlink, "running", rounds)
    alive = link(tmp_path, "import time; time.sleep(60)")
    try:
        superlink._follow(alive, make_run(tmp_path / "run"))
    finally:
        alive.process.kill()
        alive.process.wait()
    assert capsys.readouterr().out.splitlines() == ["warning: site 'oslo': ?]0;owned??[2J"]


def test_superlinks_last_words_are_passed_on_as_a_line_that_moves_no_cursor(tmp_path: Path) -> None:
    (tmp_path / "superlink.log").write_text(f"\x1b[92mINFO\x1b[0m: {EVIL}\n")
    ended = link(tmp_path, "raise SystemExit(3)")
    ended.process.wait()
    with pytest.raises(Died, match=r"ended with 3: INFO: warning: site 'oslo': \?\]0;owned\?\?\[2J\. See ") as died:
        ended.check()
    assert str(died.value).isprintable()
