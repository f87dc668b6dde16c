"""How much a frozen backbone helps where labels are few: k-NN and linear probes at fractions of the labels."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from tqdm import tqdm

from wardround.data import LabelledImages, read_labelled
from wardround.downstream.arms import Arm, protocol_of, three_arms
from wardround.downstream.load import release_folder
from wardround.downstream.splits import Splits, split
from wardround.errors import ConfigError
from wardround.probe import Scores, draw_fraction, knn_probabilities, linear_probabilities, score
from wardround.probe.linear import Labelled

FRACTIONS = (0.01, 0.1, 1.0)
PROBES = ("k-NN", "linear")


@dataclass(frozen=True)
class Row:
    """One arm under one probe at one fraction of the labels, over several draws of patients."""

    arm: str
    probe: str
    fraction: float
    images: float  # labelled images, mean over the draws; whole patients may exceed the fraction
    draws: int
    mean: Scores
    sd: Scores | None  # None of a single draw


@dataclass(frozen=True)
class Evaluation:
    """What was measured, on what."""

    rows: tuple[Row, ...]
    classes: tuple[str, ...]
    images: dict[str, int]  # by split
    patients: dict[str, int]
    notes: tuple[str, ...]
    seed: int

    def score(self, arm: str, probe: str = "linear") -> float:
        """Return an arm's balanced accuracy at the largest fraction of the labels."""
        rows = [row for row in self.rows if (row.arm, row.probe) == (arm, probe)]
        return max(rows, key=lambda row: row.fraction).mean.balanced_accuracy

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(asdict(self), indent=2)

    def table(self) -> Table:
        """Return the table that a person reads: an arm and probe a line, a fraction of the labels a column."""
        title = f"Probes on {self.images['test']:,} test images of {self.patients['test']:,} patients"
        caption = "; ".join(("balanced accuracy / AUC, ± sd over draws of patients", *self.notes))
        made = Table(title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left")
        made.add_column("arm")
        made.add_column("probe")
        for row in [row for row in self.rows if (row.arm, row.probe) == (self.rows[0].arm, self.rows[0].probe)]:
            made.add_column(f"{row.fraction:.0%} of labels\n{row.images:,.0f} images", justify="right")
        for (arm, probe), rows in groupby(self.rows, key=lambda row: (row.arm, row.probe)):
            made.add_row(arm, probe, *(_cell(row) for row in rows), end_section=probe == PROBES[-1])
        return made


def evaluate(
    arms: Mapping[str, Arm],
    images: LabelledImages,
    fractions: Sequence[float] = FRACTIONS,
    draws: int = 5,
    seed: int = 0,
) -> Evaluation:
    """Return the scores of each arm on the test split, every arm with the same draws of labelled patients.

    A fraction counts training labels; validation, which chooses the linear probe's penalty, is whole.
    Takes about a second a thousand images beside the arms' own time. Raises DataError for a set that
    cannot tell: one class, a class missing from a split, a patient in two; ConfigError for a fraction
    outside (0, 1].
    """
    if not fractions or not all(0.0 < fraction <= 1.0 for fraction in fractions) or draws < 1:
        raise ConfigError(
            f"fractions = {list(fractions)}, draws = {draws}: expected fractions in (0, 1] and draws above 0."
        )
    places = split(images, seed)
    drawn = {fraction: _draw(images, places.train, fraction, draws, seed) for fraction in sorted(set(fractions))}
    total = len(arms) * sum(len(sets) for sets in drawn.values())
    rows = []
    with tqdm(total=total, desc="probes", unit="probe", disable=None, delay=2, leave=False) as bar:
        for name, arm in arms.items():
            found = arm(images.images)
            by_probe: dict[str, list[Row]] = {probe: [] for probe in PROBES}
            for fraction, sets in drawn.items():
                scores: list[dict[str, Scores]] = []
                for train in sets:
                    scores.append(_probe(found, images, places, train))
                    bar.update()
                size = float(np.mean([len(train) for train in sets]))
                for probe in PROBES:
                    mean, sd = _summary([of[probe] for of in scores])
                    by_probe[probe].append(Row(name, probe, fraction, size, len(sets), mean, sd))
            rows += [row for probe in PROBES for row in by_probe[probe]]
    used = {"train": places.train, "val": places.val, "test": places.test}
    return Evaluation(
        rows=tuple(rows),
        classes=images.classes,
        images={name: len(found) for name, found in used.items()},
        patients={name: len(np.unique(images.patients[found])) for name, found in used.items()},
        notes=places.notes,
        seed=seed,
    )


def compare(
    folder: Path, images: LabelledImages, fractions: Sequence[float] = FRACTIONS, draws: int = 5, seed: int = 0
) -> Evaluation:
    """Return a released backbone's scores beside those of its random initialisation and of raw pixels.

    Raises ConfigError where the images are not of the size and channels that the backbone takes.
    """
    data = protocol_of(folder).data
    expected = data.shape
    if images.images.shape[1:] != expected:
        raise ConfigError(f"evaluation set: images are {images.images.shape[1:]}, the backbone takes {expected}.")
    return evaluate(three_arms(folder), images, fractions, draws, seed)


def evaluate_backbone(source: str, data: Path, label: str, draws: int, uri: str | None) -> Evaluation:
    """Return `compare` of a run folder, release folder or NAME@alias on a labelled folder."""
    with release_folder(source, uri) as folder:
        return compare(folder, read_labelled(data, protocol_of(folder).data, label), draws=draws)


def _draw(
    images: LabelledImages, train: NDArray[np.int64], fraction: float, draws: int, seed: int
) -> list[NDArray[np.int64]]:
    """Return the labelled training images of each draw; all labels make one draw."""
    sets = []
    for number in range(draws if fraction < 1.0 else 1):
        rng = np.random.default_rng([seed, 1, round(fraction * 1e6), number])
        sets.append(train[draw_fraction(images.labels[train], images.patients[train], fraction, rng)])
    return sets


def _probe(
    found: NDArray[np.float32], images: LabelledImages, places: Splits, train: NDArray[np.int64]
) -> dict[str, Scores]:
    """Return both probes' scores on the test split after training on some of the images."""
    known, test, labels = Labelled(found[train], images.labels[train]), found[places.test], images.labels
    nearest = knn_probabilities(known.features, known.labels, test, len(images.classes))
    linear = linear_probabilities(known, Labelled(found[places.val], labels[places.val]), test)
    return {"k-NN": score(labels[places.test], nearest), "linear": score(labels[places.test], linear)}


def _summary(scores: list[Scores]) -> tuple[Scores, Scores | None]:
    """Return mean and sample standard deviation over draws."""
    values = np.array([[found.balanced_accuracy, found.auc] for found in scores])  # [draws, 2]
    mean = Scores(*values.mean(axis=0).tolist())
    return mean, Scores(*values.std(axis=0, ddof=1).tolist()) if len(values) > 1 else None


def _cell(row: Row) -> str:
    """Return a row's scores as a table shows them, their deviations below."""
    scores = f"{row.mean.balanced_accuracy:.3f} / {row.mean.auc:.3f}"
    return scores if row.sd is None else f"{scores}\n±{row.sd.balanced_accuracy:.3f}  ±{row.sd.auc:.3f}"
