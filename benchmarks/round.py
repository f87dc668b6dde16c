"""What a round costs beside training: Wardround, Flower's own FedAvg, and the floor of moving the bytes.

    python benchmarks/round.py [--states vit_tiny_patch16_224 vit_base_patch16_224] [--out FILE.json]

Three sites train one step on two small images. What is measured are the second and the third round of a
federation that is deployed on loopback, start-up and the first round left out, and half of it is a round:

    in one process          wardround simulate
    deployed, float32       wardround coordinate and three wardround site run, TLS, keys and signatures on
    deployed, int8          the same with encoding = 'int8', both ways
    Flower FedAvg           flower-superlink, three flower-supernode, FedAvg(fraction_evaluate=0); neither TLS nor
                            keys; nothing is trained, a site sends back what came

Training is taken off ours: wall, the slowest site of a round; CPU, what all of them take one after the other in
one process, where a thread has a core to itself. The bytes are those of
the arrays, down and up. The floors copy a round's bytes in memory and send them by raw TCP on loopback.
"""

import argparse
import csv
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file
from views import machine
from watch import Watched, watch

from wardround.config import FederationConfig, parse
from wardround.plan import resolve
from wardround.processes import command, environment, free_port
from wardround.server.run_folder import open_run

SITES = ("lyon", "oslo", "wien")
WARDROUND = [sys.executable, "-m", "wardround.cli"]
ROUNDS = 3
FEDAVG = "Flower FedAvg"


@dataclass(frozen=True)
class Cost:
    """What a round took; memory is the most at a time, of all processes together, what they share counted once."""

    wall: float  # seconds
    cpu: float  # seconds
    bytes: float  # of arrays that crossed
    server: float  # bytes of memory on the coordinator's side, in these rounds
    memory: float  # bytes of memory of all, in these rounds
    start: float  # bytes of memory on the coordinator's side before them; ours plans in a process that loads torch
    trained: float = 0.0  # CPU seconds of training, taken off


def main() -> None:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", nargs="+", default=["vit_tiny_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(), "results": {}}
    for name in arguments.states:
        report["results"][name] = {way: asdict(cost) for way, cost in measure(name).items()}
        if arguments.out:  # after each: a state takes minutes
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    Console(width=130).print(table(report["results"]))


def measure(name: str) -> dict[str, Cost]:
    """Return what a round of a backbone costs each way."""
    config = federation(name, "float32")
    state = resolve(config).state
    size = 2 * len(SITES) * sum(array.nbytes for array in state.values())
    alone = in_process(config)
    return {
        "memory copy": copy_floor(size),
        "raw TCP": tcp_floor(size),
        "in one process": alone,
        "deployed, float32": deployed(config, alone.trained),
        "deployed, int8": deployed(federation(name, "int8"), alone.trained),
        FEDAVG: fedavg(state, size),
    }


