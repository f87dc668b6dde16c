"""What an evaluation found, as plain values: for tables, pictures, pages, benchmarks and JSON."""

from dataclasses import dataclass

from pydantic import TypeAdapter

from wardround.probe.calibration import Calibration
from wardround.probe.retrieval import Retrieved
from wardround.probe.scores import Scores

PROBES = ("k-NN", "linear")
SHOWN = {"lora": "LoRA"}  # what tables call a probe, where not by its key


@dataclass(frozen=True)
class Row:
    """One arm under one probe, or tuned in one way, at one fraction of the labels, over several draws."""

    arm: str
    probe: str  # k-NN, linear; fine-tuned: frozen (first stages), full, decay, lora; scratch
    fraction: float
    images: float  # labelled images, mean over the draws; whole patients may exceed the fraction
    draws: int
    mean: Scores
    sd: Scores | None  # over the draws; None of a single one
    low: Scores | None  # the 95 % interval's ends, as `interval` has them
    high: Scores | None
    scores: tuple[Scores, ...]  # draw by draw, the same draws for every arm: differences of arms are paired
    ece: float  # mean over the draws
    finds_errors: float | None  # AUC of entropy against being wrong, mean over the draws


@dataclass(frozen=True)
class Subgroup:
    """A row's answers on the test images of one group, at the largest fraction of the labels."""

    arm: str
    probe: str
    column: str
    value: str
    images: int
    patients: int
    mean: Scores | None  # None where the group has one class
    low: Scores | None
    high: Scores | None
    small: bool  # too few patients of a class to tell


@dataclass(frozen=True)
class Detail:
    """A row's first draw at the largest fraction of the labels, looked at closely."""

    arm: str
    probe: str
    fraction: float
    calibration: Calibration
    confusion: tuple[tuple[int, ...], ...] | None  # [truth][answer] in images; None of several labels an image


@dataclass(frozen=True)
class Retrieval:
    """What an arm's features bring back of the training images for test images."""

    arm: str
    found: Retrieved
    shown: tuple[tuple[int, ...], ...]  # lines for a picture: a query, then the nearest, as places in the set


@dataclass(frozen=True)
class Evaluation:
    """What was measured, on what."""

    rows: tuple[Row, ...]
    uncertain: tuple[Row, ...]  # deep ensembles ("…, ensemble of 5") and MC dropout ("…, MC dropout") of rows
    details: tuple[Detail, ...]
    subgroups: tuple[Subgroup, ...]
    retrieval: tuple[Retrieval, ...]
    classes: tuple[str, ...]
    images: dict[str, int]  # by split
    patients: dict[str, int]
    notes: tuple[str, ...]  # what a reader must know
    seed: int
    data: str  # SHA-256 of the images and labels
    weights: str | None  # SHA-256 of the weights that `backbone` has, where it is a release
    versions: dict[str, str]  # with the machine

    def score(self, arm: str, probe: str = "linear") -> float:
        """Return an arm's first headline score (balanced accuracy; of several labels AUC) at the largest fraction."""
        rows = [row for row in self.rows if (row.arm, row.probe) == (arm, probe)]
        return max(rows, key=lambda row: row.fraction).mean.headline[0]

    @property
    def headline(self) -> tuple[str, str]:
        """The names of the two scores that tables show."""
        several = self.rows[0].mean.balanced_accuracy is None
        return ("AUC", "mAP") if several else ("balanced accuracy", "AUC")

    def to_json(self) -> str:
        """Return everything as JSON."""
        return TypeAdapter(Evaluation).dump_json(self, indent=2).decode()

    @classmethod
    def from_json(cls, text: str) -> "Evaluation":
        """Return what `to_json` wrote. Raises pydantic's ValidationError for anything else."""
        return TypeAdapter(cls).validate_json(text)


def cell(mean: Scores, low: Scores | None, high: Scores | None) -> str:
    """Return scores as a table shows them, their interval below.

    >>> cell(Scores(0.6, 0.75, 0.8), Scores(0.5, 0.7, 0.6), Scores(0.7, 1.0, 0.9))
    '0.600 / 0.750\\n.50-.70/.70-1.0'
    """
    first = " / ".join(f"{value:.3f}" for value in mean.headline)
    if low is None or high is None:
        return first
    ends = zip(low.headline, high.headline, strict=True)
    return f"{first}\n" + "/".join("-".join(short(end) for end in pair) for pair in ends)


def short(value: float) -> str:
    """Return a share in two digits, without the zero before the point."""
    return f"{value:.2f}"[1:] if value < 0.995 else "1.0"
