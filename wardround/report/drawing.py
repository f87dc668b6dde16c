"""How every figure of a report is drawn: matplotlib's SVG, in colours that a page changes for the dark.

A site has one colour and one mark in all figures. The colours are those of Okabe and Ito (2008), which people with any
colour vision tell apart, two of them darkened until they stand out from white at 3 to 1.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

INK, MUTED, GRID = "#1f2328", "#656d76", "#d8dee4"
SITES = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#c98500", "#3a9bd9")
LABELS = ("#332288", "#cc6677", "#44aa99", "#999933", "#882255", "#ddcc77")  # Tol's muted: classes are no sites
MARKS = ("o", "s", "^", "D", "v", "P", "X")
_DARK = {
    INK: "#e6edf3",
    MUTED: "#9aa4ae",
    GRID: "#30363d",
    **dict(zip(SITES, ("#4da3db", "#f07f2e", "#2fbf95", "#dd8bc0", "#f0b429", "#8fd0f5"), strict=True)),
    **dict(zip(LABELS, ("#9f94e8", "#e58e9c", "#6fd0c0", "#c6c65a", "#d07aa6", "#efe2a0"), strict=True)),
}
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched, and set in the page's own font
    "text.parse_math": False,  # names may hold dollars
    "savefig.transparent": True,
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
_LINES = 4  # of a legend
_COLOUR = re.compile(r"(?<=: )(#[0-9a-f]{6})(?=[;\"])")


class Palette:
    """Each site's colour and mark: by its place among all sites of the federation."""

    def __init__(self, sites: Sequence[str]) -> None:
        self.places = {site: place for place, site in enumerate(sorted(sites))}

    def colour(self, site: str) -> str:
        """Return its colour; after the sixth site they come again, with other marks."""
        return SITES[self.places[site] % len(SITES)]

    def mark(self, site: str) -> str:
        """Return its mark."""
        return MARKS[self.places[site] % len(MARKS)]


@contextmanager
def drawn(width: float, height: float) -> Iterator[Figure]:
    """Give a figure of so many inches to draw into, in the settings of a report."""
    with matplotlib.rc_context(_SETTINGS):
        yield Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element without identifiers that two figures of one page would share."""
    block = io.StringIO()
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure.savefig(block, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = block.getvalue()
    text = re.sub(r'(?<=<g) id="[^"]*"| id="image[^"]*"', "", text[text.index("<svg") :])
    # matplotlib's own style is for all of a document; the page says it for figures.
    return re.sub(r"\s*<defs>\s*<style type=\"text/css\">.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)


def themed(text: str) -> str:
    """Return an SVG whose colours are variables of the page: `#0072b2` -> `var(--c0072b2)`."""
    return _COLOUR.sub(lambda found: f"var(--c{found[1][1:]})" if found[1] in _DARK else found[1], text)


def variables(dark: bool) -> str:
    """Return the variables of all colours as CSS."""
    return " ".join(f"--c{light[1:]}: {other if dark else light};" for light, other in _DARK.items())


def legend(axis: Axes, columns: int) -> None:
    """Put the names above the axes, in so many columns; of many the first, which leave room for the axes."""
    handles, names = told(axis, _LINES * columns)
    if handles:
        axis.figure.legend(
            handles, names, loc="outside upper left", ncols=min(columns, len(names)), handlelength=1.6,
            columnspacing=1.2, borderaxespad=0.2, fontsize=9.5,
        )  # fmt: skip


def told(axis: Axes, most: int) -> tuple[list[Artist], list[str]]:
    """Return what a legend tells of the axes: at most so many lines, of which the last says how many are left out."""
    handles, names = axis.get_legend_handles_labels()
    if (left := len(names) - most + 1) > 1:
        return [*handles[: most - 1], Line2D([], [], linestyle="none")], [*names[: most - 1], f"and {left} more"]
    return list(handles), list(names)
