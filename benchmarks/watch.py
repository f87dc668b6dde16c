"""What the processes of a benchmark take, sampled while they run."""

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

EVERY = 0.1  # seconds
LIMIT = 900.0  # seconds


@dataclass
class Watched:
    """Samples of some programs and all that they start."""

    cpu: list[tuple[float, float]] = field(default_factory=list)  # (Unix time, CPU seconds until then)
    memory: dict[str, float] = field(default_factory=dict)  # program -> the largest sum of its family's RSS, bytes
    total: float = 0.0  # the largest sum over all families, bytes

    def cpu_at(self, moment: float) -> float:
        """Return the CPU seconds that all had taken at a Unix time."""
        return next((seconds for at, seconds in self.cpu if at >= moment), self.cpu[-1][1])


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
            together = 0.0
            for name, parent in running.items():
                size = 0.0
                for process in family(parent):
                    try:
                        size += process.memory_info().rss
                        times = process.cpu_times()
                    except psutil.Error:  # it ended between the two calls
                        continue
                    seen[process.pid] = times.user + times.system
                found.memory[name] = max(found.memory.get(name, 0.0), size)
                together += size
                if parent.poll():
                    raise SystemExit(last_words(folder / f"{name}.log"))
            found.total = max(found.total, together)
            found.cpu.append((time.time(), sum(seen.values())))
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
