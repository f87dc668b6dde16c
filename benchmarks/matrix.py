"""Every method on every family of backbones: what trains, what is refused and why.

    python benchmarks/matrix.py [--whole] [--out FILE.md] [--again FILE.json]      (`make matrix` runs it whole)

Each pair is built at its smallest size and checked: the loss and every gradient are finite, every trainable
parameter gets a gradient, the loss falls over 30 steps on one batch (at 1e-3, or where not at 1e-4), the state
goes through safetensors and through an Update and comes back, and the same seed gives the same bits. Without
`--whole`: every method on four backbones. `--again` takes what an earlier run found and checks only what was
broken there. A pair that breaks a promise makes the command exit 1.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from wardround import ssl as methods
from wardround.backbones import FAMILIES, fast_layers
from wardround.backbones.families import VOLUME_FAMILIES
from wardround.config import FederationConfig, parse
from wardround.config.federation import Recipe
from wardround.errors import ConfigError
from wardround.ssl import METHODS, Method
from wardround.ssl.draws import generator
from wardround.ssl.optimiser import adamw
from wardround.update import Declared, State, Update, pack, state_hash, unpack

REPRESENTATIVES = ("vit_tiny_patch16_224", "resnet18", "convnext_atto", "mobilevit_xxs")
STEPS = 30
RATES = (1e-3, 1e-4)  # networks without norms, and ones for 299 pixels at 96, leap at the first
BATCH = 4

# Small heads: what is checked does not depend on their width.
SETTINGS: dict[str, dict[str, Any]] = {
    "mae": {"decoder_dim": 48, "decoder_depth": 1, "mask_ratio": 0.5},
    "simclr": {"hidden_dim": 64, "output_dim": 32},
    "moco": {"hidden_dim": 64, "output_dim": 32},
    "byol": {"hidden_dim": 64, "output_dim": 32},
    "simsiam": {"hidden_dim": 64, "output_dim": 128},
    "dino": {
        "hidden_dim": 64,
        "bottleneck_dim": 32,
        "output_dim": 64,
        "local_views": 1,
        "local_scale": [0.3, 0.6],
        "centre": "public",
    },
    "ijepa": {"predictor_dim": 48, "predictor_depth": 1},
    "vicreg": {"hidden_dim": 64, "output_dim": 64},
}


class LeaptError(Exception):
    """The loss did not fall."""


@dataclass(frozen=True)
class Pair:
    """What was found of one method on one backbone."""

    method: str
    backbone: str
    verdict: str  # trains, refused or broken
    reason: str  # of a refusal or a breach
    first: float = 0.0  # the loss on one batch before the steps
    last: float = 0.0  # and after
    seconds: float = 0.0
    rate: float = RATES[0]  # at which the loss fell


def main() -> None:
    """Check the pairs, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--whole", action="store_true", help="every family instead of four backbones")
    parser.add_argument("--out", type=Path, help="a Markdown file; the figures go beside it as JSON")
    parser.add_argument("--again", type=Path, help="the JSON of an earlier run")
    arguments = parser.parse_args()
    if arguments.again:
        known = [Pair(**pair) for pair in json.loads(arguments.again.read_text())["pairs"]]
        finish([check(p.method, p.backbone) if p.verdict == "broken" else p for p in known], arguments.out)
    wanted = [
        (method, backbone)
        for backbone in (every_family() if arguments.whole else REPRESENTATIVES)
        for method in METHODS
        if not backbone.startswith("monai") or method in ("mae", "simclr")
    ]
    with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,), mp_context=get_context("spawn")) as pool:
        pairs: list[Pair] = []
        for pair in tqdm(pool.map(check, *zip(*wanted, strict=True)), "pairs", len(wanted), unit="pair", disable=None):
            pairs.append(pair)
            if arguments.out:  # after each, so that a run that is cut leaves what it found
                write(pairs, arguments.out)
    finish(pairs, arguments.out)


def finish(pairs: list[Pair], out: Path | None) -> NoReturn:
    """Write and print what was found; end with 1 where a promise is broken."""
    if out:
        write(pairs, out)
    Console().print(table(pairs))
    for pair in pairs:
        if pair.verdict == "broken":
            print(f"broken: {pair.method} on {pair.backbone}: {pair.reason}")
    sys.exit(any(pair.verdict == "broken" for pair in pairs))


def write(pairs: list[Pair], out: Path) -> None:
    """Write the table as Markdown and the figures beside it as JSON."""
    out.write_text(markdown(pairs), encoding="utf-8")
    figures = {"date": str(date.today()), "torch": torch.__version__, "pairs": [vars(pair) for pair in pairs]}
    out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def every_family() -> tuple[str, ...]:
    """Return the smallest architecture of each family."""
    return tuple(family.examples[0] for family in (*FAMILIES.values(), *VOLUME_FAMILIES.values()))


def recipe(method: str, backbone: str, rate: float = RATES[0]) -> FederationConfig:
    """Return a config of a pair at its smallest size."""
    network: dict[str, Any] = {"name": backbone}
    data: dict[str, Any] = {"image_size": 96 if "inception" in backbone or "xception" in backbone else 64}
    if backbone.startswith(("vit", "monai_vit")):
        network |= {"patch_size": 8, "depth": 2}
    if backbone.startswith("monai"):
        # The resnets and Swin have patches of 32 voxels.
        edge = 32 if backbone.startswith("monai_vit") else 64
        data = {"image_size": edge, "dimensions": 3, "spacing": [1.0, 1.0, 1.0]}
    tree = {
        "format": 1,
        "name": "matrix",
        "seed": 5,
        "backbone": network,
        "method": {"name": method, **SETTINGS[method]},
        "data": data,
        "training": {"rounds": 1, "local_steps": STEPS, "batch_size": BATCH, "learning_rate": rate},
    }
    return parse(tree, FederationConfig, f"{method} on {backbone}")


