"""What a segmentation found, as plain values: for tables, pictures and JSON."""

from dataclasses import dataclass

from pydantic import TypeAdapter


@dataclass(frozen=True)
class SegmentedRow:
    """One arm at one fraction of the training images, over several draws of images and new weights."""

    arm: str
    fraction: float
    images: float  # trained on, mean over the draws; whole patients may exceed the fraction
    dice: float  # mean over classes, test images and draws
    low: float | None  # the 95 % interval's ends, over draws and test patients
    high: float | None
    scores: tuple[float, ...]  # draw by draw, the same draws for every arm


@dataclass(frozen=True)
class Segmentation:
    """What was measured, on what."""

    decoder: str
    rows: tuple[SegmentedRow, ...]
    gains: tuple[SegmentedRow, ...]  # backbone less random, image by image and draw by draw
    values: tuple[int, ...]  # of the masks; the first is the background, which no score counts
    steps: int
    images: dict[str, int]  # by split
    patients: dict[str, int]
    notes: tuple[str, ...]  # what a reader must know
    seed: int
    data: str  # SHA-256 of the images and masks
    weights: str  # SHA-256 of the release's
    versions: dict[str, str]  # with the machine

    def to_json(self) -> str:
        """Return everything as JSON."""
        return TypeAdapter(Segmentation).dump_json(self, indent=2).decode()

    @classmethod
    def from_json(cls, text: str) -> "Segmentation":
        """Return what `to_json` wrote. Raises pydantic's ValidationError for anything else."""
        return TypeAdapter(cls).validate_json(text)
