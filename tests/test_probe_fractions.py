"""A fraction of the labels is whole patients, of every class, and the same for the same seed."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.probe.fractions import draw_fraction


def cohort(patients: int, images_each: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and patients where every patient has one class."""
    patient = np.repeat(np.arange(patients), images_each)
    return patient % classes, patient


def test_a_share_is_reached_in_every_class_by_whole_patients() -> None:
    labels, patients = cohort(patients=100, images_each=5, classes=2)
    drawn = draw_fraction(labels, patients, 0.1, np.random.default_rng(0))
    assert np.bincount(labels[drawn]).tolist() == [25, 25]
    assert all(np.isin(np.flatnonzero(patients == p), drawn).all() for p in np.unique(patients[drawn]))


def test_the_last_patient_comes_whole() -> None:
    labels, patients = cohort(patients=10, images_each=10, classes=1)
    assert len(draw_fraction(labels, patients, 0.11, np.random.default_rng(0))) == 20
    assert len(draw_fraction(labels, patients, 0.3, np.random.default_rng(0))) == 30  # 0.3 x 100 is 30.000000000000004


def test_all_labels_are_all_images_in_order() -> None:
    labels, patients = cohort(7, 3, 2)
    np.testing.assert_array_equal(draw_fraction(labels, patients, 1.0, np.random.default_rng(0)), np.arange(21))


def test_a_class_that_is_no_patients_most_frequent_is_drawn_too() -> None:
    patients = np.repeat(np.arange(20), 5)
    labels = np.zeros(100, np.int64)
    labels[12], labels[57] = 1, 2  # one image of one patient each
    drawn = draw_fraction(labels, patients, 0.01, np.random.default_rng(0))
    assert set(labels[drawn]) == {0, 1, 2}


def test_draws_differ_by_seed_and_repeat_with_it() -> None:
    labels, patients = cohort(100, 5, 2)
    draws = [draw_fraction(labels, patients, 0.1, np.random.default_rng(seed)).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.001, 1.0))
def test_any_cohort_gives_whole_patients_of_every_class(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, 12, 80) * 7 - 3
    labels = rng.integers(0, 4, 80)
    drawn = draw_fraction(labels, patients, share, rng)
    assert set(labels[drawn]) == set(labels)
    assert len(drawn) >= share * 80 - 1e-6
    assert set(np.flatnonzero(np.isin(patients, patients[drawn]))) == set(drawn)


def test_of_several_labels_each_is_drawn_with_and_without() -> None:
    patients = np.repeat(np.arange(50), 4)
    labels = np.zeros((200, 3), np.int64)
    labels[:, 0] = 1
    labels[9, 0] = 0  # one image of all has it not
    labels[33, 1] = 1  # one image of all has it
    labels[patients % 2 == 0, 2] = 1
    drawn = draw_fraction(labels, patients, 0.02, np.random.default_rng(0))
    assert labels[drawn].any(axis=0).all() and not labels[drawn].all(axis=0).any()
    assert set(np.flatnonzero(np.isin(patients, patients[drawn]))) == set(drawn)


def test_patients_without_any_label_have_their_share() -> None:
    patients = np.repeat(np.arange(100), 2)
    labels = np.where(patients[:, None] < 20, np.eye(2, dtype=np.int64)[patients % 2], 0)
    drawn = draw_fraction(labels, patients, 0.1, np.random.default_rng(0))
    assert (~labels[drawn].any(axis=1)).sum() == 16 and labels[drawn].sum(axis=0).tolist() == [2, 2]