def check(method: str, backbone: str, steps: int = STEPS) -> Pair:
    """Return what a pair keeps of its promises."""
    started = time.perf_counter()
    rates = iter(RATES)
    while True:
        rate = next(rates)
        try:
            config = recipe(method, backbone, rate)
            built = methods.build(config)
        except ConfigError as error:
            return Pair(method, backbone, "refused", str(error))
        try:
            first, last = train(built, config, steps)
            break
        except LeaptError as error:
            if rate == RATES[-1]:
                return Pair(method, backbone, "broken", str(error))
        except (AssertionError, RuntimeError, ValueError, KeyError) as error:
            return Pair(method, backbone, "broken", f"{type(error).__name__}: {str(error)[:200]}")
    try:
        check_state(built, config)
        if steps == STEPS:
            _must(_bits(config) == _bits(config), "the same seed gave different bits")
    except (AssertionError, RuntimeError, ValueError, KeyError) as error:
        return Pair(method, backbone, "broken", f"{type(error).__name__}: {str(error)[:200]}")
    return Pair(method, backbone, "trains", "", first, last, time.perf_counter() - started, rate)


def _bits(config: Recipe) -> str:
    """Return the hash of the state after a step from the seed."""
    built = methods.build(config)
    train(built, config, 1)
    return state_hash(methods.get_state(built))


def train(built: Method, config: Recipe, steps: int) -> tuple[float, float]:
    """Return the loss on one batch before and after so many steps on it."""
    size = 2 if config.data.dimensions == 3 else BATCH
    images = torch.rand(size, *config.data.shape, generator=generator("matrix"))
    inputs = built.prepare(images, generator("matrix", "views"))
    optimiser = adamw(built, config.training)
    built.train()
    losses = []
    touched: set[str] = set()
    for step in range(steps):
        optimiser.zero_grad()
        with fast_layers(images.device):
            loss = built(*inputs).mean()
        loss.backward()
        losses.append(loss.item())
        # Residual branches that start at scale 0 get their gradient from the second step on.
        touched |= {name for name, p in built.named_parameters() if p.grad is not None and p.grad.any()}
        _must(all(p.grad is None or p.grad.isfinite().all() for p in built.parameters()), "a gradient is not finite")
        optimiser.step()
        built.after_step(step)
    _must(bool(np.isfinite(losses).all()), "a loss is not finite")
    if steps > 1:
        lacking = [name for name, p in built.named_parameters() if p.requires_grad and name not in touched]
        _must(not lacking, f"{len(lacking)} parameters never get a gradient, the first '{lacking[:1]}'")
    if steps == STEPS and min(losses[-5:]) >= losses[0]:
        raise LeaptError(f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
    return losses[0], losses[-1]


def check_state(built: Method, config: Recipe) -> None:
    """Take the state through safetensors and through an Update, and back into a new module."""
    state = methods.get_state(built)
    back, _ = unpack(pack(state, {}))
    _must(state_hash(back) == state_hash(state), "safetensors changed the state")
    zero: State = {name: np.zeros_like(array) for name, array in state.items()}
    declared = Declared(steps=1, version="0", images=1, patients=1)
    update = Update("lyon", "0" * 64, 1, state_hash(state), declared, {n: a - zero[n] for n, a in state.items()})
    delta = Update.from_bytes(update.to_bytes()).delta
    other = methods.build(config.model_copy(update={"seed": 6}))
    methods.set_state(other, {name: zero[name] + delta[name] for name in state})
    _must(state_hash(methods.get_state(other)) == state_hash(state), "an update changed the state")


def _must(kept: bool, breach: str) -> None:
    if not kept:
        raise AssertionError(breach)


def table(pairs: list[Pair]) -> Table:
    """Return backbones by methods: the loss before and after, or the refusal."""
    made = Table(title="Methods by backbones: loss on one batch before and after 30 steps", title_justify="left")
    made.add_column("backbone")
    for method in METHODS:
        made.add_column(method, justify="right")
    for backbone in dict.fromkeys(pair.backbone for pair in pairs):
        cells = {pair.method: _cell(pair) for pair in pairs if pair.backbone == backbone}
        made.add_row(backbone, *(cells.get(method, "") for method in METHODS))
    return made


def markdown(pairs: list[Pair]) -> str:
    """Return the same table for a file, and the reasons below it."""
    lines = [f"# Methods by backbones, {date.today()}", "", (__doc__ or "").split("\n\n")[2].replace("\n", " "), ""]
    lines += ["| backbone | " + " | ".join(METHODS) + " |", "|---|" + "---|" * len(METHODS)]
    for backbone in dict.fromkeys(pair.backbone for pair in pairs):
        cells = {pair.method: _cell(pair) for pair in pairs if pair.backbone == backbone}
        lines.append(f"| {backbone} | " + " | ".join(cells.get(method, "") for method in METHODS) + " |")
    lines += ["", "Numbers: the loss on one batch before and after 30 steps. An empty cell was not run.", ""]
    lines += [f"- {pair.method} on {pair.backbone}: {pair.reason}" for pair in pairs if pair.reason]
    return "\n".join(lines) + "\n"


def _cell(pair: Pair) -> str:
    at = f" (at {pair.rate:g})" if pair.rate != RATES[0] else ""
    return f"{pair.first:.2f} to {pair.last:.2f}{at}" if pair.verdict == "trains" else pair.verdict


if __name__ == "__main__":
    main()
