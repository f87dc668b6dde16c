"""Intervals hold both chances: against Student's by hand, a plain bootstrap, and how often they hold the truth."""

import numpy as np
import pytest
from scipy.stats import norm, t
from sklearn.metrics import roc_auc_score

from wardround.probe.interval import interval, interval_of_mean, summary, weighted_scores
from wardround.probe.scores import Scores, score

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 60)
ANSWERS = np.round(RNG.dirichlet([1, 1, 1], 60), 1)  # rounded: with ties


def numbers(found: Scores) -> list[float]:
    return [np.nan if value is None else value for value in vars(found).values()]


@pytest.mark.parametrize("several", [False, True])
def test_weights_count_as_copies_of_images_do_for_scikit_learn(several: bool) -> None:
    labels = RNG.integers(0, 2, (60, 3)) if several else LABELS
    weights = RNG.integers(0, 4, (5, 60))
    found = weighted_scores(labels, ANSWERS, weights.astype(float))
    for line, of in zip(found, weights, strict=True):
        copies = np.repeat(np.arange(60), of)
        np.testing.assert_allclose(line, numbers(score(labels[copies], ANSWERS[copies])), rtol=1e-12)


def test_a_weighting_that_leaves_one_class_has_no_score() -> None:
    assert np.isnan(weighted_scores(LABELS, ANSWERS, (LABELS == 1).astype(float)[None])).all()


def test_where_all_patients_are_alike_the_interval_is_students_over_the_draws() -> None:
    labels, patients = np.tile([0, 0, 1, 1], 10), np.repeat(np.arange(10), 4)
    positive = [np.tile(one, 10) for one in ([0.1, 0.2, 0.8, 0.9], [0.1, 0.6, 0.8, 0.9], [0.1, 0.6, 0.4, 0.9])]
    draws = [np.stack([1 - p, p], axis=1) for p in positive]
    mean, sd = summary([score(labels, one) for one in draws])
    assert sd is not None and mean.balanced_accuracy == pytest.approx((1 + 0.75 + 0.5) / 3)
    ends = interval(labels, draws, patients)
    assert ends is not None
    half = t.ppf(0.975, 2) * sd.auc / 3**0.5
    assert ends[0].auc == pytest.approx(mean.auc - half)
    assert ends[1].auc == 1.0  # cut: mean and half are above it


def test_of_one_draw_the_interval_is_the_bootstraps_over_whole_patients() -> None:
    patients = np.arange(60) // 3
    rng = np.random.default_rng(5)
    members = [np.flatnonzero(patients == patient) for patient in range(20)]
    labels, answers = (LABELS == 1).astype(np.int64), np.stack([1 - ANSWERS[:, 1], ANSWERS[:, 1]], axis=1)
    chosen = (np.concatenate([members[p] for p in rng.integers(0, 20, 20)]) for _ in range(400))
    sd = np.std([roc_auc_score(labels[rows], answers[rows, 1]) for rows in chosen])
    ends = interval(labels, [answers], patients)
    assert ends is not None
    assert (ends[1].auc - ends[0].auc) / 2 == pytest.approx(t.ppf(0.975, 19) * sd, rel=0.15)


def test_the_true_auc_lies_in_the_interval_about_nineteen_times_of_twenty() -> None:
    """Patients differ, so that images of one are alike: counted one by one they would promise too much."""
    held, true = 0, norm.cdf(1.0)  # of two normals, twice the variance 1, two apart in units of one
    for number in range(100):
        rng = np.random.default_rng(number)
        patients, labels = np.repeat(np.arange(40), 4), np.repeat(np.arange(40) % 2, 4)
        shared = rng.normal(size=40)[patients] * 0.8
        value = 1 / (1 + np.exp(-(2**0.5 * labels + shared + rng.normal(size=160) * 0.6)))
        ends = interval(labels, [np.stack([1 - value, value], axis=1)], patients, seed=number)
        assert ends is not None
        held += ends[0].auc <= true <= ends[1].auc
    assert 88 <= held < 100


def test_one_patient_gives_no_interval() -> None:
    assert interval(LABELS, [ANSWERS], np.zeros(60, np.int64)) is None


def test_the_interval_of_a_mean_is_students_where_only_draws_differ() -> None:
    """Three draws of 0.2, 0.4 and 0.6 on every image: mean 0.4, deviation 0.2, t = 4.3027 with 2 degrees of freedom."""
    values = np.repeat([[0.2], [0.4], [0.6]], 30, axis=1)
    low, high = interval_of_mean(values, np.arange(30)) or (0.0, 0.0)
    half = 4.30265 * 0.2 / 3**0.5
    assert (low, high) == (pytest.approx(0.4 - half, abs=1e-5), pytest.approx(0.4 + half, abs=1e-5))


def test_the_interval_of_a_mean_counts_patients_and_not_images() -> None:
    rng = np.random.default_rng(0)
    of_patient = rng.normal(size=200)
    values, patients = np.repeat(of_patient, 4)[None], np.repeat(np.arange(200), 4)
    low, high = interval_of_mean(values, patients) or (0.0, 0.0)
    assert (high - low) / 2 == pytest.approx(1.972 * of_patient.std(ddof=1) / 200**0.5, rel=0.15)
    assert interval_of_mean(values, np.zeros(800, np.int64)) is None
