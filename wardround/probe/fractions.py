"""Fractions of the labels, drawn by whole patients."""

import numpy as np
from numpy.typing import NDArray


def draw_fraction(
    labels: NDArray[np.int64], patients: NDArray[np.int64], share: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return the sorted indices of a share of the images: whole patients, every class at least once.

    Stratified: a patient belongs to the class of most of its images (the first of several), and of
    each such group patients are drawn until the group's share of images is reached. Since the last
    patient comes whole, the result may exceed the share. Of labels [N, K], several an image, a patient
    belongs to its most frequent label or to none, and of each label there is an image with and one without.

    >>> draw_fraction(np.array([0, 0, 1, 1]), np.array([7, 7, 8, 9]), 0.5, np.random.default_rng(0))
    array([0, 1, 2])
    """
    if share >= 1.0:
        return np.arange(len(labels))
    _, patient = np.unique(patients, return_inverse=True)
    member = _members(labels)  # [N, groups]
    counts = np.zeros((patient.max() + 1, member.shape[1]), dtype=np.int64)  # [patients, groups]
    np.add.at(counts, patient, member)
    group, sizes = counts.argmax(axis=1), np.bincount(patient)
    drawn = np.zeros(len(counts), dtype=bool)
    for k in np.unique(group):
        order = rng.permutation(np.flatnonzero(group == k))
        before = np.cumsum(sizes[order]) - sizes[order]  # images drawn before each patient's turn
        drawn[order[before < share * sizes[order].sum() - 1e-9]] = True
    without = sizes[:, None] - counts
    for having in (*counts.T, *without.T):  # a class that is nobody's most frequent; a label that all drawn have
        if having.any() and not having[drawn].any():
            drawn[rng.choice(np.flatnonzero(having))] = True
    return np.flatnonzero(drawn[patient])


def _members(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return which groups an image counts for: [N] or [N, K] -> [N, K] or, with a column for none, [N, K + 1]."""
    if labels.ndim == 1:
        return np.eye(labels.max() + 1, dtype=np.int64)[labels]
    return np.column_stack([labels, ~labels.any(axis=1)]).astype(np.int64)
