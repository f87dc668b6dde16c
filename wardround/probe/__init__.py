"""Probes: what a frozen backbone's features are worth, on images it was not trained on."""

from wardround.probe.calibration import Calibration, calibration
from wardround.probe.features import features
from wardround.probe.fractions import draw_fraction
from wardround.probe.interval import interval, summary
from wardround.probe.knn import knn_probabilities
from wardround.probe.linear import Labelled, linear_probabilities
from wardround.probe.retrieval import Retrieved, Shelf, retrieve
from wardround.probe.scores import Scores, can_tell, score

__all__ = [
    "Calibration",
    "Labelled",
    "Retrieved",
    "Scores",
    "Shelf",
    "calibration",
    "can_tell",
    "draw_fraction",
    "features",
    "interval",
    "knn_probabilities",
    "linear_probabilities",
    "retrieve",
    "score",
    "summary",
]
