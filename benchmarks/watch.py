"""What the processes of a benchmark take, sampled while they run."""

import contextlib
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

EVERY = 0.1  # seconds
WEIGHED = 3  # memory is read at every third look: it takes milliseconds a process
LIMIT = 900.0  # seconds


@dataclass
class Watched:
    """Samples of some programs and all that they start."""

    cpu: list[tuple[float, float]] = field(default_factory=list)  # (Unix time, CPU seconds until then)
    # (Unix time, program -> bytes of its family; what processes share, as libraries, is counted once: Linux's PSS)
    memory: list[tuple[float, dict[str, float]]] = field(default_factory=list)

    def cpu_at(self, moment: float) -> float:
        """Return the CPU seconds that all had taken at a Unix time."""
        return next((seconds for at, seconds in self.cpu if at >= moment), self.cpu[-1][1])

    def peak(self, start: float, end: float, program: str | None = None) -> float:
        """Return the most bytes that a program's family, or all together, had between two Unix times."""
        found = [sizes for at, sizes in self.memory if start <= at <= end]
        return max(sizes[program] if program else sum(sizes.values()) for sizes in found)


def watch(programs: dict[str, list[str]], folder: Path, env: dict[str, str], over: Callable[[], bool]) -> Watched:
    """Run programs side by side until `over`, or until one ends with an error; then end them all.

    What each says lies in FOLDER/NAME.log. Raises SystemExit with the last words of one that failed, or of all
    where they take too long.
    """
    found, seen = Watched(), dict[int, float]()
    running: dict[str, psutil.Popen] = {}
    deadline = time.monotonic() + LIMIT
    for name, program in programs.items():
        with (folder / f"{name}.log").open("wb") as log:
            running[name] = psutil.Popen(program, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        while not over():
            sizes = dict.fromkeys(running, 0.0)
            weighs = len(found.cpu) % WEIGHED == 0
            for name, parent in running.items():
                for process in family(parent):
                    with contextlib.suppress(psutil.Error):  # it ended between two calls
                        times = process.cpu_times()
                        seen[process.pid] = times.user + times.system
                        sizes[name] += process.memory_full_info().pss if weighs else 0.0
                if parent.poll():
                    raise SystemExit(last_words(folder / f"{name}.log"))
            found.cpu.append((time.time(), sum(seen.values())))
            if weighs:
                found.memory.append((time.time(), sizes))
            if time.monotonic() > deadline:
                raise SystemExit("\n".join(last_words(log) for log in sorted(folder.glob("*.log"))))
            time.sleep(EVERY)
    finally:
        end([process for parent in running.values() for process in family(parent)])
    return found


def last_words(log: Path) -> str:
    """Return the end of a log, under its name."""
    return f"{log.name}: {log.read_text(errors='replace')[-1000:]}"


def family(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and all below it that still live."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def end(processes: list[psutil.Process]) -> None:
    """End processes, asked first and then forced."""
    for how in ("terminate", "kill"):
        for process in processes:
            try:
                getattr(process, how)()
            except psutil.Error:
                continue
        _, processes = psutil.wait_procs(processes, timeout=15)


def memory_of(process: psutil.Process) -> tuple[int, int]:
    """Return a process's anonymous memory and all that is resident, files that it maps among it, in bytes."""
    try:
        found = process.memory_info()
    except psutil.Error:
        return 0, 0
    return found.rss - found.shared, found.rss
