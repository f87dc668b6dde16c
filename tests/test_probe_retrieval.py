"""Retrieval against scikit-learn's average precision, and what may not come back."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import StandardScaler

from wardround.probe.retrieval import Shelf, retrieve

RNG = np.random.default_rng(0)


def shelf(count: int, first_patient: int = 0, labels: int = 3) -> Shelf:
    found = RNG.normal(size=(count, 4)).astype(np.float32)
    return Shelf(
        found, np.eye(labels, dtype=np.int64)[RNG.integers(0, labels, count)], first_patient + np.arange(count)
    )


def test_figures_are_scikit_learns_on_standardised_cosines() -> None:
    """Half of the cosines are below 0, where torchmetrics would leave the relevant out."""
    queries, gallery = shelf(20), shelf(60, first_patient=100)
    found = retrieve(queries, gallery)
    assert found is not None
    figures, nearest = found
    scaler = StandardScaler().fit(gallery.features)
    cosine = cosine_similarity(scaler.transform(queries.features), scaler.transform(gallery.features))
    alike = queries.labels @ gallery.labels.T == 1
    expected = np.mean([average_precision_score(*pair) for pair in zip(alike, cosine, strict=True)])
    assert figures.mean_average_precision == pytest.approx(expected, rel=1e-5)
    order = np.argsort(-cosine, axis=1)
    assert [nearest[place] for place in range(20)] == order[:, :10].tolist()
    first = np.take_along_axis(alike, order, axis=1)
    assert figures.precision == pytest.approx({k: first[:, :k].mean() for k in (1, 5, 10)})
    assert figures.chance == pytest.approx(alike.mean())


def test_images_of_the_querys_own_patient_do_not_come_back() -> None:
    one = shelf(30)
    found = retrieve(one, one)  # each query is in the gallery itself
    assert found is not None
    assert all(place not in nearest for place, nearest in found[1].items())


def test_images_are_alike_that_share_a_label_or_have_none() -> None:
    features = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], np.float32)
    gallery = Shelf(features, np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0]]), np.arange(3))
    queries = Shelf(features[[0, 2]], np.array([[0, 1, 0], [0, 0, 0]]), np.array([7, 8]))
    found = retrieve(queries, gallery)
    assert found is not None
    assert found[0].precision[1] == 1.0 and found[0].mean_average_precision == 1.0
    assert found[0].chance == pytest.approx(1 / 3)


def test_a_query_with_nothing_to_find_is_not_counted() -> None:
    gallery = Shelf(RNG.normal(size=(4, 2)).astype(np.float32), np.tile([1, 0], (4, 1)), np.arange(4))
    queries = Shelf(RNG.normal(size=(2, 2)).astype(np.float32), np.array([[1, 0], [0, 1]]), np.array([8, 9]))
    found = retrieve(queries, gallery)
    assert found is not None and found[0].queries == 1
    assert retrieve(Shelf(queries.features[1:], queries.labels[1:], queries.patients[1:]), gallery) is None
