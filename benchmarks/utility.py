"""What federated pretraining is worth on real images: beside central, local-only, random and supervised training.

    python benchmarks/utility.py --suite malaria --data shared/data [--quick] [--out runs/utility] [--device cuda]

Every trained arm sees the same number of images in the same schedule: a single site, or all images in one place,
takes as many steps as all sites of the federation together. Each site is also trained alone for the steps that it
takes in the federation: in the same time. Frozen features are probed (k-NN, linear) at 1, 10 and
100 % of the training labels. The random start, the central and the federated network are also trained on with labels,
at the fractions of --tune: all weights, the first of them from scratch.

Arms:  random, raw pixels, central, federated (FedAvg), FedProx, FedAdam, FedEMA (of MoCo), int8, one site missing,
       patient-level DP, SITE alone, SITE in the same time; the largest site first.
Cells: method x partition x arm x seed. Each is kept in a folder that its config's digest names: a run that was cut
       goes on, and a changed setting trains only what it changes. Of a trained one the release and
       the rounds' records stay. --jobs trains several at a time.

Writes SUITE.json, SUITE.md and SUITE.png into --out. --quick: one seed of SimCLR over the folder's own sites, a short
schedule, meant for ten minutes on two cores. The whole is meant for a GPU, --device cuda --jobs 8.
"""

import argparse
import copy
import csv
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode
from partitions import partition
from rich.console import Console
from tqdm import tqdm
from utility_table import Scored, draw, markdown, tables
from views import machine

from wardround.client.app import app as client_app
from wardround.config import FederationConfig, parse
from wardround.config.federation import DataConfig
from wardround.data import LabelledImages, labelled_sites, read_labelled, select_site
from wardround.downstream.arms import Arm, raw_pixels, release_arm, untrained_arm
from wardround.downstream.evaluate import FRACTIONS, evaluate
from wardround.downstream.finetune import Tuning
from wardround.plan import resolve
from wardround.probe.evaluation import PROBES, Evaluation
from wardround.registry.durable import write_file
from wardround.simulate import simulate

DELTA = 1e-3  # below one over the patients of the largest site
AWAY = 0.3  # share of the rounds that the missing site misses
MISSING = "one site missing"
SERVER_ADAM = {"optimiser": "adam", "momentum": 0.0, "learning_rate": 1e-3, "betas": [0.9, 0.99], "tau": 1e-3}
# What a federated arm changes in the suite's config.
FEDERATED: dict[str, dict[str, Any]] = {
    "federated": {},
    "FedProx": {"training": {"correction": {"name": "fedprox", "mu": 0.01}}},
    "FedAdam": {"aggregation": SERVER_ADAM},
    "FedEMA": {"training": {"correction": {"name": "fedema", "scale": 1.0}}},
    "int8": {"encoding": "int8"},
    MISSING: {"membership": {"min_sites": 1}},
    "patient-level DP": {"privacy": {"unit": "patient", "epsilon": 8.0, "delta": DELTA, "images_per_patient": 8}},
}
ONLY = {"FedEMA": ("moco",), "patient-level DP": ("mae",)}  # which methods they admit, of the suites'
QUICK = ("federated", "int8", MISSING)
TUNED = ("random", "central", "federated")  # which arms are trained on with labels
TUNING = Tuning(ways=("full",), epochs=10)
SAME_CONFIG = ("random", "raw pixels", MISSING)  # as another arm's
QUICK_TRAINING = {"rounds": 6, "local_steps": 8, "warmup_steps": 10}


@dataclass(frozen=True)
class Suite:
    """A labelled folder, and what of it is scored; federation_configs/SUITE_METHOD.toml pretrain on it."""

    folder: str
    label: str
    scored_site: str | None  # where the other sites' labels say too little


SUITES = {
    "malaria": Suite("malaria_cells", "label", scored_site=None),
    "chest": Suite("cxr_pneumonia", "label3", scored_site="guangzhou_paediatric"),
    "blood": Suite("bccd_cells", "label", scored_site=None),
}


@dataclass(frozen=True)
class Cell:
    """One arm trained once."""

    method: str
    partition: str
    arm: str
    seed: int
    config: FederationConfig
    data: Path


