"""Which images train, choose and test a probe, and what would make the answer worthless."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wardround.data import LabelledImages, MaskedImages
from wardround.errors import DataError
from wardround.probe.doubts import FORCED, NO_PATIENT
from wardround.probe.fractions import draw_fraction
from wardround.probe.scores import can_tell

SPLITS = ("train", "val", "test")
VAL_SHARE = 0.2  # of the training images, where a set has no validation split


@dataclass(frozen=True)
class Splits:
    """Places of images in their set, by use; no patient is in two of them."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]
    notes: tuple[str, ...]  # what a reader of the result must know


def split(images: LabelledImages, seed: int = 0, force: bool = False) -> Splits:
    """Return the splits of a set; where there is no `val`, a fifth of train is taken for it, by patient.

    Raises DataError for a patient in two splits, unless forced, which the notes then say; for a split without an
    image; and for a class that is missing from a split, or that all its images have.
    """
    places, notes = _places(images, force)
    if not can_tell(images.labels):
        only = "all images have the same" if images.multi_label else f"all labels are '{images.classes[0]}'"
        raise DataError(f"evaluation set: {only}; a probe needs two classes at least.")
    if not len(places["val"]):
        _check_classes(images, "train", places["train"])
        notes.append(_take_val(images.labels, images.patients, places, seed))
    for name, found in places.items():
        _check_classes(images, name, found)
    return Splits(**places, notes=tuple(notes))


def split_masked(images: MaskedImages, seed: int = 0, force: bool = False) -> Splits:
    """Return the splits of images with masks, as `split` does.

    Raises DataError for a split that is missing, or whose masks are all empty, and for a patient in two splits.
    """
    places, notes = _places(images, force)
    if not len(places["val"]):
        shown = np.array([mask.any() for mask in images.masks], np.int64)
        notes.append(_take_val(shown, images.patients, places, seed))
    for name, found in places.items():  # val too: where it shows nothing, an answer of nothing scores 1 and is kept
        if not images.masks[found].any():
            raise DataError(f"evaluation set: all {len(found)} masks of split {name} are empty; nothing can be told.")
    return Splits(**places, notes=tuple(notes))


Places = dict[str, NDArray[np.int64]]


def _places(images: LabelledImages | MaskedImages, force: bool) -> tuple[Places, list[str]]:
    """Return the images of each split, and what a reader must know of them."""
    splits, patients = images.splits, images.patients
    places = {name: np.flatnonzero(splits == name) for name in SPLITS}
    notes, known = [], sorted(set(splits.tolist()))
    for name in ("train", "test"):
        if not len(places[name]):
            raise DataError(
                f"evaluation set: no row of labels.csv has split {name}; its splits are {', '.join(known)}. "
                "The words are train, val and test."
            )
    if others := len(splits) - sum(len(found) for found in places.values()):
        names = ", ".join(f"'{name}'" for name in known if name not in SPLITS)
        notes.append(f"{others} images of the splits {names} are left out: the words are train, val and test")
    if shared := _shared_patients(patients, places):
        if not force:
            raise DataError(
                f"evaluation set: {shared}. The score would measure who is recognised; split by patient, or say "
                "--force-splits."
            )
        notes.append(f"{FORCED}{shared}, so the scores measure in part who is recognised")
    used = np.concatenate(list(places.values()))
    if images.named is not None and (unnamed := int((~images.named[used]).sum())):
        notes.append(
            f"{NO_PATIENT}{unnamed} of {len(used)} images name none, and each counts as a patient of its own: whoever "
            "has several may be in two splits, and intervals are then too narrow"
        )
    return places, notes


def _take_val(labels: NDArray[np.int64], patients: NDArray[np.int64], places: Places, seed: int) -> str:
    """Move a fifth of train to val, by patient, and return that in words."""
    train = places["train"]
    drawn = draw_fraction(labels[train], patients[train], VAL_SHARE, np.random.default_rng([seed, 0]))
    places["val"], places["train"] = train[drawn], np.delete(train, drawn)
    count = len(np.unique(patients[places["val"]]))
    return f"no split val: {len(drawn)} images of {count} patients of train serve as it"


def _shared_patients(patients: NDArray[np.int64], places: Places) -> str:
    """Return how many patients are in more than one split, in words; nothing where none is."""
    where: dict[int, list[str]] = {}
    for name, found in places.items():
        for patient in np.unique(patients[found]):
            where.setdefault(int(patient), []).append(name)
    shared = Counter(" and ".join(names) for names in where.values() if len(names) > 1)
    if not shared:
        return ""
    counts = ", ".join(f"{count} in {names}" for names, count in sorted(shared.items()))
    return f"{shared.total()} of {len(where)} patients are in more than one split ({counts})"


def _check_classes(images: LabelledImages, name: str, found: NDArray[np.int64]) -> None:
    """Raise DataError where a split lacks a class, or, of several labels an image, has one on every image."""
    truth, of_split = images.one_hot, images.one_hot[found]
    missing = np.flatnonzero(truth.any(axis=0) & ~of_split.any(axis=0))
    if len(missing):
        labels = ", ".join(f"'{images.classes[k]}'" for k in missing[:3])
        raise DataError(
            f"evaluation set: of {len(found)} images, split {name} has none of {len(missing)} classes ({labels}). "
            "Add some, by moving whole patients, or leave the class out."
        )
    everywhere = np.flatnonzero(of_split.all(axis=0))
    if len(everywhere):
        raise DataError(
            f"evaluation set: all {len(found)} images of split {name} have the label "
            f"'{images.classes[everywhere[0]]}'; nothing tells it. Add images without it, or leave the label out."
        )
