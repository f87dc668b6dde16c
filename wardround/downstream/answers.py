"""What arms answer on the test images, after seeing some of the training labels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from wardround.data import LabelledImages
from wardround.downstream.arms import Arm, Network
from wardround.downstream.finetune import Labels, Tuning, answers, steps_of, tune
from wardround.downstream.memory import smaller_once
from wardround.downstream.splits import Splits
from wardround.probe.features import BATCH
from wardround.probe.fractions import draw_fraction
from wardround.probe.knn import knn_probabilities
from wardround.probe.linear import Labelled, linear_probabilities
from wardround.ssl.draws import generator

Probabilities = NDArray[np.float64]  # [N, K] of the test images


@dataclass(frozen=True)
class Design:
    """What every arm is measured on."""

    images: LabelledImages
    places: Splits
    drawn: dict[float, list[NDArray[np.int64]]]  # by fraction, the training images of each draw
    tuning: Tuning
    draws: int
    seed: int


@dataclass(frozen=True)
class Answered:
    """An arm's features of all images, and its answers draw by draw, by probe and fraction."""

    arm: str
    features: NDArray[np.float32]  # [N, D]
    single: dict[tuple[str, float], list[Probabilities]]
    dropout: dict[tuple[str, float], list[Probabilities]]  # of fine-tuning, by MC dropout


def draw_labels(
    images: LabelledImages, train: NDArray[np.int64], fraction: float, draws: int, seed: int
) -> list[NDArray[np.int64]]:
    """Return the labelled training images of each draw; all labels make one draw."""
    sets = []
    for number in range(draws if fraction < 1.0 else 1):
        rng = np.random.default_rng([seed, 1, round(fraction * 1e6), number])
        sets.append(train[draw_fraction(images.labels[train], images.patients[train], fraction, rng)])
    return sets


def steps(arms: Mapping[str, Arm], design: Design) -> int:
    """Return how many steps all arms take: one a probe, and those of fine-tuning."""
    probed = sum(len(sets) for sets in design.drawn.values())
    tuned = sum(
        steps_of(design.tuning, len(train), design.tuning.batch_size)
        for sets in design.drawn.values()
        for train in _tuned_on(sets, design.draws)
    )
    return sum(probed + len(_ways(arm, design.tuning)) * tuned for arm in arms.values())


def answer(name: str, arm: Arm, design: Design, notes: list[str], advance: Callable[[int], object]) -> Answered:
    """Return what an arm answers under both probes and in every way of fine-tuning that it admits."""
    images, places = design.images, design.places
    if isinstance(arm, Network):
        found = smaller_once(partial(arm.features, images.images), BATCH, f"arm '{name}', features", notes)
    else:
        found = arm(images.images)
    made = Answered(name, found, {}, {})
    for fraction, sets in design.drawn.items():
        for train in sets:
            known, test = Labelled(found[train], images.labels[train]), found[places.test]
            val = Labelled(found[places.val], images.labels[places.val])
            nearest = knn_probabilities(known.features, known.labels, test, len(images.classes))
            made.single.setdefault(("k-NN", fraction), []).append(nearest)
            made.single.setdefault(("linear", fraction), []).append(linear_probabilities(known, val, test))
            advance(1)
    for way, shown in _ways(arm, design.tuning).items():
        assert isinstance(arm, Network)
        for fraction, sets in design.drawn.items():
            for number, train in enumerate(_tuned_on(sets, design.draws)):
                # The same for all arms and ways, so that their differences are paired.
                seed = generator(design.seed, "fine-tuning", str(fraction), number).initial_seed() % 2**32
                work = partial(_tuned, arm, way, Labels(images, train, places.val), design, seed, advance)
                who = f"arm '{name}', {shown}"
                sure, dropped = smaller_once(work, design.tuning.batch_size, who, notes)
                made.single.setdefault((shown, fraction), []).append(sure)
                made.dropout.setdefault((shown, fraction), []).append(dropped)
    return made


def _tuned(
    arm: Network,
    way: str,
    labels: Labels,
    design: Design,
    seed: int,
    advance: Callable[[int], object],
    batch_size: int,
) -> tuple[Probabilities, Probabilities]:
    """Return the answers of an arm's network, trained on in batches of a size."""
    tuning = replace(design.tuning, batch_size=batch_size)
    model = tune(arm, way, labels, tuning, seed, advance)
    return answers(model, arm, design.images, design.places.test, seed, batch_size=2 * batch_size)


def _tuned_on(sets: list[NDArray[np.int64]], draws: int) -> list[NDArray[np.int64]]:
    """Return the training images of each fine-tuning: new weights and orders are drawn even where labels are not."""
    return sets if len(sets) == draws else sets * draws


def _ways(arm: Arm, tuning: Tuning) -> dict[str, str]:
    """Return the ways an arm is trained in, with the name of each in a result."""
    if not isinstance(arm, Network) or not tuning.ways:
        return {}
    return {"full": "scratch"} if arm.untrained else {way: way for way in tuning.ways}