def main() -> None:
    """Train and score what is missing, then print and write the tables and the figure."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--suite", choices=SUITES, required=True)
    options.add_argument("--data", type=Path, required=True, help="the folder that holds the suites' folders")
    options.add_argument("--quick", action="store_true")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--methods", nargs="*", default=["simclr", "mae"], choices=["simclr", "mae", "moco"])
    options.add_argument("--partitions", nargs="*", default=["sites", "skew", "iid"])
    options.add_argument("--arms", nargs="*", help="some of the arms")
    options.add_argument("--rounds", type=int, help="a longer or shorter schedule than the config's")
    options.add_argument("--tune", nargs="*", type=float, default=[0.01, 0.1, 1.0], help="fractions to fine-tune at")
    options.add_argument("--out", type=Path, default=Path("runs/utility"))
    options.add_argument("--device", default="cpu")
    options.add_argument("--only-kept", action="store_true", help="train nothing: tell what is there")
    options.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time")
    given = options.parse_args()
    if given.quick:
        given.seeds, given.partitions, given.methods, given.tune = 1, ["sites"], ["simclr"], []
    console = Console(width=150)
    cells = [one for one in plan(given) if not given.only_kept or (folder_of(one, given) / "scores.json").exists()]
    scores = score_all(cells, given)
    scored = [Scored(one.method, one.partition, one.arm, one.seed, scores[folder_of(one, given)]) for one in cells]
    for table in tables(scored):
        console.print(table)
    schedule = f"-{given.rounds}-rounds" if given.rounds else ""
    name = given.out / f"{given.suite}{'-quick' if given.quick else ''}{schedule}"
    said = {"day": str(date.today()), "machine": machine(), "command": " ".join(sys.argv)}
    name.with_suffix(".json").write_text(
        json.dumps({**said, "cells": [one.plain() for one in scored]}, indent=1) + "\n"
    )
    name.with_suffix(".md").write_text(markdown(scored, said))
    draw(scored, name.with_suffix(".png"))
    console.print(f"{name}.json, .md and .png", markup=False)


def plan(given: argparse.Namespace) -> Iterator[Cell]:
    """Give the cells in an order that shows something early: a seed of everything before the next."""
    suite = SUITES[given.suite]
    folder = given.data / suite.folder
    for seed in range(1, given.seeds + 1):
        for method in given.methods:
            base = tomllib.loads(Path(f"federation_configs/{given.suite}_{method}.toml").read_text()) | {"seed": seed}
            if given.quick:
                base["training"] |= QUICK_TRAINING
            if given.rounds:
                base["training"]["rounds"] = given.rounds
            for how in given.partitions:
                dealt = partition(folder, how, seed, suite.label, given.out / "data")
                one = partition(folder, "one", 1, suite.label, given.out / "data")
                for arm, config, data in arms(base, dealt, one, given.quick):
                    if not given.arms or arm in given.arms:
                        yield Cell(method, how, arm, seed, config, data)


def arms(base: dict[str, Any], dealt: Path, one: Path, quick: bool) -> Iterator[tuple[str, FederationConfig, Path]]:
    """Give the arms of a partition: name, what is trained, and on which folder."""
    sites, method = labelled_sites(dealt), base["method"]["name"]
    single = base | {"aggregation": {}}  # whose optimiser is for steps of several sites
    together = merged(single, {"training": longer(base["training"], len(sites))})
    for untrained in ("random", "raw pixels"):
        yield untrained, parse(base, FederationConfig, base["name"]), one
    yield "central", parse(together, FederationConfig, base["name"]), one
    for arm, changes in FEDERATED.items():
        if (quick and arm not in QUICK) or method not in ONLY.get(arm, (method,)):
            continue
        if arm == "patient-level DP":
            units = patients(dealt)
            changes = changes | {"membership": {"units": units}, "training": private(base["training"], units)}
        yield arm, parse(merged(base, changes), FederationConfig, base["name"]), dealt
    by_size = [site for site, _ in images(dealt).most_common()]
    for schedule, how in ((together, "alone"), (single, "in the same time")):
        for site in by_size[:1] if quick else by_size:
            alone = merged(schedule, {"membership": {"sites": {site: 1.0}}})
            yield f"{site} {how}", parse(alone, FederationConfig, base["name"]), dealt


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a config with some keys of some sections changed."""
    made = copy.deepcopy(base)
    for key, value in changes.items():
        made[key] = made.get(key, {}) | value if isinstance(value, dict) else value
    return made


def longer(training: dict[str, Any], times: int) -> dict[str, int]:
    """Return the schedule of one site that takes all sites' steps."""
    return {"local_steps": training["local_steps"] * times, "warmup_steps": training.get("warmup_steps", 0) * times}


