"""Whether probabilities mean what they say, and whether what is unsure is what is wrong."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import entropy
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, roc_auc_score

BINS = 15  # of confidence, as Guo et al. 2017 (arXiv:1706.04599) have it


@dataclass(frozen=True)
class Calibration:
    """How confident answers are beside how often they are right, in those of 15 equal bins that are not empty."""

    ece: float  # expected calibration error: Guo et al. 2017, equation 3
    finds_errors: (
        float | None
    )  # AUC with which the entropy of an answer tells wrong from right; None where none is wrong
    confidence: tuple[float, ...]  # mean of each bin
    accuracy: tuple[float, ...]
    answers: tuple[int, ...]  # in each bin


def calibration(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> Calibration:
    """Return the calibration of [N, K] probabilities against labels [N]: of the class that is most probable.

    Of labels [N, K], several an image, each label of each image is an answer, and its confidence is the
    probability that the label is there.
    """
    from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error  # seconds

    # A probability of 1 + 1e-16 would make torchmetrics take them all for logits, and squash them.
    probabilities = probabilities.clip(0.0, 1.0)
    said, truth = torch.from_numpy(probabilities), torch.from_numpy(labels)
    if labels.ndim == 2:
        confidence, right = probabilities.ravel(), labels.ravel() == 1
        wrong = (confidence > 0.5) != right
        unsure = entropy(np.stack([confidence, 1 - confidence]))
        ece = binary_calibration_error(said.ravel(), truth.ravel(), BINS)
    else:
        confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
        wrong, unsure = ~right, entropy(probabilities, axis=1)
        ece = multiclass_calibration_error(said, truth, probabilities.shape[1], BINS)
    share, mean = calibration_curve(right, confidence, n_bins=BINS, pos_label=True)
    places = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence)  # as calibration_curve has it
    found = float(roc_auc_score(wrong, unsure)) if wrong.any() and not wrong.all() else None
    counts = np.bincount(places, minlength=BINS)
    return Calibration(
        float(ece), found, tuple(mean.tolist()), tuple(share.tolist()), tuple(counts[counts > 0].tolist())
    )


def confusion(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> tuple[tuple[int, ...], ...]:
    """Return how many images of each class (a line) were answered with each class, by [N, K] probabilities."""
    found = confusion_matrix(labels, probabilities.argmax(axis=1), labels=range(probabilities.shape[1]))
    return tuple(tuple(line) for line in found.tolist())
