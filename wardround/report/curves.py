"""The picture of a federation: the loss of each site by round."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def draw_losses(losses: Mapping[str, Sequence[tuple[int, float]]], path: Path, title: str) -> None:
    """Write a PNG with one line a site; `losses` maps a site to (round, loss) pairs."""
    figure = Figure(figsize=(6, 3.4), dpi=110, layout="constrained")
    axis = figure.subplots()
    for site, points in sorted(losses.items()):
        axis.plot([r for r, _ in points], [loss for _, loss in points], marker="o", markersize=3, label=site)
    axis.set(xlabel="round", ylabel="loss at the round's end", title=title)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.spines[["top", "right"]].set_visible(False)
    if losses:
        axis.legend(frameon=False)
    figure.savefig(path)
