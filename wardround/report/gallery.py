"""The figures of a report that show images: all of the coordinator's own evaluation set."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from wardround.report.drawing import INK, LABELS, MARKS, MUTED, SITES, Palette, drawn, svg
from wardround.report.figures import Figure, Table
from wardround.report.seen import Map, Neighbours, Pixels, Reconstructions

TILE = 1.0  # inches of an image
WRONG = SITES[1]


def reconstructions_figure(found: Reconstructions) -> Figure:
    """Return images, what is left of them, and what each of some rounds fills in."""
    numbers = sorted(found.by_round)
    rows = {"image": found.images, "what it sees": found.seen}
    rows |= {"start" if number == 0 else f"round {number}": found.by_round[number] for number in numbers}
    errors = {number: float(np.abs(found.by_round[number] - found.images).mean()) for number in numbers}
    first, last = errors[numbers[0]], errors[numbers[-1]]
    finding = (
        f"What the network fills in lies {last:.3f} from the image in round {numbers[-1]}, {first:.3f} "
        f"{'at the start' if numbers[0] == 0 else f'in round {numbers[0]}'} (mean difference of a pixel)."
    )
    with drawn(TILE * len(found.images) + 1.0, TILE * len(rows)) as figure:
        for line, (name, images) in zip(_tiles(figure, len(rows), len(found.images)), rows.items(), strict=True):
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", color=INK)
            for axis, image in zip(line, images, strict=True):
                _show(axis, image)
        drawing = svg(figure, "reconstructions")
    table = Table(
        ("round", "mean difference of a pixel"),
        tuple((str(number) if number else "start", f"{error:.4f}") for number, error in errors.items()),
    )
    hint = (
        "Second row: the grey parts are hidden from the network. Below: what it fills in there, beside the parts that "
        "it sees; each hidden patch's own brightness and contrast are put back for the eye."
    )
    return Figure("reconstructions", "What it fills in", finding, drawing, table, hint)


def neighbours_figure(found: Neighbours) -> Figure:
    """Return images, and beside each the five that are nearest to it."""
    columns = max(map(len, found.lines))
    finding = (
        f"Of the five images of other patients that are nearest to an image, {found.precision:.0%} have its label; any "
        f"five would have it in {found.chance:.0%} (over {found.queries:,} images)."
    )
    with drawn(TILE * columns, (TILE + 0.26) * len(found.lines)) as figure:
        for line, places in zip(_tiles(figure, len(found.lines), columns), found.lines, strict=True):
            for axis, place in zip(line, places, strict=False):
                _show(axis, found.pixels[place])
                same = found.labels[place] == found.labels[places[0]]
                said = f"{'' if same else '✗ '}{_short(found.labels[place], 13)}"
                weight = "bold" if axis is line[0] else "normal"
                axis.set_title(said, fontsize=8, color=INK if same else WRONG, weight=weight, pad=3.5)
            line[0].spines[:].set(visible=True, color=INK, linewidth=2.5)
            for axis in line[len(places) :]:
                axis.set_visible(False)
        drawing = svg(figure, "neighbours")
    rows = tuple(tuple(found.labels[place] for place in line) for line in found.lines)
    table = Table(("image", *(f"nearest {rank}" for rank in range(1, columns))), rows)
    hint = "Framed: an image. Beside it: what the newest backbone finds most alike, nearest first; ✗: another label."
    return Figure("neighbours", "What it finds alike", finding, drawing, table, hint)


def map_figure(found: Map, palette: Palette) -> Figure:
    """Return the features laid out on a plane, by label, and by site where the set has several."""
    classes, sites = _common(found.labels), _common(found.sites)
    both = len(set(found.sites.tolist())) > 1
    together = _agree(found, found.labels), _agree(found, found.sites)
    finding = (
        f"The dot nearest to a dot has its label in {together[0][0]:.0%} of cases ({together[0][1]:.0%} by chance)"
    )
    finding += f", and is of its site in {together[1][0]:.0%} ({together[1][1]:.0%} by chance)." if both else "."
    looks = {name: (LABELS[place % len(LABELS)], MARKS[place % len(MARKS)]) for place, name in enumerate(classes)}
    panels = [("by label", found.labels, looks)]
    if both:
        of_site = {
            name: (palette.colour(name), palette.mark(name)) if name in palette.places else (MUTED, ".")
            for name in sites
        }
        panels.append(("by site", found.sites, of_site))
    spans = np.ptp(found.points, axis=0)
    height = 4.4 * float(np.clip(spans[1] / max(spans[0], 1e-6), 0.4, 1.1)) + 0.9
    with drawn(4.6 * len(panels), height) as figure:
        for axis, (title, values, style) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            for name, (colour, mark) in style.items():
                among = found.points[values == name]
                axis.scatter(*among.T, s=16, c=colour, marker=mark, linewidths=0, alpha=0.8, label=_short(name))
            others = found.points[~np.isin(values, list(style))]
            if len(others):
                axis.scatter(*others.T, s=8, c=MUTED, marker=".", linewidths=0, label="others")
            axis.set_title(title, fontsize=10.5, color=INK, loc="left")
            axis.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
            axis.spines[:].set_visible(False)
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, fontsize=9, handletextpad=0.1)
        drawing = svg(figure, "map")
    names, counts = np.unique(found.labels, return_counts=True)
    rows = [("label", str(name), str(count)) for name, count in zip(names, counts, strict=True)]
    names, counts = np.unique(found.sites, return_counts=True)
    rows += [("site", str(name), str(count)) for name, count in zip(names, counts, strict=True)]
    hint = (
        f"Each dot is an image: its {found.of} features laid out on paper (t-SNE). Near dots are alike; far distances "
        "and directions mean nothing. Where dots gather by site rather than by label, the network sees the machine "
        "before the disease."
    )
    return Figure(
        "map", "A map of the images", finding, drawing, Table(("kind", "name", "dots"), tuple(rows)), hint, wide=both
    )


def _agree(found: Map, values: np.ndarray) -> tuple[float, float]:
    """Return in which share of dots the nearest other dot has the same value, and which share chance would give."""
    apart = ((found.points[:, None] - found.points[None]) ** 2).sum(axis=2)
    np.fill_diagonal(apart, np.inf)
    _, counts = np.unique(values, return_counts=True)
    chance = float((counts * (counts - 1)).sum() / max(1, len(values) * (len(values) - 1)))
    return float((values[apart.argmin(axis=1)] == values).mean()), chance


def _common(values: np.ndarray, most: int = 6) -> list[str]:
    """Return the most frequent names, by name."""
    names, counts = np.unique(values, return_counts=True)
    return sorted(str(name) for name in names[np.argsort(-counts, kind="stable")][:most])


def _tiles(figure: Canvas, rows: int, columns: int) -> Sequence[Sequence[Axes]]:
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    return [list(line) for line in figure.subplots(rows, columns, squeeze=False)]


def _show(axis: Axes, image: Pixels) -> None:
    """Draw one image, [H, W, C], with the pixels that the network sees."""
    axis.imshow(image if image.shape[2] == 3 else image[:, :, 0], cmap="gray", vmin=0, vmax=1, interpolation="none")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _short(name: str, most: int = 16) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
