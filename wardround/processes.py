"""Flower's programs as child processes: found, fed, watched, and never left behind.

Both ends use it: the coordinator for SuperLink, a site for its SuperNode.
"""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from wardround.errors import ConfigError
from wardround.logs import message

_PATIENCE = 10.0  # seconds: Flower's own programs force their exit after five

# Asks Linux for SIGTERM when the thread that started it is gone, then becomes the program. 1 is
# PR_SET_PDEATHSIG of <linux/prctl.h>. Popen's preexec_fn would do, but not beside threads.
_LEASH = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"


def command(name: str, *arguments: str | Path | int) -> list[str]:
    """Return the command line of a program that was installed beside this Python, activated or not."""
    return [str(Path(sys.executable).parent / name), *map(str, arguments)]


def environment(home: Path) -> dict[str, str]:
    """Return what Flower's programs see: state in `home`, nothing sent to Flower's makers, no proxy to loopback."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    bypass = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "localhost,127.0.0.1"]))
    return kept | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": bypass,
        "no_proxy": bypass,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONUNBUFFERED": "1",  # so that a log has the last words of a program that is killed
    }


@contextlib.contextmanager
def running(
    arguments: list[str], home: Path, log: Path, folder: Path, settings: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Give a program that runs in `folder` and writes to `log`; leaving the block ends it and all it started.

    Its session is its own, so that Ctrl-C reaches only us. Where we are killed, Linux ends it; its own
    children watch it and follow. `settings` are variables of its environment that the user's own go before.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open_log(log) as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LEASH, *arguments] if sys.platform == "linux" else arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**(settings or {}), **environment(home)},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _stop(process)


def open_log(path: Path) -> IO[bytes]:
    """Return a log opened to be added to, mode 0600."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "wb")


class NewLines:
    """The lines that are added to a log from now on; one that was cut, as by logrotate, is read from its beginning."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.read_to = log.stat().st_size if log.exists() else 0

    def read(self) -> list[str]:
        """Return what the whole lines say that came since the last call."""
        with contextlib.suppress(FileNotFoundError), self.log.open("rb") as file:
            self.read_to = file.seek(self.read_to if self.read_to <= file.seek(0, os.SEEK_END) else 0)
            whole, end, _ = file.read().rpartition(b"\n")
            self.read_to += len(whole + end)
            return [message(line) for line in whole.decode(errors="replace").split("\n")] if end else []
        return []


def free_port() -> int:
    """Return a loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def alone(home: Path, name: str) -> Iterator[None]:
    """Hold a folder of Flower's state for this process. Raises ConfigError where another one holds it.

    What a killed predecessor left running on it is ended: a ServerApp lives on for some seconds, and
    two must not write to one run folder.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{home.parent}: another '{name}' works in it; stop that one first.") from error
        ours = psutil.Process()
        spared = [ours, *ours.parents()]  # a shell may have set FLWR_HOME itself
        _kill([left for left in psutil.process_iter() if _home_of(left) == str(home) and left not in spared])
        yield


def was_left(home: Path) -> bool:
    """Return whether a process held a folder as `alone` does and has ended, however; False where none ever did."""
    try:
        with (home / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # until the file is closed, at once
            return True
    except OSError:  # there is none, it is held, or it is another account's
        return False


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Make SIGTERM, which containers and systemd send, do what Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _home_of(process: psutil.Process) -> str | None:
    try:
        home: str | None = process.environ().get("FLWR_HOME")
    except (psutil.Error, OSError):  # another user's, or gone
        return None
    return home


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a program and everything below it, asked first, then forced; return when all are gone."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        family = [root, *root.children(recursive=True)]
    try:
        for one in family:
            with contextlib.suppress(psutil.Error):
                one.terminate()
        _wait(family)
    finally:  # where a second Ctrl-C cut the patience short, too
        _kill(family)
        process.wait()


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    _wait(processes)


def _wait(processes: list[psutil.Process]) -> None:
    """Wait until none runs, or the patience is over. Who is dead but not yet reaped, as in a container, is gone."""
    deadline = time.monotonic() + _PATIENCE
    while any(map(_runs, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
