"""What a private step costs: time and memory of each way to the clipped sum, over the plain step's.

    python benchmarks/privacy.py [--cases NAME ...] [--engines NAME ...] [--rounds 5] [--device cuda] [--out FILE.json]

A step is forward, backward and clipping, without noise and without an optimiser. Engines take turns in one process,
on one thread, each with its own copy of the network; a CPU's time is process time, a GPU's is wall time.
Ratios are taken within a round: median and range. One image is one unit; a unit of BYOL has two rows.

    plain         as a site trains without privacy: one joint gradient, its norm clipped
    bookkeeping   ours
    hooks, ghost, functorch, ew    Opacus's `wrap_model`, by the name of its grad_sample_mode; gradients of rows are
                  summed inside the unit and clipped as Opacus's optimiser does; ghost's loss is weighted
    vmap          torch.func: the gradient of one image, vectorised
    noise         drawing the noise of a step, which all engines pay alike, and a batch of any size once

All but vmap, which does not admit it, have the forward pass's linear layers by oneDNN where that is faster.

Memory is the largest sum of tensors alive at once beyond those from before the step, gradients included: from torch's
profiler, which sees each tensor that a CPU's allocator gives and takes back, or from the allocator of a GPU.
What oneDNN and MKL take inside one operation is not in it. An engine that fails shows its error's first words, one
whose sum differs from ours says so, and neither has a number.
"""

import argparse
import copy
import json
import warnings
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from step import DECODER, MAES, device_name, measured, recipe
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.profiler import ProfilerActivity, profile
from views import cell, machine

from wardround import ssl as methods
from wardround.backbones import fast_layers
from wardround.config import FederationConfig
from wardround.privacy.bookkeeping import clipped_sum, weights
from wardround.privacy.grouping import Grouping
from wardround.privacy.method import trained
from wardround.privacy.noise import standard_normal
from wardround.privacy.rows import rows_of_calls
from wardround.ssl.devices import Machine, open_fabric
from wardround.ssl.engine import Plain
from wardround.ssl.method import Method

Sums = dict[str, Tensor]
Step = Callable[[], Sums]  # one step; returns the clipped sum by parameter name
Engine = Callable[[Method, FederationConfig, tuple[Tensor, ...], str], Step]

CLIP = 0.1
SAME = 1e-3  # how far two engines' sums in float32 may be from each other, relative to their norm

CASES: dict[str, tuple[str, dict[str, Any], int, int]] = {  # method, backbone, edge of an image, batch
    "mae-ti-64-8": ("mae", {"name": "vit_tiny_patch16_224", "patch_size": 8}, 64, 8),
    "mae-ti-64-32": ("mae", {"name": "vit_tiny_patch16_224", "patch_size": 8}, 64, 32),
    "mae-ti-224-8": ("mae", {"name": "vit_tiny_patch16_224", "patch_size": 16}, 224, 8),
    "mae-b-224-4": ("mae", {"name": "vit_base_patch16_224", "patch_size": 16}, 224, 4),
    "byol-r18-64-8": ("byol", {"name": "resnet18"}, 64, 8),
    "byol-r18-64-32": ("byol", {"name": "resnet18"}, 64, 32),
    "byol-r50-64-8": ("byol", {"name": "resnet50"}, 64, 8),
}


def main() -> None:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES)[1:], default=list(ENGINES)[1:])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.device == "cpu" else torch.get_num_threads())
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # of Opacus's, on the first layer
    warnings.filterwarnings("ignore", message="There is a performance drop")  # attention has no rule for vmap
    report = {"date": str(date.today()), "machine": machine(), "device": device_name(arguments.device), "cases": []}
    for name in arguments.cases:
        report["cases"].append(case(name, arguments.engines, arguments.rounds, arguments.device))
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report)


def case(name: str, engines: list[str], rounds: int, device: str) -> dict[str, Any]:
    """Return what one method on one network costs by each engine."""
    method, backbone, size, batch = CASES[name]
    decoder = dict(zip(DECODER, MAES[backbone["name"]][3:], strict=True)) if method == "mae" else {}
    config = recipe({"name": method, **decoder}, backbone, size, batch, "float32")
    built = methods.build(config).to(device)
    images = torch.rand(batch, *config.data.shape, generator=torch.Generator().manual_seed(1)).to(device)
    inputs = built.prepare(images, torch.Generator().manual_seed(2))
    steps = {"plain": _plain(copy.deepcopy(built), config, inputs, device)}
    own = book_keeping(copy.deepcopy(built), config, inputs, device)
    failed, ours = {}, own()
    for engine in engines:
        try:
            step = own if engine == "bookkeeping" else ENGINES[engine](copy.deepcopy(built), config, inputs, device)
            found = step()
        except Exception as error:  # whatever a peer raises is its result
            failed[engine] = " ".join(f"{type(error).__name__}: {error}".split())[:90]
            continue
        distance = far(found, ours) if found else 0.0
        if distance < SAME:
            steps[engine] = step
        else:
            failed[engine] = f"its sum differs by {distance:.1g}"
    del ours
    memory = {engine: peak(step, device) for engine, step in steps.items()}
    times = measured({engine: partial(_run, step) for engine, step in steps.items()}, rounds, device)
    return {"case": name, "batch": batch, "size": size, **times, "peak_bytes": memory, "failed": failed}


def _run(step: Step) -> float:
    step()
    return 0.0


@torch.no_grad()
def far(found: Sums, ours: Sums) -> float:
    """Return the norm of the difference over the norm."""
    apart = sum(float((found[name] - total).square().sum()) for name, total in ours.items())
    return float((apart / sum(float(total.square().sum()) for total in ours.values())) ** 0.5)


