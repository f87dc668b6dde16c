"""Probes: what a frozen backbone's features are worth, on images it was not trained on."""

from wardround.probe.features import features
from wardround.probe.fractions import draw_fraction
from wardround.probe.knn import knn_probabilities
from wardround.probe.linear import linear_probabilities
from wardround.probe.scores import Scores, score

__all__ = ["Scores", "draw_fraction", "features", "knn_probabilities", "linear_probabilities", "score"]
