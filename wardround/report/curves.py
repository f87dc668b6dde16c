"""The picture of a federation: the loss of each site by round."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wardround.registry.durable import new_file
from wardround.report.drawing import told

_LINES = 12  # of a legend: sixteen take all the room there is


def draw_losses(losses: Mapping[str, Sequence[tuple[int, float]]], path: Path, title: str) -> None:
    """Write a PNG with one line a site; `losses` maps a site to (round, loss) pairs, none where they are withheld."""
    figure = Figure(figsize=(6, 3.4), dpi=110, layout="constrained")
    axis = figure.subplots()
    shown = {site: points for site, points in sorted(losses.items()) if points}
    for site, points in shown.items():
        axis.plot([r for r, _ in points], [loss for _, loss in points], marker="o", markersize=3, label=site)
    axis.set(xlabel="round", ylabel="loss at the round's end", title=title)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.spines[["top", "right"]].set_visible(False)
    if shown:
        axis.legend(*told(axis, _LINES), frameon=False)
    elif losses:
        axis.text(0.5, 0.5, "withheld: they would leave without noise", transform=axis.transAxes, ha="center")
    with new_file(path) as aside:
        figure.savefig(aside, format="png")


def draw_epsilon(spent: Mapping[str, Sequence[tuple[int, float]]], path: Path, title: str) -> None:
    """Write a PNG of epsilon over rounds, one line a site; `spent` maps a site to (round, epsilon) pairs."""
    figure = Figure(figsize=(6, 3.4), dpi=110, layout="constrained")
    axis = figure.subplots()
    for site, points in spent.items():
        axis.plot(
            [done for done, _ in points], [epsilon for _, epsilon in points], marker="o", markersize=3, label=site
        )
    axis.set(xlabel="round", ylabel="epsilon spent", title=title)
    axis.set_ylim(bottom=0.0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(*told(axis, _LINES), frameon=False)
    figure.savefig(path)
