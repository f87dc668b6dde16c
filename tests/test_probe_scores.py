"""Scores and probes against numbers computed by hand, and probes on data whose answer is known."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from wardround.probe.knn import knn_probabilities
from wardround.probe.linear import STRENGTHS, Labelled, linear_probabilities
from wardround.probe.scores import score


def test_balanced_accuracy_counts_each_class_alike() -> None:
    labels = np.array([0] * 9 + [1])
    always_first = np.tile([0.9, 0.1], (10, 1))
    assert score(labels, always_first).balanced_accuracy == 0.5


def test_the_auc_of_three_classes_is_the_mean_of_each_against_the_rest() -> None:
    labels = np.array([0, 0, 1, 2])
    probabilities = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.4, 0.3], [0.1, 0.2, 0.7]])
    # Class 0: of 2 x 2 pairs, 0.6 wins both, 0.2 loses to 0.3 and beats 0.1: 3 of 4.
    # Class 1: of 1 x 3 pairs, 0.4 beats 0.3 and 0.2 and loses to 0.5: 2 of 3. Class 2: 3 of 3.
    found = score(labels, probabilities)
    assert found.auc == pytest.approx((3 / 4 + 2 / 3 + 1) / 3)
    assert found.balanced_accuracy == pytest.approx((1 / 2 + 1 + 1) / 3)


def test_both_classes_of_two_have_the_same_auc() -> None:
    labels = np.array([0, 1, 1, 0, 1])
    positive = np.array([0.2, 0.9, 0.4, 0.6, 0.7])
    found = score(labels, np.stack([1 - positive, positive], axis=1))
    assert found.auc == pytest.approx(5 / 6)  # of 2 x 3 pairs, only 0.6 against 0.4 is the wrong way round


# Mean 0 and the same deviation along both axes: standardising scales it, and leaves its angles as they are.
CROSS = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], np.float32)


def test_neighbours_are_near_by_angle_and_not_by_length() -> None:
    near_the_first, near_the_second = [0.01, 0.001], [40.0, 90.0]
    votes = knn_probabilities(CROSS, np.arange(4), np.array([near_the_first, near_the_second], np.float32), 4, k=1)
    np.testing.assert_array_equal(votes, np.eye(4)[:2])


def test_a_vote_weighs_by_its_cosine() -> None:
    found = knn_probabilities(CROSS, np.array([0, 1, 1, 1]), np.array([[0.8, 0.6]], np.float32), classes=3)
    weights = np.exp(np.array([0.8, 0.6, -0.8, -0.6]) / 0.07)  # all four, since fewer than twenty are labelled
    np.testing.assert_allclose(found, [[weights[0] / weights.sum(), weights[1:].sum() / weights.sum(), 0.0]], rtol=1e-4)


def test_the_twenty_first_neighbour_has_no_vote() -> None:
    train, labels = np.repeat(CROSS, 20, axis=0), np.repeat([0, 1, 1, 1], 20)
    found = knn_probabilities(train, labels, np.array([[3.0, 0.0]], np.float32), classes=2)
    np.testing.assert_array_equal(found, [[1.0, 0.0]])


def test_a_constant_part_of_the_features_does_not_blind_the_neighbours() -> None:
    offset = np.array([1000.0, 1000.0], np.float32)
    votes = knn_probabilities(CROSS + offset, np.arange(4), CROSS * 0.5 + offset, 4, k=1)
    np.testing.assert_array_equal(votes, np.eye(4))


def shifted(rng: np.random.Generator, count: int, scale: float) -> Labelled:
    """Three classes that differ in their mean only, one feature a thousand times larger than the others."""
    labels = rng.integers(0, 3, count)
    found = rng.normal(size=(count, 6)) * scale
    found[np.arange(count), labels] += 2.0
    found[:, 5] *= 1000.0
    return Labelled(found.astype(np.float32), labels)


def test_the_linear_probe_finds_what_is_linear_whatever_the_scale_of_a_feature() -> None:
    rng = np.random.default_rng(0)
    train, val, test = (shifted(rng, count, scale=0.5) for count in (300, 100, 500))
    found = score(test.labels, linear_probabilities(train, val, test.features))
    assert found.balanced_accuracy > 0.95
    assert found.auc > 0.99


def test_the_penalty_is_the_best_on_validation_as_float64_fits_from_scratch_find_it() -> None:
    rng = np.random.default_rng(1)
    train, val, test = (shifted(rng, count, scale=2.0) for count in (80, 60, 200))
    scaler = StandardScaler().fit(train.features.astype(np.float64))
    best: tuple[float, float] = (-1.0, 0.0)
    reference = {}
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=10_000, tol=1e-8)
        model.fit(scaler.transform(train.features.astype(np.float64)), train.labels)
        found = score(val.labels, model.predict_proba(scaler.transform(val.features)))
        best = max(best, (found.balanced_accuracy + found.auc, -strength))
        reference[-strength] = model.predict_proba(scaler.transform(test.features))
    probabilities = linear_probabilities(train, val, test.features)
    assert STRENGTHS[0] < -best[1] < STRENGTHS[-1]  # the choice is a choice
    np.testing.assert_allclose(probabilities, reference[best[1]], atol=0.005)


def test_the_probes_are_deterministic() -> None:
    rng = np.random.default_rng(2)
    train, val, test = (shifted(rng, 100, scale=2.0) for _ in range(3))
    first, second = (linear_probabilities(train, val, test.features) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_of_several_labels_auc_and_average_precision_are_means_over_those_that_vary() -> None:
    labels = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1]])
    found = score(labels, np.array([[0.9, 0.5, 0.5], [0.8, 0.5, 0.5], [0.7, 0.5, 0.5], [0.1, 0.5, 0.5]]))
    # Only the first varies: 0.9 beats both, 0.7 beats 0.1 only; precision 1 at the first, 2/3 at the second.
    assert found.auc == pytest.approx(3 / 4)
    assert found.average_precision == pytest.approx((1 + 2 / 3) / 2)
    assert found.balanced_accuracy is None and found.headline == (found.auc, found.average_precision)


def test_neighbours_vote_on_each_label_by_itself() -> None:
    labels = np.array([[1, 1], [1, 0], [0, 0], [0, 0]])
    votes = knn_probabilities(CROSS, labels, np.array([[2.0, 2.0]], np.float32), 2, k=2)
    np.testing.assert_allclose(votes, [[1.0, 0.5]])


def test_the_linear_probe_finds_labels_that_overlap() -> None:
    rng = np.random.default_rng(3)
    parts = []
    for count in (200, 80, 200):
        labels = rng.integers(0, 2, (count, 3))
        parts.append(
            Labelled((labels @ rng_directions() + rng.normal(size=(count, 5)) * 0.3).astype(np.float32), labels)
        )
    train, val, test = parts
    found = score(test.labels, linear_probabilities(train, val, test.features))
    assert found.auc > 0.95 and found.average_precision > 0.95


def rng_directions() -> np.ndarray:
    return np.random.default_rng(9).normal(size=(3, 5))
