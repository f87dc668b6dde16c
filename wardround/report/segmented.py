"""A segmentation as a person sees it: a table and a picture."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from wardround.probe.segmentation import Segmentation, SegmentedRow
from wardround.report.measured import over

_COLOURS = "tab10"  # matplotlib's, one a class


def segmented_table(found: Segmentation) -> Table:
    """Return the table that a person reads: an arm a line, a fraction of the training images a column."""
    title = f"Dice on {found.images['test']:,} test images of {found.patients['test']:,} patients, {found.decoder}"
    made = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    draws = len(found.rows[0].scores)
    drawn = f"mean of {draws} draws" if draws > 1 else "one draw"
    caption = (
        f"{drawn} of images and new weights, {found.steps} steps each; below, 95 % intervals, {over(draws)}; the last "
        "line compares image by image"
    )
    made.caption = escape("\n".join((caption, *found.notes)))
    made.add_column("arm", overflow="fold")
    sizes = {row.fraction: row.images for row in found.rows}
    for fraction in sorted(sizes):
        made.add_column(f"{fraction:.0%} of images\n{sizes[fraction]:,.0f} images", justify="right", no_wrap=True)
    lines: dict[str, list[SegmentedRow]] = {}
    for row in (*found.rows, *found.gains):
        lines.setdefault(row.arm, []).append(row)
    for arm, rows in lines.items():
        of_gain = rows[0] in found.gains
        made.add_row(escape(arm), *(_cell(row, "+.3f" if of_gain else ".3f") for row in rows))
    return made


def draw_segmented(
    images: NDArray[np.uint8],
    masks: NDArray[np.uint8],
    answers: Mapping[str, NDArray[np.uint8]],
    scores: Mapping[str, NDArray[np.float64]],
    path: Path,
) -> None:
    """Write a PNG with a line an image: itself, its mask, and each arm's answer with its Dice.

    images: [N, C, S, S]; masks and answers: [N, S, S] of classes; scores: [N].
    """
    columns = ("image", "mask", *answers)
    figure = Figure(figsize=(1.7 * len(columns), 1.75 * len(images) + 0.3), dpi=110, layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for place, (line, image, mask) in enumerate(zip(axes, images, masks, strict=True)):
        for axis, name in zip(line, columns, strict=True):
            axis.axis("off")
            axis.imshow(image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)
            if name != "image":
                shown = mask if name == "mask" else answers[name][place]
                seen = np.ma.masked_equal(shown, 0)
                axis.imshow(seen, cmap=_COLOURS, vmin=0, vmax=9, alpha=0.55, interpolation="nearest")
            told = f", Dice {scores[name][place]:.2f}" if name in answers else ""
            axis.set_title(f"{name}{told}" if place == 0 or told else "", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _cell(row: SegmentedRow, form: str) -> str:
    """Return a score as a table shows it, its interval below."""
    if row.low is None or row.high is None:
        return f"{row.dice:{form}}"
    return f"{row.dice:{form}}\n{row.low:{form}} to {row.high:{form}}"
