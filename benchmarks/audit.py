"""One-run audit: a lower bound on a private run's epsilon, beside the epsilon that it claims.

    python benchmarks/audit.py [--canaries 200] [--guesses 80] [--steps 200] [--broken] [--out FILE.json]

Steinke, Nasr and Jagielski 2023 (arXiv:2305.08846). Each canary, a patient whose one image is noise, takes part by
the toss of a coin. A private run trains a small MAE on those that do; from its first and last state alone, by each
canary's share in the change, the likeliest are guessed to be in and the unlikeliest to be out. No (epsilon,
delta)-DP run lets more guesses come true than theorem 5.2 allows: the least epsilon that explains them, at 95 %
confidence, is the bound. It exits 1 where the bound is above the claim.

`--broken` adds no noise and claims the same: the audit must catch it. A sound run's bound lies far below its claim: so
few canaries show gross failures alone. The finer audits are in tests/test_privacy_audit.py and its neighbours.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor
from views import machine

from wardround import ssl
from wardround.config import FederationConfig, parse
from wardround.privacy.accounting import Mechanism, epsilon, mechanism
from wardround.privacy.engine import Private
from wardround.ssl.devices import Machine, open_fabric
from wardround.ssl.method import Method

CONFIDENCE = 0.95
MASKS = 16  # under which a canary's gradient is taken
RATE = 1e-4  # learning rate: the weights stay near where they began, and so do the gradients
NONE = 1e-90  # noise, for a broken run


def main() -> None:
    """Print a table, write JSON, and exit 1 where the bound is above the claim."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--canaries", type=int, default=200)
    parser.add_argument("--guesses", type=int, default=80, help="half of them in, half of them out")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--epsilon", type=float, default=1.0, help="what the run claims")
    parser.add_argument("--broken", action="store_true", help="add no noise")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = audit(arguments.canaries, arguments.guesses, arguments.steps, arguments.epsilon, broken=arguments.broken)
    report = {"date": str(date.today()), "machine": machine(), **report}
    show(report)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if report["lower_bound"] > report["claimed_epsilon"] else 0)