def table(results: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Return the costs, and beside each how many times those of FedAvg they are."""
    made = Table(title="One round of three sites, beside training; in brackets against Flower's FedAvg")
    for column in ("backbone", "way", "wall s", "CPU s", "MB that cross", "server MB", "all MB", "server MB before"):
        made.add_column(column, justify="left" if column in ("backbone", "way") else "right")
    for name, costs in results.items():
        for way, cost in costs.items():
            ratios = {
                key: f"({value / costs[FEDAVG][key]:.2f})" if costs[FEDAVG][key] else "" for key, value in cost.items()
            }
            mega = {key: f"{cost[key] / 1e6:,.0f} {ratios[key]}" for key in ("bytes", "server", "memory", "start")}
            times = [f"{cost[key]:.2f} {ratios[key]}" for key in ("wall", "cpu")]
            made.add_row(name, way, *times, mega["bytes"], mega["server"], mega["memory"], mega["start"])
        made.add_section()
    return made


def federation(name: str, encoding: str) -> FederationConfig:
    """Return a federation whose training is next to nothing."""
    return parse(raw(name, encoding), FederationConfig, "bench")


def raw(name: str, encoding: str) -> dict[str, Any]:
    """Return it as a file has it."""
    return {
        "format": 1,
        "name": "bench",
        "encoding": encoding,
        "backbone": {"name": name},
        "data": {"image_size": 32},
        "training": {"rounds": ROUNDS, "local_steps": 1, "batch_size": 2, "optimiser_state": "fresh"},
        "membership": {"sites": dict.fromkeys(SITES, 1.0)},
    }


def in_process(config: FederationConfig) -> Cost:
    """Return the cost of a round of `wardround simulate`."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        path, data = write_config(home, config), write_images(home / "data")
        run = ["simulate", str(path), "--data", str(data), "--out", str(home / "run"), "--threads", "1"]
        return cost_of(home, {"server": [*WARDROUND, *run]})


def deployed(config: FederationConfig, trained: float) -> Cost:
    """Return the cost of a round of `wardround coordinate` and three `wardround site run`, less CPU seconds trained."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        path, data, port = write_config(home, config), write_images(home / "data"), str(free_port())
        provision = ["provision", str(path), "--out", str(home / "kits"), "--address", f"localhost:{port}"]
        subprocess.run([*WARDROUND, *provision], check=True, capture_output=True)
        kit = ["--kit", str(home / "kits" / "coordinator"), "--out", str(home / "run"), "--port", port]
        programs = {"server": [*WARDROUND, "coordinate", str(path), *kit]}
        for site in SITES:
            own = home / "kits" / site / "site.toml"
            text = own.read_text().replace("approved = []", f"approved = [{json.dumps(resolve(config).digest)}]")
            images = f'[images]\nfolder = {json.dumps(str(data))}\nkind = "labelled"\nsite = "{site}"\n'
            least = "\n[minimum]\nimages = 1\nlocal_steps = 1\nbatch_size = 2\n"
            own.write_text(text.replace("[images]\n", images, 1).replace("threads = 0", "threads = 1") + least)
            programs[site] = [*WARDROUND, "site", "run", str(own)]
        return cost_of(home, programs, trained)


def cost_of(home: Path, programs: dict[str, list[str]], trained: float | None = None) -> Cost:
    """Run a federation of ours to its last commit; return a round's cost without the sites' training.

    `trained`: CPU seconds of it; of sites that train one after the other in one process they are the wall's.
    """
    run = home / "run"
    committed = [run / "rounds" / f"{number:05}" / "checkpoint" / "manifest.json" for number in range(1, ROUNDS + 1)]
    environment = dict(environment_of(home), MLFLOW_TRACKING_URI=f"sqlite:///{home / 'mlflow.db'}")
    found = watch(programs, home, environment, committed[-1].exists)
    times = [committed[place].stat().st_mtime for place in (0, -1)]
    records = [open_run(run).record(number) for number in range(2, ROUNDS + 1)]
    seconds = [[site["seconds"] for site in record["sites"].values()] for record in records]
    waited = sum(map(sum if trained is None else max, seconds)) / (ROUNDS - 1)
    crossed = sum(record["bytes_sent"] + record["bytes_received"] for record in records)
    return a_round(found, times, crossed, waited, waited if trained is None else trained)


def a_round(found: Watched, times: list[float], crossed: float, waited: float = 0.0, trained: float = 0.0) -> Cost:
    """Return the cost of one of the rounds between two moments, a round's training taken off."""
    rounds = ROUNDS - 1
    cpu = found.cpu_at(times[1]) - found.cpu_at(times[0])
    wall = times[1] - times[0]
    return Cost(
        wall=wall / rounds - waited,
        cpu=cpu / rounds - trained,
        bytes=crossed / rounds,
        server=found.peak(*times, "server"),
        memory=found.peak(*times),
        start=found.peak(0.0, times[0], "server"),
        trained=trained,
    )


def fedavg(state: dict[str, np.ndarray], size: float) -> Cost:
    """Return the cost of a round of Flower's own FedAvg over its own programs."""
    with tempfile.TemporaryDirectory() as folder:
        home, port = Path(folder), free_port()
        save_file(state, home / "state.safetensors")
        (home / "config.toml").write_text(f'[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
        programs = {"server": command("flower-superlink", "--insecure", "--port", port)}
        programs["server"].append("--disable-runtime-dependency-installation")
        for site in SITES:
            address = ("--insecure", "--superlink", f"127.0.0.1:{port}", "--port", free_port())
            programs[site] = command("flower-supernode", *address)
        times = home / "times.json"
        values = f'state="{home / "state.safetensors"}" rounds={ROUNDS} times="{times}"'
        app = Path(__file__).parent / "flower_fedavg"
        # SuperLink is up by then; FedAvg itself waits for the three sites.
        starter = threading.Timer(15.0, submit, (home, command("flwr", "run", app, "bench", "--run-config", values)))
        starter.start()
        found = watch(programs, home, environment_of(home), lambda: len(read_times(times)) == ROUNDS + 1)
        return a_round(found, [read_times(times)[1], read_times(times)[ROUNDS]], (ROUNDS - 1) * size)


def submit(home: Path, program: list[str]) -> None:
    """Submit the run; the log has what Flower says of it."""
    with (home / "submit.log").open("wb") as log:
        subprocess.run(program, env=environment_of(home), cwd=home, stdout=log, stderr=subprocess.STDOUT, check=False)


def read_times(path: Path) -> list[float]:
    """Return when each round was done, round 0 first; empty while none is."""
    try:
        times: list[float] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return []
    return times


def environment_of(home: Path) -> dict[str, str]:
    """Return what all programs see: one thread each, Flower's state in a folder that goes with the run."""
    return environment(home) | {"OMP_NUM_THREADS": "1"}


def copy_floor(size: int) -> Cost:
    """Return the cost of copying a round's bytes once in memory."""
    source, target = np.ones(size // 6, np.uint8), np.empty(size // 6, np.uint8)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(6):
        np.copyto(target, source)
    return Cost(time.perf_counter() - wall, time.process_time() - cpu, size, 0.0, size / 3, 0.0)


def tcp_floor(size: int) -> Cost:
    """Return the cost of sending a round's bytes through one loopback connection."""
    block = bytes(size // 6)

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
            for _ in range(6):
                connection.sendall(block)
        reader.join()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu, size, 0.0, size / 6, 0.0)


def write_config(home: Path, config: FederationConfig) -> Path:
    """Write the federation's file."""
    path = home / "bench.toml"
    tree = raw(config.backbone.name, config.encoding)
    lines = [f"{key} = {json.dumps(value)}" for key, value in tree.items() if not isinstance(value, dict)]
    for section, values in tree.items():
        if isinstance(values, dict):
            pairs = [f"{key} = {inline(value)}" for key, value in values.items()]
            lines += [f"[{section}]", *pairs]
    path.write_text("\n".join(lines) + "\n")
    return path


def inline(value: object) -> str:
    """Return a value as TOML has it in one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {inline(one)}" for key, one in value.items()) + " }"
    return json.dumps(value)


def write_images(folder: Path, sites: Sequence[str] = SITES, count: int = 4) -> Path:
    """Write a labelled folder of so many random images a site."""
    (folder / "images").mkdir(parents=True)
    draw = np.random.default_rng(0)
    rows = [("file", "label", "patient", "site", "split")]
    for site in sites:
        for number in range(count):
            name = f"images/{site}{number}.png"
            Image.fromarray(draw.integers(0, 256, (32, 32), np.uint8)).save(folder / name)
            rows.append((name, "a", f"{site}{number}", site, "train"))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


if __name__ == "__main__":
    main()
