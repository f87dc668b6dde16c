"""95 % intervals of a score: chance lies in whose images were labelled, and in who was tested."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from wardround.probe.scores import Scores, score

REPLICATES = 200  # of the test patients: the deviation that they give is right to 5 %


def interval(
    labels: NDArray[np.int64],
    answers: Sequence[NDArray[np.float64]],
    patients: NDArray[np.int64],
    seed: int = 0,
) -> tuple[Scores, Scores] | None:
    """Return the lower and upper ends of the 95 % interval of the mean score over the draws.

    labels: [N] or [N, K] of the test images; answers: [N, K] probabilities, one array a draw of labelled
    patients; patients: [N]. Two variances are added: that of the mean over draws (Student's, s²/n; none of
    a single draw), and that of the score over test patients, resampled whole (bootstrap), since images of
    one patient are alike. Either alone would be too sure: at 1 % of the labels the draws decide, at all
    of them the test patients do. Degrees of freedom: Welch 1947 and Satterthwaite 1946, the bootstrap
    counting as many as there are patients less one. The ends are cut at 0 and 1.
    None where there are fewer than two patients, or resampled ones never have two classes.
    """
    count = len(np.unique(patients))
    tested = _over_patients(labels, answers, patients, seed) if count > 1 else None
    if tested is None:
        return None
    values = np.array([_numbers(score(labels, one)) for one in answers])  # [draws, 3]
    half, mean = _half_width(values, tested, count), values.mean(axis=0)
    return _scores(np.clip(mean - half, 0, 1)), _scores(np.clip(mean + half, 0, 1))


def interval_of_mean(
    values: NDArray[np.float64], patients: NDArray[np.int64], seed: int = 0
) -> tuple[float, float] | None:
    """Return the ends of the 95 % interval of the mean of one number a test image and draw: [draws, N].

    As `interval` has it, but not cut: a difference of two arms, image by image, may be below 0.
    None where there are fewer than two patients.
    """
    if (count := len(np.unique(patients))) < 2:
        return None
    weights, means = _resampled(patients, seed), values.mean(axis=1)
    away = []
    for place, one in enumerate(values):
        own = weights[place :: len(values)]
        away.append(own @ one / own.sum(axis=1) - means[place])
    half = _half_width(means[:, None], np.concatenate(away).var(ddof=1, keepdims=True), count)[0]
    return float(means.mean() - half), float(means.mean() + half)


def summary(scores: Sequence[Scores]) -> tuple[Scores, Scores | None]:
    """Return mean and sample standard deviation over draws; no deviation of a single one."""
    values = np.array([_numbers(found) for found in scores])
    return _scores(values.mean(axis=0)), _scores(values.std(axis=0, ddof=1)) if len(values) > 1 else None


def weighted_scores(
    labels: NDArray[np.int64], probabilities: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return what `score` would of images that are there so many times: weights [B, N] -> [B, 3].

    All weightings at once: scikit-learn's functions would take seconds a row of a table. NaN where a
    weighting leaves one class.
    """
    several = labels.ndim == 2
    truth = labels == 1 if several else labels[:, None] == np.arange(probabilities.shape[1])  # [N, K]
    right = probabilities.argmax(axis=1)[:, None] == np.arange(probabilities.shape[1])
    by_class = []
    for k in np.flatnonzero(truth.any(axis=0) & ~truth.all(axis=0)):
        order = np.argsort(-probabilities[:, k], kind="stable")
        ends = np.append(np.flatnonzero(np.diff(probabilities[order, k])), len(order) - 1)  # of each run of ties
        hits, misses = (np.cumsum(weights[:, order] * of[order], axis=1)[:, ends] for of in (truth[:, k], ~truth[:, k]))
        gained, fallen = (np.diff(of, axis=1, prepend=0.0) for of in (hits, misses))
        positive, negative = hits[:, -1], misses[:, -1]
        with np.errstate(invalid="ignore", divide="ignore"):
            auc = (fallen * (hits - gained / 2)).sum(axis=1) / (positive * negative)
            precision = (gained * hits / np.maximum(hits + misses, 1e-12)).sum(axis=1) / positive
            recall = (weights * (truth[:, k] & right[:, k])).sum(axis=1) / positive
        found = np.stack([np.full(len(auc), np.nan) if several else recall, auc, precision], axis=1)
        found[(positive == 0) | (negative == 0)] = np.nan
        by_class.append(found)
    return _mean_of_known(np.array(by_class))


def _mean_of_known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over the first axis of what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0))


def _over_patients(
    labels: NDArray[np.int64], answers: Sequence[NDArray[np.float64]], patients: NDArray[np.int64], seed: int
) -> NDArray[np.float64] | None:
    """Return the variance of each score when test patients are resampled, [3].

    The draws take turns, each against its own score, so that only the patients' chance is in it.
    """
    weights = _resampled(patients, seed)
    away = []
    for place, one in enumerate(answers):
        found = weighted_scores(labels, one, weights[place :: len(answers)])
        away.append(found[~np.isnan(found[:, 1])] - _numbers(score(labels, one)))
    together = np.concatenate(away)
    return together.var(axis=0, ddof=1) if len(together) > 1 else None


def _resampled(patients: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """Return how often each image is there when patients are drawn with replacement: [N] -> [B, N]."""
    _, of_image = np.unique(patients, return_inverse=True)
    count = int(of_image.max()) + 1
    rng = np.random.default_rng([seed, 2])
    return rng.multinomial(count, np.full(count, 1 / count), REPLICATES)[:, of_image].astype(float)


def _half_width(values: NDArray[np.float64], tested: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Return half the interval of each mean: [draws, K] and the variances [K] that the patients, so many, give."""
    draws = len(values)
    drawn = values.var(axis=0, ddof=1) / draws if draws > 1 else np.zeros(values.shape[1])
    total = drawn + tested
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = total**2 / (drawn**2 / max(draws - 1, 1) + tested**2 / (count - 1))
    return np.asarray(np.where(total > 0, t.ppf(0.975, np.where(total > 0, freedom, 1.0)) * np.sqrt(total), 0.0))


def _numbers(found: Scores) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in vars(found).values()])


def _scores(values: NDArray[np.float64]) -> Scores:
    first, auc, precision = values.tolist()
    return Scores(None if np.isnan(first) else first, auc, precision)