def audit(canaries: int, guesses: int, steps: int, claim: float, *, broken: bool) -> dict[str, Any]:
    """Return the claim and the bound of one run."""
    started = time.monotonic()
    config = recipe(canaries, steps, claim)
    declared = mechanism(config, canaries // 2)  # as many as the coins let in, roughly
    draw = np.random.default_rng()  # of the operating system: nobody knows who takes part
    images = draw.integers(0, 256, (canaries, *config.data.shape), dtype=np.uint8)
    taken = draw.random(canaries) < 0.5
    scores = shares(config, images, taken, Mechanism(declared.rate, NONE, steps) if broken else declared)
    order = np.argsort(scores)
    correct = int(taken[order[-guesses // 2 :]].sum() + (~taken[order[: guesses // 2]]).sum())
    privacy = config.privacy
    return {
        "broken": broken,
        "canaries": canaries,
        "guesses": guesses,
        "correct": correct,
        "steps": steps,
        "rate": declared.rate,
        "noise": 0.0 if broken else declared.noise,
        "delta": privacy.delta,  # type: ignore[union-attr]
        "claimed_epsilon": epsilon([declared], privacy.delta),  # type: ignore[union-attr]
        "lower_bound": lower_bound(canaries, guesses, correct, privacy.delta),  # type: ignore[union-attr]
        "confidence": CONFIDENCE,
        "seconds": time.monotonic() - started,
    }


def recipe(canaries: int, steps: int, claim: float) -> FederationConfig:
    """Return a config of one private round; a step expects a quarter of those that take part."""
    tree = {
        "format": 1,
        "name": "audit",
        "backbone": {"patch_size": 8, "depth": 1},
        "method": {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "mask_ratio": 0.5},
        "views": {"crop_scale": [1.0, 1.0], "horizontal_flip": False, "rotation": 0.0},
        "data": {"image_size": 16},
        "training": {"rounds": 1, "local_steps": steps, "batch_size": canaries // 8},
        "privacy": {"unit": "patient", "epsilon": claim, "delta": 1e-5, "clip": 1.0},
    }
    return parse(tree, FederationConfig, "audit")


def shares(
    config: FederationConfig, images: NDArray[np.uint8], taken: NDArray[np.bool_], noised: Mechanism
) -> NDArray[np.float64]:
    """Return each image's share in what a private run on some of the images did to the weights: [N].

    The shares explain the whole change by least squares from the images' first gradients. The steps are plain
    gradient descent, and small: whatever is made of the noised gradients is as private, and this shows the most.
    """
    method = ssl.build(config)
    gradients = first_gradients(config, method, images)
    own = images[taken]
    engine = engine_over(config, method, own, noised)
    before = flat(engine.parameters.values())
    for step in range(config.training.local_steps):
        engine.gradients(engine.batch(step))
        with torch.no_grad():
            for parameter in engine.parameters.values():
                assert parameter.grad is not None
                parameter -= RATE * parameter.grad
    change = before - flat(engine.parameters.values())
    gram = (gradients @ gradients.T).double()
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    found: NDArray[np.float64] = torch.linalg.solve(gram + ridge, (gradients @ change).double()).numpy()
    return found


def first_gradients(config: FederationConfig, method: Method, images: NDArray[np.uint8]) -> Tensor:
    """Return each image's clipped gradient before training, its mean over masks: [N, numbers]."""
    engine = engine_over(config, method, images, Mechanism(1.0, NONE, 1))
    rows = []
    for place in range(len(images)):
        engine.gradients((torch.full((MASKS,), place), torch.zeros(MASKS, dtype=torch.int64)))
        rows.append(flat(p.grad for p in engine.parameters.values() if p.grad is not None))
    return torch.stack(rows)


def engine_over(config: FederationConfig, method: Method, images: NDArray[np.uint8], noised: Mechanism) -> Private:
    """Return the engine over images of a patient each."""
    fabric = open_fabric(Machine(), config.training.precision)
    return Private(method, images, np.arange(len(images), dtype=np.int32), config, noised, fabric)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Return a copy of all numbers in a row."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def lower_bound(canaries: int, guesses: int, correct: int, delta: float) -> float:
    """Return the epsilon below which so many correct guesses have a chance of 5 % at most; 0 where none is needed."""
    low, high = 0.0, 50.0
    if chance(canaries, guesses, correct, low, delta) > 1 - CONFIDENCE:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if chance(canaries, guesses, correct, middle, delta) < 1 - CONFIDENCE else (low, middle)
        )
    return low


def chance(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return the most that an (epsilon, delta)-DP run's chance of so many correct guesses can be (theorem 5.2).

    With B binomial of r guesses, each true with e^epsilon / (1 + e^epsilon): P[B >= v] + 2 m delta times
    the largest of P[v > B >= v - i] / i, over i from 1 to m.
    """
    each = stats.binom(guesses, 1 / (1 + np.exp(-epsilon)))
    shortfalls = np.arange(1, canaries + 1)
    below = each.cdf(correct - 1) - each.cdf(correct - 1 - shortfalls)
    return float(min(1.0, each.sf(correct - 1) + 2 * canaries * delta * (below / shortfalls).max()))


def show(report: dict[str, Any]) -> None:
    """Print the bound beside the claim."""
    caught = report["lower_bound"] > report["claimed_epsilon"]
    table = Table("noise", "steps", "canaries", "guesses true", "claimed epsilon", "at least", "seconds")
    table.add_row(
        f"{report['noise']:.3f}",
        str(report["steps"]),
        str(report["canaries"]),
        f"{report['correct']} of {report['guesses']}",
        f"{report['claimed_epsilon']:.2f}",
        f"{report['lower_bound']:.2f}",
        f"{report['seconds']:.0f}",
    )
    console = Console()
    console.print(table)
    console.print(
        f"delta = {report['delta']:g}, add/remove one patient; the bound holds at {100 * report['confidence']:.0f} %. "
        + ("The run is less private than it claims." if caught else "Nothing speaks against the claim.")
    )


if __name__ == "__main__":
    main()
