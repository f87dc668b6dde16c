"""Fractions of the labels, drawn by whole patients."""

import numpy as np
from numpy.typing import NDArray


def draw_fraction(
    labels: NDArray[np.int64], patients: NDArray[np.int64], share: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return the sorted indices of a share of the images: whole patients, every class at least once.

    Stratified: a patient belongs to the class of most of its images (the first of several), and of
    each such group patients are drawn until the group's share of images is reached. Since the last
    patient comes whole, the result may exceed the share.

    >>> draw_fraction(np.array([0, 0, 1, 1]), np.array([7, 7, 8, 9]), 0.5, np.random.default_rng(0))
    array([0, 1, 2])
    """
    if share >= 1.0:
        return np.arange(len(labels))
    _, patient = np.unique(patients, return_inverse=True)
    counts = np.zeros((patient.max() + 1, labels.max() + 1), dtype=np.int64)  # [patients, classes]
    np.add.at(counts, (patient, labels), 1)
    group, sizes = counts.argmax(axis=1), counts.sum(axis=1)
    drawn = np.zeros(len(counts), dtype=bool)
    for k in np.unique(group):
        order = rng.permutation(np.flatnonzero(group == k))
        before = np.cumsum(sizes[order]) - sizes[order]  # images drawn before each patient's turn
        drawn[order[before < share * sizes[order].sum() - 1e-9]] = True
    for k in np.flatnonzero(counts.sum(axis=0)):  # a class that is nobody's most frequent
        if not counts[drawn, k].any():
            drawn[rng.choice(np.flatnonzero(counts[:, k]))] = True
    return np.flatnonzero(drawn[patient])
