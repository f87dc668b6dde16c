"""The linear probe: logistic regression on frozen features."""

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from wardround.probe.scores import score

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # sklearn's C, the inverse of the penalty


@dataclass(frozen=True)
class Labelled:
    """Features [N, D] and their labels [N], or [N, K] where an image may have several."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Linear:
    """A fitted probe: a class's score is ((features - mean) / scale) @ weights + bias, and the softmax of all of them,
    or where an image may have several labels the sigmoid of each, its probability."""

    mean: NDArray[np.float64]  # [D]
    scale: NDArray[np.float64]  # [D]
    weights: NDArray[np.float64]  # [K, D]
    bias: NDArray[np.float64]  # [K]


def linear_probabilities(train: Labelled, val: Labelled, test: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the class probabilities of test images: [N, D] -> [N, K]; every class occurs in `train`.

    Features are standardised by the training images. The penalty is the one with the best sum of both
    scores on `val`, the strongest of equals; the model is not fitted again with `val`. Of labels [N, K]
    each is a regression of its own, all with one penalty.
    """
    scaler, model = _fitted(train, val)
    with threadpool_limits(1):
        return np.asarray(model.predict_proba(scaler.transform(test)), np.float64)


def linear_probe(train: Labelled, val: Labelled) -> Linear:
    """Return the weights behind `linear_probabilities`."""
    scaler, model = _fitted(train, val)
    of_classes = getattr(model, "estimators_", [model])
    weights, bias = (np.concatenate([getattr(one, key) for one in of_classes]) for key in ("coef_", "intercept_"))
    if train.labels.ndim == 1 and len(weights) == 1:  # of two classes sklearn keeps the second one's alone
        weights, bias = (np.stack([-of[0] / 2, of[0] / 2]) for of in (weights, bias))
    return Linear(*(np.asarray(of, np.float64) for of in (scaler.mean_, scaler.scale_, weights, bias)))


def _fitted(train: Labelled, val: Labelled) -> tuple[Any, Any]:
    """Return what standardises features, and sklearn's model of the penalty that `val` chooses."""
    scaler = StandardScaler().fit(train.features)
    x, x_val = (scaler.transform(f) for f in (train.features, val.features))
    # Each strength starts from the one before, where there is one regression.
    model = _regression() if train.labels.ndim == 1 else OneVsRestClassifier(_regression())
    key = "C" if train.labels.ndim == 1 else "estimator__C"
    best, chosen = -1.0, None
    # One thread: the products are so small that several wait for each other, on a busy machine a
    # hundred times longer than they compute. It also makes the result independent of the core count.
    with threadpool_limits(1), warnings.catch_warnings():
        # The weakest penalties on few images have no finite optimum; validation rules them out.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for strength in STRENGTHS:
            model.set_params(**{key: strength}).fit(x, train.labels)
            found = sum(score(val.labels, model.predict_proba(x_val)).headline)
            if found > best:
                best, chosen = found, copy.deepcopy(model)
    assert chosen is not None
    return scaler, chosen


def _regression() -> LogisticRegression:
    return LogisticRegression(max_iter=200, warm_start=True)
