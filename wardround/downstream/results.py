"""From answers to what is reported: scores with intervals, calibration, ensembles, groups, retrieval."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wardround.downstream.answers import Answered, Design, Probabilities
from wardround.probe.calibration import calibration, confusion
from wardround.probe.evaluation import Detail, Evaluation, Retrieval, Row, Subgroup
from wardround.probe.interval import interval, summary
from wardround.probe.retrieval import Shelf, retrieve
from wardround.probe.scores import can_tell, score

FEWEST = 10  # patients of a class in a group: of ten, a recall's 95 % interval is some 0.3 to either side
SHOWN_QUERIES, SHOWN_NEAREST = 8, 5


def result(answered: Sequence[Answered], design: Design, notes: Sequence[str], versions: dict[str, str]) -> Evaluation:
    """Return the evaluation that the answers of all arms make."""
    images, places = design.images, design.places
    shown = [(one, key, one.single[key]) for one in answered for key in _in_order(one)]
    subgroups = tuple(group for one in answered for group in _subgroups(one, design))
    used = {"train": places.train, "val": places.val, "test": places.test}
    return Evaluation(
        rows=tuple(_row(one, *key, found, design) for one, key, found in shown),
        uncertain=tuple(row for one in answered for row in _uncertain(one, design)),
        details=tuple(detail for one in answered for detail in _details(one, design)),
        subgroups=subgroups,
        retrieval=tuple(found for one in answered if (found := _retrieval(one, design)) is not None),
        classes=images.classes,
        images={name: len(found) for name, found in used.items()},
        patients={name: len(np.unique(images.patients[found])) for name, found in used.items()},
        notes=(*notes, *_too_small(subgroups)),
        seed=design.seed,
        data=digest_of(images.images, images.labels),
        weights=None,
        versions=versions,
    )


def _row(arm: Answered, probe: str, fraction: float, found: Sequence[Probabilities], design: Design) -> Row:
    """Return the row of some draws' answers."""
    labels, patients = _test(design)
    scores = tuple(score(labels, one) for one in found)
    mean, sd = summary(scores)
    low, high = interval(labels, found, patients, design.seed) or (None, None)
    meant = [calibration(labels, one) for one in found]
    told = [one.finds_errors for one in meant if one.finds_errors is not None]
    return Row(
        arm=arm.arm,
        probe=probe,
        fraction=fraction,
        images=float(np.mean([len(train) for train in design.drawn[fraction]])),
        draws=len(found),
        mean=mean,
        sd=sd,
        low=low,
        high=high,
        scores=scores,
        ece=float(np.mean([one.ece for one in meant])),
        finds_errors=float(np.mean(told)) if told else None,
    )


def _uncertain(arm: Answered, design: Design) -> list[Row]:
    """Return a row for each deep ensemble (Lakshminarayanan et al. 2017) of draws, and for MC dropout.

    Members are the models of the draws: of other labelled patients, other new weights, or both.
    """
    rows = []
    for probe, fraction in _in_order(arm):
        found = arm.single[probe, fraction]
        if len(found) > 1:
            together = np.mean(found, axis=0)
            rows.append(_row(arm, f"{probe}, ensemble of {len(found)}", fraction, [together], design))
        if dropped := arm.dropout.get((probe, fraction)):
            rows.append(_row(arm, f"{probe}, MC dropout", fraction, dropped, design))
    return rows


def _details(arm: Answered, design: Design) -> list[Detail]:
    """Return calibration and confusion of the first draw at the largest fraction, by probe."""
    labels, _ = _test(design)
    details = []
    for probe, found in _largest(arm, design).items():
        crossed = None
        if not design.images.multi_label:
            crossed = confusion(labels, found[0])
        details.append(Detail(arm.arm, probe, max(design.drawn), calibration(labels, found[0]), crossed))
    return details


def _subgroups(arm: Answered, design: Design) -> list[Subgroup]:
    """Return the scores of each group of test images, by column, value and probe."""
    labels, patients = _test(design)
    groups = []
    for column, values in design.images.groups.items():
        of_test = values[design.places.test]
        for value in np.unique(of_test):
            rows = np.flatnonzero(of_test == value)
            truth, whose = labels[rows], patients[rows]
            count, small = len(np.unique(whose)), _is_small(design.images.one_hot[design.places.test][rows], whose)
            for probe, found in _largest(arm, design).items():
                mean, ends = None, None
                if can_tell(truth):
                    parts = [one[rows] for one in found]
                    mean = summary([score(truth, part) for part in parts])[0]
                    ends = interval(truth, parts, whose, design.seed)
                low, high = ends or (None, None)
                groups.append(Subgroup(arm.arm, probe, column, str(value), len(rows), count, mean, low, high, small))
    return groups


def _retrieval(arm: Answered, design: Design) -> Retrieval | None:
    """Return what the test images bring back of the training images by an arm's features."""
    places, truth, patients = design.places, design.images.one_hot, design.images.patients
    test, train = (Shelf(arm.features[of], truth[of], patients[of]) for of in (places.test, places.train))
    found = retrieve(test, train, design.seed)
    if found is None:
        return None
    figures, nearest = found
    asked = list(nearest)
    shown = [asked[place] for place in np.linspace(0, len(asked) - 1, min(SHOWN_QUERIES, len(asked)), dtype=int)]
    lines = ((places.test[query], *places.train[nearest[query][:SHOWN_NEAREST]]) for query in shown)
    return Retrieval(arm.arm, figures, tuple(tuple(int(place) for place in line) for line in lines))


def _in_order(arm: Answered) -> list[tuple[str, float]]:
    """Return the probes as they came, each with its fractions from the smallest up."""
    probes = list(dict.fromkeys(probe for probe, _ in arm.single))
    return sorted(arm.single, key=lambda key: (probes.index(key[0]), key[1]))


def digest_of(*arrays: NDArray[Any]) -> str:
    """Return the SHA-256 of some arrays' numbers, one after the other."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def _test(design: Design) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return labels and patients of the test images."""
    return design.images.labels[design.places.test], design.images.patients[design.places.test]


def _largest(arm: Answered, design: Design) -> dict[str, list[Probabilities]]:
    """Return an arm's answers at the largest fraction, by probe."""
    return {probe: found for (probe, fraction), found in arm.single.items() if fraction == max(design.drawn)}


def _is_small(truth: NDArray[np.int64], patients: NDArray[np.int64]) -> bool:
    """Return whether a group has too few patients with, or without, some class that occurs anywhere: [N, K], [N]."""
    return min(len(np.unique(patients[having == 1])) for having in (*truth.T, *(1 - truth).T)) < FEWEST


def _too_small(groups: Sequence[Subgroup]) -> list[str]:
    """Return a warning for each group with too few patients to tell."""
    small = dict.fromkeys((group.column, group.value) for group in groups if group.small)
    return [
        f"warning: group {column} = {value}: fewer than {FEWEST} test patients of a class; too small to tell"
        for column, value in small
    ]
