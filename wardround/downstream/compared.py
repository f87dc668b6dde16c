"""A smaller backbone beside the one that it was made from: size, time, features, and what a probe reads in them."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wardround.config.federation import DataConfig
from wardround.data import LabelledImages
from wardround.downstream.arms import release_arm
from wardround.downstream.evaluate import evaluate
from wardround.probe.scores import Scores
from wardround.registry.release import WEIGHTS, file_hashes
from wardround.ssl.views import normalise

BATCH = 16
LEAST = 16  # batches that are timed


@dataclass(frozen=True)
class Size:
    """What a backbone takes."""

    weights: str  # SHA-256
    megabytes: float  # of the file of weights
    parameters: int
    gflops: float  # an image, a multiplication and an addition counted as two
    milliseconds: float  # an image on one thread of this machine, in batches of 16


@dataclass(frozen=True)
class Score:
    """A probe's scores with the ends of their 95 % intervals, where there are some."""

    mean: Scores
    low: Scores | None
    high: Scores | None


@dataclass(frozen=True)
class Probe:
    """Linear probes of both on the same labels, at all of them."""

    metrics: tuple[str, str]  # of the scores, what tables show
    original: Score
    compressed: Score
    labelled: int  # images that they learnt from
    tested: int  # test images


@dataclass(frozen=True)
class Compared:
    """What was lost and won, as `compressed.json` has it."""

    by: str
    settings: Mapping[str, Any]
    images: int  # that it was made with
    original: Size
    compressed: Size
    compared_on: int  # images of other patients
    least_cosine: float  # between an image's features here and there
    explained: float  # share of the variance of the original's features that the compressed one's tell; may be below 0
    losses: tuple[float, float] | None  # of distillation, means of the first and last tenth of the steps
    probe: Probe | None


def sizes(
    folders: tuple[Path, Path], models: tuple[nn.Module, nn.Module], images: NDArray[np.uint8], data: DataConfig
) -> tuple[Size, Size]:
    """Return what two releases take, timed by turns on one thread."""
    pixels = normalise(torch.from_numpy(np.array(images[:BATCH])).float() / 255.0, data)
    took = _timed(models, pixels)
    first, second = (
        Size(
            weights=file_hashes(folder)[WEIGHTS],
            megabytes=(folder / WEIGHTS).stat().st_size / 1e6,
            parameters=sum(one.numel() for one in model.parameters()),
            gflops=_operations(model, pixels[:1]) / 1e9,
            milliseconds=milliseconds,
        )
        for folder, model, milliseconds in zip(folders, models, took, strict=True)
    )
    return first, second


def likeness(expected: NDArray[np.float32], found: NDArray[np.float32]) -> tuple[float, float]:
    """Return the least cosine between rows, and the share of the variance explained: [N, D], [N, D].

    >>> likeness(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32) * 0.5)
    (1.0, 0.5)
    """
    a, b = expected.astype(np.float64), found.astype(np.float64)
    cosines = (a * b).sum(axis=1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
    spread = ((a - a.mean(axis=0)) ** 2).sum()
    return float(cosines.min()), float(1.0 - ((a - b) ** 2).sum() / max(spread, 1e-12))


def probed(folders: tuple[Path, Path], images: LabelledImages, seed: int) -> Probe:
    """Return the linear probes of two releases at all labels, as `wardround evaluate` has them."""
    arms = dict(zip(("original", "compressed"), map(release_arm, folders), strict=True))
    found = evaluate(arms, images, fractions=(1.0,), draws=1, seed=seed)
    linear = {row.arm: Score(row.mean, row.low, row.high) for row in found.rows if row.probe == "linear"}
    return Probe(found.headline, **linear, labelled=found.images["train"], tested=found.images["test"])


def _timed(models: tuple[nn.Module, nn.Module], pixels: Tensor) -> tuple[float, float]:
    """Return milliseconds an image, the median over batches that take turns: other work slows both alike."""
    took: tuple[list[float], list[float]] = ([], [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for _ in range(LEAST + 1):
                for model, times in zip(models, took, strict=True):
                    begin = time.perf_counter()
                    model(pixels)
                    times.append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
    first, second = (1000 * median(times[1:]) / len(pixels) for times in took)  # the first one warms up
    return first, second


def _operations(model: nn.Module, image: Tensor) -> int:
    """Return the floating-point operations of products and convolutions on an image [1, C, S, S]."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(image)
    return int(counter.get_total_flops())