def _plain(built: Method, config: FederationConfig, inputs: tuple[Tensor, ...], device: str) -> Step:
    engine = Plain(
        built, np.zeros((1, *config.data.shape), np.uint8), config, "benchmark", open_fabric(Machine(device), "float32")
    )

    def step() -> Sums:
        built.zero_grad(set_to_none=True)
        engine.gradients(inputs)
        return {}

    return step


def book_keeping(built: Method, config: FederationConfig, inputs: tuple[Tensor, ...], device: str) -> Step:
    """Return ours."""
    group = Grouping(torch.arange(len(inputs[0]), device=device), len(inputs[0]))
    inner = rows_of_calls(built, config.data.shape)

    def step() -> Sums:
        with fast_layers(inputs[0].device):
            return clipped_sum(built, inputs, group, CLIP, inner).sums

    return step


def opacus(built: Method, config: FederationConfig, inputs: tuple[Tensor, ...], device: str, *, mode: str) -> Step:
    """Return Opacus's gradients of rows, summed inside the unit and clipped."""
    from opacus.grad_sample import wrap_model

    settings = {} if mode == "ew" else {"strict": False}
    wrapped = wrap_model(built, grad_sample_mode=mode, loss_reduction="sum", **settings)
    parameters, batch = trained(built), len(inputs[0])

    def step() -> Sums:
        with fast_layers(inputs[0].device):
            losses = wrapped(*inputs)
        losses.sum().backward()
        each = {}
        for name, parameter in parameters.items():
            rows = parameter.grad_sample
            each[name] = rows if len(rows) == batch else rows.unflatten(0, (-1, batch)).sum(0)
            parameter.grad_sample = parameter.grad = None
        return clipped(each)

    return step


def ghost(built: Method, config: FederationConfig, inputs: tuple[Tensor, ...], device: str) -> Step:
    """Return Opacus's fast gradient clipping: a backward pass for the norms, one for the weighted sum."""
    if config.method.name != "mae":
        raise ValueError("n/a, several rows a unit")
    from opacus.grad_sample import wrap_model

    wrapped = wrap_model(built, grad_sample_mode="ghost", loss_reduction="sum", strict=False, max_grad_norm=CLIP)
    parameters = trained(built)

    def step() -> Sums:
        with fast_layers(inputs[0].device):
            losses = wrapped(*inputs)
        losses.sum().backward(retain_graph=True)
        share = weights(wrapped.get_norm_sample().square(), CLIP)
        wrapped.zero_grad(set_to_none=True)
        wrapped.disable_hooks()
        (share * losses).sum().backward()
        wrapped.enable_hooks()
        sums = {name: parameter.grad for name, parameter in parameters.items()}
        wrapped.zero_grad(set_to_none=True)
        return sums

    return step


def vectorised(built: Method, config: FederationConfig, inputs: tuple[Tensor, ...], device: str) -> Step:
    """Return torch.func's gradients of images, clipped."""
    parameters = {name: parameter.detach() for name, parameter in trained(built).items()}

    def loss(parameters: Sums, *image: Tensor) -> Tensor:
        losses: Tensor = functional_call(built, parameters, tuple(x.unsqueeze(0) for x in image))
        return losses.sum()

    each = vmap(grad(loss), in_dims=(None, *(0 for _ in inputs)))
    return lambda: clipped(each(parameters, *inputs))


@torch.no_grad()
def clipped(each: Sums) -> Sums:
    """Return the sum of the units' clipped gradients: [U, ...] by parameter name."""
    share = weights(torch.stack([rows.flatten(1).norm(dim=1) for rows in each.values()]).square().sum(0), CLIP)
    return {name: torch.einsum("u,u...->...", share, rows) for name, rows in each.items()}


def noise(built: Method, config: FederationConfig, inputs: tuple[Tensor, ...], device: str) -> Step:
    """Return the drawing of a step's noise, alone."""
    count = sum(parameter.numel() for parameter in trained(built).values())

    def step() -> Sums:
        standard_normal((count,), "torch").to(device)
        return {}

    return step


ENGINES: dict[str, Engine] = {
    "plain": _plain,
    "bookkeeping": book_keeping,
    "hooks": partial(opacus, mode="hooks"),
    "ghost": ghost,
    "functorch": partial(opacus, mode="functorch"),
    "ew": partial(opacus, mode="ew"),
    "vmap": vectorised,
    "noise": noise,
}


def peak(step: Step, device: str) -> int:
    """Return how many bytes of tensors a step has alive at once, beyond those from before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watched:
        step()
    changes = [(e.start_ns(), e.nbytes()) for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([size for _, size in sorted(changes, key=lambda change: change[0])]).max())


def show(report: dict[str, Any]) -> None:
    """Print the table that a person reads."""
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), highlight=False)
    table = Table(
        "case", "engine", "ms (range)", "time, times plain's (range)", "memory, times plain's", title="Private steps"
    )
    for found in report["cases"]:
        for place, (engine, seconds) in enumerate(found["seconds"].items()):
            ratio, memory = found["ratios"].get(engine), found["peak_bytes"]
            table.add_row(
                "" if place else found["case"],
                engine,
                cell({key: 1000 * value for key, value in seconds.items()}, ",.0f"),
                cell(ratio, ".2f") if ratio else "",
                f"{memory[engine] / memory['plain']:.2f}" if ratio else f"{memory[engine] / 2**20:,.0f} MiB",
            )
        for engine, words in found["failed"].items():
            table.add_row("", engine, words, "", "")
    console.print(table)


if __name__ == "__main__":
    main()
