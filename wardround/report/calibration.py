"""Pictures of answers: whether confidence means what it says, and what is taken for what."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from wardround.probe.evaluation import SHOWN, Detail

NUMBERED = 12  # classes at most whose cells have room for a number


def draw_reliability(details: Sequence[Detail], path: Path) -> None:
    """Write a PNG with a panel an arm: how often answers are right, by how sure they are; a line a probe."""
    arms = list(dict.fromkeys(detail.arm for detail in details))
    figure = Figure(figsize=(3.4 * len(arms), 3.8), dpi=110, layout="constrained")
    for axis, arm in zip(figure.subplots(1, len(arms), squeeze=False)[0], arms, strict=True):
        axis.plot([0, 1], [0, 1], color="0.7", linestyle="--", linewidth=1)
        for detail, mark in zip([one for one in details if one.arm == arm], "osD^vPX", strict=False):
            found, name = detail.calibration, SHOWN.get(detail.probe, detail.probe)
            label = f"{name}: ECE {found.ece:.3f}"
            axis.plot(
                found.confidence, found.accuracy, marker=mark, markersize=4, linewidth=1, label=label, clip_on=False
            )
        axis.set(title=arm, xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7, loc="upper left")
    _save(figure, path)


def draw_confusion(details: Sequence[Detail], classes: Sequence[str], path: Path) -> None:
    """Write a PNG of what each class is taken for: a row an arm, a column a probe, each line of a square sums to 1."""
    arms = list(dict.fromkeys(detail.arm for detail in details))
    by_arm = [[detail for detail in details if detail.arm == arm] for arm in arms]
    columns = max(map(len, by_arm))
    figure = Figure(figsize=(2.6 * columns + 0.8, 2.7 * len(arms)), dpi=110, layout="constrained")
    for line, of_arm in zip(figure.subplots(len(arms), columns, squeeze=False), by_arm, strict=True):
        for axis in line[len(of_arm) :]:
            axis.set_visible(False)
        for axis, detail in zip(line, of_arm, strict=False):
            counts = np.array(detail.confusion)
            shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
            axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
            for (truth, said), share in np.ndenumerate(shares if len(classes) <= NUMBERED else np.zeros((0, 0))):
                colour = "white" if share > 0.5 else "black"
                axis.text(said, truth, f"{share:.2f}", ha="center", va="center", fontsize=7, color=colour)
            places = range(len(classes))
            axis.set_xticks(places, classes, fontsize=7, rotation=45, ha="right")
            axis.set_yticks(places, classes, fontsize=7)
            axis.set_title(f"{detail.arm}\n{SHOWN.get(detail.probe, detail.probe)}", fontsize=8)
            axis.set(xlabel="answer", ylabel="truth")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
