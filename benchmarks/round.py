"""What a round costs beside training, against the floor of moving the same bytes.

    python benchmarks/round.py [--states vit_tiny_patch16_224 vit_base_patch16_224] [--out FILE.json]

Three sites train one step on two small images. A federation of three rounds and one of one round are
run by the command, in one process and deployed (SuperLink, three SuperNodes, TLS and keys on, loopback);
half of the difference is a round. The floors move a round's bytes, one state down and one update up
a site: a copy in memory, and raw TCP on loopback.
"""

import argparse
import csv
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from wardround.config import FederationConfig, parse
from wardround.plan import resolve
from wardround.registry.versions import versions
from wardround.server.run_folder import open_run

SITES = ("lyon", "oslo", "wien")
WARDROUND = [sys.executable, "-m", "wardround.cli"]


@dataclass(frozen=True)
class Cost:
    """What something took; memory is the largest sum over all of its processes."""

    wall: float  # seconds
    cpu: float  # seconds
    memory: float  # bytes


def main() -> None:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--states", nargs="+", default=["vit_tiny_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = {name: measure(name) for name in arguments.states}
    made = Table(title="One round of three sites, beside training")
    for column in ("state", "MB a message", "way", "wall s", "CPU s", "peak MB", "wall / TCP floor"):
        made.add_column(column)
    for name, result in results.items():
        for way, cost in result["costs"].items():
            ratio = f"{cost['wall'] / result['costs']['floor: raw TCP']['wall']:.1f}"
            numbers = (f"{cost['wall']:.2f}", f"{cost['cpu']:.2f}", f"{cost['memory'] / 1e6:,.0f}", ratio)
            made.add_row(name, f"{result['bytes'] / 1e6:.1f}", way, *numbers)
    Console(width=120).print(made)
    report = {"machine": machine(), "versions": versions(), "results": results}
    text = json.dumps(report, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    else:
        print(text)


def measure(name: str) -> dict[str, object]:
    """Return the size of a state's message and what each way of moving it costs."""
    state = resolve(federation(name, 1)).state
    size = sum(array.nbytes for array in state.values())
    costs = {"floor: memory copy": copy_floor(size), "floor: raw TCP": tcp_floor(size)}
    for way, run in (("in one process", in_process), ("deployed", deployed)):
        one, three = run(name, 1), run(name, 3)
        costs[way] = Cost((three.wall - one.wall) / 2, (three.cpu - one.cpu) / 2, three.memory)
    return {"bytes": size, "costs": {way: asdict(cost) for way, cost in costs.items()}}


def federation(name: str, rounds: int) -> FederationConfig:
    """Return a federation whose training is next to nothing."""
    raw = {
        "format": 1,
        "name": "bench",
        "backbone": {"name": name},
        "data": {"image_size": 32},
        "training": {"rounds": rounds, "local_steps": 1, "batch_size": 2, "optimiser_state": "fresh"},
        "membership": {"sites": dict.fromkeys(SITES, 1.0)},
    }
    return parse(raw, FederationConfig, "bench")


def in_process(name: str, rounds: int) -> Cost:
    """Return the cost of `wardround simulate`, training left out."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        config = write_config(home, name, rounds)
        data = write_images(home / "data")
        command = [
            *WARDROUND,
            "simulate",
            str(config),
            "--data",
            str(data),
            "--out",
            str(home / "run"),
            "--threads",
            "1",
        ]
        cost = watch([command], home)
        return without_training(cost, home / "run")


def deployed(name: str, rounds: int) -> Cost:
    """Return the cost of `wardround coordinate` and three `wardround site run`, training left out."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        config = write_config(home, name, rounds)
        data = write_images(home / "data")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        provision = ["provision", str(config), "--out", str(home / "kits"), "--address", f"localhost:{port}"]
        subprocess.run([*WARDROUND, *provision], check=True, capture_output=True)
        digest = resolve(federation(name, rounds)).digest
        commands = []
        for site in SITES:
            path = home / "kits" / site / "site.toml"
            text = path.read_text().replace("approved = []", f"approved = [{json.dumps(digest)}]")
            images = f'[images]\nfolder = {json.dumps(str(data))}\nkind = "labelled"\nsite = "{site}"\n'
            path.write_text(text.replace("[images]\n", images, 1).replace("threads = 0", "threads = 1"))
            commands.append([*WARDROUND, "site", "run", str(path)])
        kit = ["--kit", str(home / "kits" / "coordinator"), "--out", str(home / "run"), "--port", port]
        cost = watch([[*WARDROUND, "coordinate", str(config), *kit], *commands], home)
        return without_training(cost, home / "run")


def watch(commands: list[list[str]], home: Path) -> Cost:
    """Run commands side by side until the first ends; return wall time, CPU time and peak memory of all processes."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}"}
    started = time.monotonic()
    logs = [(home / f"{number}.log").open("wb") for number in range(len(commands))]
    running = [
        psutil.Popen(command, cwd=home, env=environment, stdout=log, stderr=subprocess.STDOUT)
        for command, log in zip(commands, logs, strict=True)
    ]
    peak, seen = 0.0, dict[int, float]()
    while running[0].poll() is None:
        alive = 0.0
        for process in [p for parent in running for p in family(parent)]:
            try:
                alive += process.memory_info().rss
                times = process.cpu_times()
                seen[process.pid] = times.user + times.system
            except psutil.Error:  # it ended between the two calls
                continue
        peak = max(peak, alive)
        time.sleep(0.1)
    wall = time.monotonic() - started
    for process in running[1:]:
        process.terminate()
    for process in running:
        process.wait()
    if running[0].returncode:
        raise SystemExit((home / "0.log").read_text()[-2000:])
    return Cost(wall, sum(seen.values()), peak)


def family(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and all below it that still live."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def without_training(cost: Cost, run: Path) -> Cost:
    """Take the sites' own training seconds off the wall time; a site trains on one thread, so off the CPU time too.

    Deployed, the sites train side by side, so the slowest of a round counts for the wall time.
    """
    records = [open_run(run).record(number) for number in open_run(run).committed()[1:]]
    seconds = [[site["seconds"] for site in record["sites"].values()] for record in records]
    in_turn = (run / "sites").exists()
    wall = sum(sum(each) if in_turn else max(each) for each in seconds)
    return Cost(cost.wall - wall, cost.cpu - sum(map(sum, seconds)), cost.memory)


def copy_floor(size: int) -> Cost:
    """Return the cost of copying a round's bytes once in memory."""
    source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(2 * len(SITES)):
        np.copyto(target, source)
    return Cost(time.perf_counter() - wall, time.process_time() - cpu, 2.0 * size)


def tcp_floor(size: int) -> Cost:
    """Return the cost of sending a round's bytes through one loopback connection."""
    block = bytes(size)

    def receive(server: socket.socket) -> None:
        connection, _ = server.accept()
        buffer = bytearray(1 << 20)
        while connection.recv_into(buffer):
            pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        reader = threading.Thread(target=receive, args=(server,))
        wall, cpu = time.perf_counter(), time.process_time()
        reader.start()
        with socket.create_connection(server.getsockname()) as connection:
            for _ in range(2 * len(SITES)):
                connection.sendall(block)
        reader.join()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu, float(size))


def write_config(home: Path, name: str, rounds: int) -> Path:
    """Write the federation's file."""
    sites = ", ".join(f"{site} = 1.0" for site in SITES)
    path = home / "bench.toml"
    path.write_text(
        f'format = 1\nname = "bench"\n[backbone]\nname = "{name}"\n[data]\nimage_size = 32\n[training]\n'
        f'rounds = {rounds}\nlocal_steps = 1\nbatch_size = 2\noptimiser_state = "fresh"\n'
        f"[membership]\nsites = {{ {sites} }}\n"
    )
    return path


def write_images(folder: Path) -> Path:
    """Write a labelled folder of four random images a site."""
    (folder / "images").mkdir(parents=True)
    draw = np.random.default_rng(0)
    rows = [("file", "label", "patient", "site", "split")]
    for site in SITES:
        for number in range(4):
            name = f"images/{site}{number}.png"
            Image.fromarray(draw.integers(0, 256, (32, 32), np.uint8)).save(folder / name)
            rows.append((name, "a", f"{site}{number}", site, "train"))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def machine() -> str:
    """Return the processor and its cores in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{os.cpu_count()} x {model}, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.system()}"


if __name__ == "__main__":
    main()
