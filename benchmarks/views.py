"""How many images a second become two views: whole batches of tensors against one PIL image after another.

    python benchmarks/views.py [--repeats 7] [--out FILE.json]

Both arms begin with a batch of 64 uint8 images, as the cache holds them, and end with two normalised float32
batches, on one thread, taking turns in each repeat:

    wardround  wardround.ssl.views.view, twice
    lightly    lightly's SimCLRTransform on a PIL image (torchvision on PIL), image by image, then stacked

The strengths are the same: crops of 0.3 to 1 of the area, horizontal flips, brightness and contrast 0.4, blur up
to 0.009 of the edge in half of the views; of colour also saturation 0.4 and hue 0.1, in four of five of lightly's
views and in all of ours. Random grey is off in both. Ratios are taken within a repeat.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import torch
from lightly.transforms import SimCLRTransform
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wardround.config import FederationConfig, parse
from wardround.config.federation import DataConfig
from wardround.data.procedural import procedural_set
from wardround.ssl.draws import generator
from wardround.ssl.views import view

BATCH = 64
BLUR = 0.009
JITTER = {"brightness": 0.4, "contrast": 0.4}
COLOUR = {"saturation": 0.4, "hue": 0.1}
CASES = ((64, 1), (64, 3), (224, 1), (224, 3))
PACKAGES = ("torch", "torchvision", "lightly", "pillow", "numpy")


def main() -> None:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = [compare(size, channels, arguments.repeats) for size, channels in CASES]
    report = {"date": str(date.today()), "machine": machine(), "batch": BATCH, "cases": cases}
    show(report)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def compare(size: int, channels: int, repeats: int) -> dict[str, object]:
    """Return the images a second of both arms and their ratio."""
    data = DataConfig(image_size=size, channels=channels, mean=(0.5,) * channels, std=(0.25,) * channels)
    images = procedural_set(BATCH, 1, data).images
    arms = {"wardround": batched(images, data), "lightly": one_by_one(images, data)}
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    for repeat in range(repeats + 1):
        for arm, work in arms.items():
            found = rate(work, images)
            if repeat > 0:  # the first turn warms up
                rates[arm].append(found)
    ratios = [a / b for a, b in zip(rates["wardround"], rates["lightly"], strict=True)]
    found_rates = {arm: spread(values) for arm, values in rates.items()}
    return {"size": size, "channels": channels, "images_per_second": found_rates, "ratio": spread(ratios)}


def batched(images: NDArray[np.uint8], data: DataConfig) -> Callable[[], list[Tensor]]:
    """Return our way from bytes to two views."""
    changes = {**JITTER, **(COLOUR if data.channels == 3 else {}), "blur": BLUR, "crop_scale": [0.3, 1.0]}
    raw = {
        "format": 1,
        "name": "views",
        "method": {"name": "simclr"},
        "views": changes,
        "data": data.model_dump(mode="json"),
        "training": {"rounds": 1, "local_steps": 1},
    }
    recipe = parse(raw, FederationConfig, "benchmark")
    draws = generator("benchmark")

    def work() -> list[Tensor]:
        batch = torch.from_numpy(images).float().div_(255.0)
        return [view(batch, recipe, draws, data.image_size) for _ in range(2)]

    return work


def one_by_one(images: NDArray[np.uint8], data: DataConfig) -> Callable[[], list[Tensor]]:
    """Return lightly's way from bytes to two views."""
    transform = SimCLRTransform(
        input_size=data.image_size,
        cj_strength=1.0,
        cj_bright=JITTER["brightness"],
        cj_contrast=JITTER["contrast"],
        cj_sat=COLOUR["saturation"] if data.channels == 3 else 0.0,
        cj_hue=COLOUR["hue"] if data.channels == 3 else 0.0,
        min_scale=0.3,
        random_gray_scale=0.0,
        gaussian_blur=0.5,
        sigmas=(0.05 * BLUR * data.image_size, BLUR * data.image_size),
        normalize={"mean": list(data.mean), "std": list(data.std)},
    )

    def work() -> list[Tensor]:
        pictures = [Image.fromarray(image[0] if data.channels == 1 else image.transpose(1, 2, 0)) for image in images]
        pairs = [transform(picture) for picture in pictures]
        return [torch.stack(views) for views in zip(*pairs, strict=True)]

    return work


def rate(work: Callable[[], list[Tensor]], images: NDArray[np.uint8]) -> float:
    """Return the images a second of a piece of work, over at least a quarter of a second."""
    started, turns = time.perf_counter(), 0
    while turns == 0 or time.perf_counter() - started < 0.25:
        views = work()
        turns += 1
    elapsed = time.perf_counter() - started
    assert [tuple(batch.shape) for batch in views] == [images.shape] * 2
    return turns * len(images) / elapsed


def spread(values: list[float]) -> dict[str, float]:
    """Return median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, str]:
    """Return the processor, its cores, the memory, and the versions that count here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": model,
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def show(report: dict[str, object]) -> None:
    """Print the table that a person reads."""
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), highlight=False)  # type: ignore[attr-defined]
    table = Table(
        "image",
        "wardround, images/s (range)",
        "lightly, images/s (range)",
        "ratio (range)",
        title="Two views, one thread",
    )
    for case in report["cases"]:  # type: ignore[attr-defined]
        rates = case["images_per_second"]
        name = f"{case['size']} px, {'grey' if case['channels'] == 1 else 'colour'}"
        cells = [cell(rates[arm], ",.0f") for arm in ("wardround", "lightly")]
        table.add_row(name, *cells, cell(case["ratio"], ".1f"))
    console.print(table)


def cell(found: dict[str, float], form: str) -> str:
    """Return a median and its range as text."""
    return f"{found['median']:{form}} ({found['min']:{form}} to {found['max']:{form}})"


if __name__ == "__main__":
    main()