def private(training: dict[str, Any], units: dict[str, int]) -> dict[str, float]:
    """Return the schedule under DP: as many images a step, eight of each patient, at a rate for clipped gradients.

    No site is asked for more patients a step than it has.
    """
    return {"batch_size": max(2, min(training["batch_size"] // 8, *units.values())), "learning_rate": 1e-4}


def rows(data: Path) -> list[dict[str, str]]:
    """Return the rows of a dealt folder."""
    with (data / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def images(data: Path) -> Counter[str]:
    """Return the number of training images by site."""
    return Counter(row["site"] for row in rows(data))


def patients(data: Path) -> dict[str, int]:
    """Return the declared patients by site: of a public set they may be counted; rounded down where there are many."""
    counted = Counter(site for site, _ in {(row["site"], row["patient"]) for row in rows(data)})
    return {site: count // 5 * 5 or count for site, count in counted.items()}


def score_all(cells: list[Cell], given: argparse.Namespace) -> dict[Path, Evaluation]:
    """Return the scores of all cells by folder; what several cells share, such as the random start, is made once."""
    wanted = {folder_of(cell, given): cell for cell in cells}
    found: dict[Path, Evaluation] = {}
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(given.jobs, context, share_cores, (given.jobs,)) as workers:
        waiting = {workers.submit(score, cell, folder, given): folder for folder, cell in wanted.items()}
        for done in tqdm(as_completed(waiting), "cells", len(waiting), unit="cell", disable=None):
            folder = waiting[done]
            cell, found[folder] = wanted[folder], done.result()
            auc = Scored(cell.method, cell.partition, cell.arm, cell.seed, found[folder]).auc("linear", 1.0)
            tqdm.write(
                f"[{len(found)}/{len(wanted)}] {cell.method}, {cell.partition}, {cell.arm}, seed {cell.seed}: "
                f"linear AUC {auc:.3f}"
            )
    return found


def share_cores(jobs: int) -> None:
    """Take a worker's share of the cores."""
    torch.set_num_threads(threads(jobs))


def threads(jobs: int) -> int:
    """Return how many threads each of some workers has."""
    return max(1, (os.cpu_count() or 1) // jobs)


def folder_of(cell: Cell, given: argparse.Namespace) -> Path:
    """Return the folder that a cell is kept in."""
    same = cell.arm if cell.arm in SAME_CONFIG else ""
    said = json.dumps([cell.config.model_dump(mode="json"), same, cell.data.name, given.quick], sort_keys=True)
    return given.out / "cells" / hashlib.sha256(said.encode()).hexdigest()[:16]


def score(cell: Cell, folder: Path, given: argparse.Namespace) -> Evaluation:
    """Return a cell's scores, trained and measured now or before: the probes', and where it is tuned those of that."""
    suite = SUITES[given.suite]
    images = labelled(given.data / suite.folder, suite.label, suite.scored_site, cell.config.data)

    def measured(file: str, fractions: tuple[float, ...], tuning: Tuning, draws: int) -> Evaluation:
        kept = folder / file
        if not kept.exists():
            arms = {cell.arm: arm_of(cell, folder / "run", given)}
            found = evaluate(arms, images, fractions, draws=draws, seed=cell.seed, tuning=tuning)
            write_file(kept, found.to_json().encode())
        return Evaluation.from_json(kept.read_text())

    found = measured("scores.json", FRACTIONS, Tuning(ways=()), 5)
    file = f"tuned-{'-'.join(map(str, given.tune))}.json"
    if cell.arm not in TUNED or not given.tune or (given.only_kept and not (folder / file).exists()):
        return found
    tuned = measured(file, tuple(given.tune), TUNING, 3)
    return replace(found, rows=(*found.rows, *(row for row in tuned.rows if row.probe not in PROBES)))


def arm_of(cell: Cell, folder: Path, given: argparse.Namespace) -> Arm:
    """Return what a cell is measured by, trained now or before."""
    if cell.arm == "raw pixels":
        return raw_pixels
    if cell.arm == "random":
        return untrained_arm(resolve(cell.config).protocol, device=given.device)
    if not (folder / "release").exists():
        client = sometimes_away(sorted(labelled_sites(cell.data))[0], cell) if cell.arm == MISSING else client_app
        own = f"mlflow-{multiprocessing.current_process().name}.db"  # SQLite takes one writer at a time
        tracking = f"sqlite:///{(given.out / own).resolve()}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / "run.log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            simulate(cell.config, cell.data, folder, tracking, threads(given.jobs), client)
    shutil.rmtree(folder / "sites", ignore_errors=True)  # a gigabyte a cell, which nobody goes on with
    for tensors in folder.glob("rounds/*/checkpoint/*.safetensors"):
        tensors.unlink()
    return release_arm(folder / "release", device=given.device)


def sometimes_away(site: str, cell: Cell) -> Callable[[Message, Context], Message]:
    """Return what answers for the sites, of which one cannot be reached in 30 % of the rounds, drawn by the seed."""
    missed = rounds_away(cell.seed, cell.config.training.rounds)

    def answer(message: Message, context: Context) -> Message:
        if int(message.metadata.group_id) in missed and Path(context.node_config["site-config"]).parent.name == site:
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION), reply_to=message)
        return client_app(message, context)

    return answer


def rounds_away(seed: int, rounds: int) -> set[int]:
    """Return the rounds that the missing site misses, of 1 to `rounds`."""
    return set(random.Random(seed).sample(range(1, rounds + 1), round(AWAY * rounds)))


@cache
def labelled(folder: Path, label: str, site: str | None, data: DataConfig) -> LabelledImages:
    """Return what arms are measured on: all images of a folder, or of one of its sites."""
    return select_site(read_labelled(folder, data, label), site)


if __name__ == "__main__":
    main()
