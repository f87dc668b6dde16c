"""Balanced accuracy and macro one-against-rest AUC."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score


@dataclass(frozen=True)
class Scores:
    """How well probabilities tell the classes apart, each class counted alike; both in [0, 1]."""

    balanced_accuracy: float
    auc: float


def score(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> Scores:
    """Return the scores of [N, K] probabilities against [N] labels, over the classes that occur in the labels.

    At least two must occur. A tie of probabilities goes to the first class.

    >>> score(np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]]))
    Scores(balanced_accuracy=0.75, auc=1.0)
    """
    present = np.unique(labels)
    predicted = probabilities.argmax(axis=1)
    recalls = [np.mean(predicted[labels == k] == k) for k in present]
    aucs = [roc_auc_score(labels == k, probabilities[:, k]) for k in present]
    return Scores(float(np.mean(recalls)), float(np.mean(aucs)))
