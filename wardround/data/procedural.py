"""A procedural set: phantoms with findings that nobody owns, for probes and pictures at the coordinator."""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from wardround.config.federation import DataConfig
from wardround.data.intensities import to_square
from wardround.data.labelled import LabelledImages
from wardround.data.phantom import FINDINGS, draw_anatomy, draw_image
from wardround.errors import DataError

POSITIONS = {"tilted left": -6.0, "straight": 0.0, "tilted right": 6.0}  # degrees, each give or take 2
_IMAGES_PER_PATIENT = 2
_SPLITS = {"train": 0.60, "val": 0.15, "test": 0.25}  # shares of the patients of each class


def procedural_set(count: int, seed: int, data: DataConfig) -> LabelledImages:
    """Return so many phantoms as a neutral scanner would show them, four classes alike, one finding a patient.

    Their patients are in none of the procedural hospitals; no patient is in two splits.
    """
    return _labelled(count, seed, data, FINDINGS, [None] * len(FINDINGS))


def positioning_set(count: int, seed: int, data: DataConfig) -> LabelledImages:
    """Return so many phantoms labelled by how the patient stands, as a radiographer rejects images for.

    All findings occur alike in the three classes; no patient is in two splits.
    """
    return _labelled(count, seed, data, tuple(POSITIONS), list(POSITIONS.values()))


def _labelled(
    count: int, seed: int, data: DataConfig, classes: tuple[str, ...], tilts: Sequence[float | None]
) -> LabelledImages:
    """Return phantoms whose patients take the classes, and the findings, in turn."""
    if data.dimensions == 3:
        raise DataError(
            "procedural images are flat, and [data] dimensions = 3; what needs them takes a labelled folder."
        )
    images = np.empty((count, data.channels, data.image_size, data.image_size), np.uint8)
    patients = np.arange(count) // _IMAGES_PER_PATIENT
    for place in tqdm(range(count), "phantoms", unit="image", disable=None, delay=2, leave=False):
        patient = int(patients[place])
        rng = np.random.default_rng([seed, 1, place])
        anatomy = draw_anatomy(FINDINGS[patient % len(FINDINGS)], np.random.default_rng([seed, 0, patient]))
        tilt = tilts[patient % len(classes)]
        image = draw_image(anatomy, rng, None if tilt is None else tilt + rng.uniform(-2, 2))
        images[place] = to_square(image[:, :, None], data.image_size, data.channels)
    return LabelledImages(
        images=images,
        labels=(patients % len(classes)).astype(np.int64),
        classes=classes,
        patients=patients.astype(np.int64),
        sites=np.full(count, "procedural"),
        splits=_splits(patients // len(classes)),
    )


def _splits(turns: np.ndarray) -> np.ndarray:
    """Return the split of each image, given which patient of its class its patient is: 0, 1, 2, …

    A golden-ratio sequence spreads the patients evenly, so that the shares hold for any count.
    """
    position = (turns * 0.6180339887498949) % 1.0
    bounds = np.cumsum(list(_SPLITS.values()))[:-1]
    return np.array(list(_SPLITS))[np.digitize(position, bounds)]
