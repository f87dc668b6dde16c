"""Calibration by hand, and against torchmetrics' own traps."""

import numpy as np
import pytest

from wardround.probe.calibration import calibration


def test_the_expected_calibration_error_is_the_mean_gap_weighted_by_answers() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    positive = np.array([0.05, 0.05, 0.05, 0.35, 0.75])  # the fourth is wrong
    found = calibration(labels, np.stack([1 - positive, positive], axis=1))
    assert found.ece == pytest.approx((3 * 0.05 + 1 * 0.65 + 1 * 0.25) / 5)
    assert found.answers == (1, 1, 3)  # confidences .65, .75, .95
    np.testing.assert_allclose(found.confidence, [0.65, 0.75, 0.95])
    assert found.accuracy == (0.0, 1.0, 1.0)
    assert found.finds_errors == 1.0  # the one that is wrong is the least sure


def test_answers_that_are_sure_and_right_have_no_error_though_rounding_puts_them_above_one() -> None:
    sure = np.array([[1.0000000000000002, 0.0], [0.0, 1.0]])
    found = calibration(np.array([0, 1]), sure)
    assert found.ece == 0.0
    assert found.finds_errors is None


def test_of_several_labels_each_is_an_answer() -> None:
    labels = np.array([[1, 0], [1, 1]])
    found = calibration(labels, np.array([[0.9, 0.1], [0.9, 0.3]]))
    assert found.answers == (1, 1, 2)
    assert found.ece == pytest.approx((0.1 + 0.7 + 2 * 0.1) / 4)
    assert found.finds_errors == 1.0  # 0.3, which is wrong, is nearer to a half than 0.1 and 0.9
