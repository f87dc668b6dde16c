"""What tests share: a tiny federation, and the real images where they lie beside the checkout."""

import contextlib
import csv
import os
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

from wardround.config import FederationConfig, parse
from wardround.config.site import CoordinatorConfig
from wardround.update import Start, State, state_hash

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

# Two workers on two cores: a thread each. Bit-equality tests compare runs with the same count.
torch.set_num_threads(1)

TINY: dict[str, Any] = {
    "format": 1,
    "name": "tiny",
    "seed": 3,
    "backbone": {"patch_size": 8, "depth": 1},
    "method": {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "data": {"image_size": 16},
    "training": {"rounds": 2, "local_steps": 3, "batch_size": 4},
}

# Kills its own process, by a signal, in the n-th call of one function: `python -c KILLER FUNCTION N ARGUMENTS`.
KILLER = """
import os, pkgutil, signal, sys
owner, name = sys.argv.pop(1).rsplit(".", 1)
calls = int(sys.argv.pop(1))
owner = pkgutil.resolve_name(owner)
real = getattr(owner, name)
def deadly(*arguments, **named):
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **named)
setattr(owner, name, deadly)
from wardround.cli import main
main()
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have slow tests: at the end, a core would wait for the other's."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def known_at(kits: Path, address: str, **more: Any) -> CoordinatorConfig:
    """Return how the site 'lyon' of these kits reaches a coordinator, at this address."""
    kit = kits / "lyon"
    files = {"ca_certificate": kit / "ca.crt", "private_key": kit / "site.key", "signing_key": kit / "coordinator.pub"}
    return CoordinatorConfig.model_validate({"address": address, **files, **more})


def begun(state: State) -> Start:
    """Return a state with its hash."""
    return Start(state, state_hash(state))


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a nested dictionary with some of its values changed."""
    out = dict(base)
    for key, value in changes.items():
        out[key] = merged(out.get(key, {}), value) if isinstance(value, dict) else value
    return out


def tiny(**changes: Any) -> FederationConfig:
    """Return a federation that trains in a moment; another method or backbone brings its own settings alone."""
    base = dict(TINY)
    for section in ("method", "backbone"):
        if changes.get(section, {}).get("name") not in (None, base[section].get("name")):
            base[section] = {}
    return parse(merged(base, changes), FederationConfig, "tiny")


def to_toml(tree: dict[str, Any], section: str = "") -> str:
    """Return a nested dictionary of plain values as TOML."""
    import json

    lines = [f"{key} = {json.dumps(value)}" for key, value in tree.items() if not isinstance(value, dict)]
    for key, value in tree.items():
        if isinstance(value, dict):
            name = f"{section}{key}"
            lines.append(f"\n[{name}]\n{to_toml(value, f'{name}.')}")
    return "\n".join(lines) + "\n"


def write_labelled(
    folder: Path, sites: dict[str, int], size: int = 20, channels: int = 1, classes: tuple[str, ...] = ("a", "b")
) -> Path:
    """Write a labelled folder of random images: so many a site, two images a patient, splits by patient."""
    draw = np.random.default_rng(0)
    rows = []
    for site, count in sites.items():
        for number in range(count):
            label = classes[(number // 2) % len(classes)]
            pixels = draw.integers(0, 256, (size, size) if channels == 1 else (size, size, channels), dtype=np.uint8)
            name = f"images/{site}-{number}.png"
            (folder / "images").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name)
            split = ("train", "train", "train", "val", "test")[(number // 2) % 5]
            rows.append((name, label, f"{site}-p{number // 2}", site, split))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label", "patient", "site", "split"), *rows])
    return folder


@contextlib.contextmanager
def serving_in_a_thread(config: uvicorn.Config) -> Iterator[None]:
    """Serve while the block runs."""
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


def end_all(processes: Collection[subprocess.Popen[Any]], seconds: float = 30) -> None:
    """End processes as Ctrl-C would, all at once, and kill those that stay."""
    for process in processes:
        process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        process.wait()


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Return a labelled folder of two sites."""
    return write_labelled(tmp_path / "data", {"lyon": 20, "oslo": 30})


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """Return a function that gives a folder of real images, or skips the test."""

    def find(name: str) -> Path:
        if not (SHARED / name).is_dir():
            pytest.skip(f"the real images of shared/data/{name} are not beside this checkout")
        return SHARED / name

    return find


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return one MLflow store for all tests of a file: making its database takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a labelled folder of two sites."""
    return write_labelled(tmp_path_factory.mktemp("labelled"), {"lyon": 20, "oslo": 30})


@contextlib.contextmanager
def another_account(folder: Path) -> Iterator[None]:
    """Be an account that may not read a folder of mode 0700."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    else:
        folder.chmod(0)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        else:
            folder.chmod(0o700)
