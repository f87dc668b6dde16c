"""A round's memory and time at the coordinator, from 10 sites to 1,000.

    python benchmarks/sites.py [--sites 10 100 1000] [--rules mean median krum] [--out FILE.json]

The real durable loop (asking, checking, spooling with fsync, closing, folding, committing) over a state of
ViT-Tiny, in a process of its own for each row. The sites train nothing: each answers with int8 noise of its own.
Anonymous memory is what a process cannot give back; mapped files are the kernel's to drop.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from views import machine
from watch import memory_of

from wardround.config import FederationConfig, parse
from wardround.encoding import encode, inflate
from wardround.plan import resolve
from wardround.server.rounds import run_rounds
from wardround.server.run_folder import create
from wardround.update import Declared, Refusal, Task, Update, layout, state_hash, unpack

RULES: dict[str, dict[str, Any]] = {
    "mean": {},
    "median": {"rule": "median", "weights": "uniform"},
    "krum": {"rule": "krum", "byzantine": 2, "weights": "uniform"},
}


def main() -> None:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    made = Table(title="One round at the coordinator, ViT-Tiny, int8", title_justify="left")
    for column in ("rule", "sites", "anonymous MB", "with mapped files MB", "s", "ms a site"):
        made.add_column(column, justify="left" if column == "rule" else "right")
    for rule in given.rules:
        for count in given.sites:
            row = in_a_process(rule, count)
            rows.append(row)
            sizes = [f"{row[key] / 1e6:,.0f}" for key in ("anonymous", "resident")]
            if given.out:  # after each: the largest take half an hour
                given.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
            print(rule, count, f"{row['seconds']:.1f} s", flush=True)
            made.add_row(rule, f"{count:,}", *sizes, f"{row['seconds']:.1f}", f"{1000 * row['seconds'] / count:.0f}")
    Console().print(made)


def in_a_process(rule: str, count: int) -> dict[str, Any]:
    """Run a round in a new process and watch its memory."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=one_round, args=(rule, count, theirs))
    child.start()
    theirs.close()  # or a child that dies would be waited for
    ours.recv()  # the round begins
    process, peak = psutil.Process(child.pid), (0, 0)
    while not ours.poll(0.05):
        peak = tuple(map(max, peak, memory_of(process)))
    seconds = ours.recv()
    child.join()
    return {"rule": rule, "sites": count, "seconds": seconds, "anonymous": peak[0], "resident": peak[1]}


def one_round(rule: str, count: int, pipe: Any) -> None:
    """Run one round over so many sites and say how long it took."""
    sites = [f"site-{number:04}" for number in range(count)]
    raw = {
        "format": 1,
        "name": "many",
        "encoding": "int8",
        "backbone": {"name": "vit_tiny_patch16_224"},
        "data": {"image_size": 32},
        "training": {"rounds": 1, "local_steps": 1, "batch_size": 2},
        "aggregation": RULES[rule],
        "membership": {"min_sites": count},
    }
    with tempfile.TemporaryDirectory() as folder:
        run = create(Path(folder) / "run", resolve(parse(raw, FederationConfig, "many")), {s: s for s in sites}, "")
        state = run.checkpoint(0).state
        hashed, shapes = state_hash(state), layout(state)
        del state
        declared = Declared(
            steps=1, version="0", images=4, patients=4, loss_first=1.0, loss=1.0, seconds=0.0,
            effective_rank=9.0, feature_spread=0.8, alignment=0.2, uniformity=2.0, drift="none",
        )  # fmt: skip

        def ask(tasks: Mapping[str, Task]) -> Iterator[tuple[str, bytes | Refusal]]:
            task = next(iter(tasks.values()))
            assert unpack(inflate(task.state, shapes, "float32", "the state"))[0].keys() == shapes.keys()
            for site in tasks:
                began = time.monotonic()
                draw = np.random.default_rng([*site.encode()])
                delta = {name: draw.standard_normal(shape, np.float32) * 1e-3 for name, (shape, _) in shapes.items()}
                encoded, _ = encode(delta, "int8", {})
                block = Update(site, run.digest, 1, hashed, declared, encoded, "int8").to_bytes()
                theirs.append(time.monotonic() - began)
                yield site, block

        theirs: list[float] = []  # seconds of the sites' own work
        pipe.send("begins")
        started = time.monotonic()
        run_rounds(run, ask, lambda _: None)
        pipe.send(time.monotonic() - started - sum(theirs))


if __name__ == "__main__":
    main()
