"""Balanced accuracy, macro one-against-rest AUC and mean average precision."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score


@dataclass(frozen=True)
class Scores:
    """How well probabilities tell the classes apart, each class counted alike; all in [0, 1]."""

    balanced_accuracy: float | None  # None where an image may have several labels, which would need thresholds
    auc: float
    average_precision: float

    @property
    def headline(self) -> tuple[float, float]:
        """The two that a table shows and that validation chooses by: the first two there are."""
        if self.balanced_accuracy is None:
            return self.auc, self.average_precision
        return self.balanced_accuracy, self.auc


def score(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> Scores:
    """Return the scores of [N, K] probabilities against [N] labels, over the classes that occur in the labels.

    At least two must occur. A tie of probabilities goes to the first class. Labels [N, K] of 0 and 1 say
    that an image may have several; counted are then those that some image has and some has not.

    >>> score(np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]]))
    Scores(balanced_accuracy=0.75, auc=1.0, average_precision=1.0)
    """
    several = labels.ndim == 2
    truth = labels == 1 if several else labels[:, None] == np.arange(probabilities.shape[1])  # [N, K]
    present = np.flatnonzero(truth.any(axis=0) & ~truth.all(axis=0))
    aucs = [roc_auc_score(truth[:, k], probabilities[:, k]) for k in present]
    precisions = [average_precision_score(truth[:, k], probabilities[:, k]) for k in present]
    recall = None
    if not several:
        predicted = probabilities.argmax(axis=1)
        recall = float(np.mean([np.mean(predicted[truth[:, k]] == k) for k in present]))
    return Scores(recall, float(np.mean(aucs)), float(np.mean(precisions)))


def can_tell(labels: NDArray[np.int64]) -> bool:
    """Return whether labels [N] or [N, K] can be scored: two classes, or a label that some have and some have not."""
    return bool((labels.min(axis=0) != labels.max(axis=0)).any()) if len(labels) else False
