"""An evaluation as a person sees it: tables and pictures."""

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from wardround.data import LabelledImages
from wardround.probe.evaluation import PROBES, SHOWN, Evaluation, Row, cell, short
from wardround.report.calibration import draw_confusion, draw_reliability
from wardround.report.neighbours import draw_retrieved
from wardround.report.tables import table


def tables(found: Evaluation) -> Iterator[Table]:
    """Give what was measured: scores, calibration and uncertainty, retrieval, and groups where there are some."""
    yield score_table(found)
    yield calibration_table(found)
    if found.retrieval:
        yield retrieval_table(found)
    if found.subgroups:
        yield subgroup_table(found)


def score_table(found: Evaluation) -> Table:
    """Return the table that a person reads: an arm and probe a line, a fraction of the labels a column."""
    title = f"{found.images['test']:,} test images of {found.patients['test']:,} patients"
    draws = max(row.draws for row in found.rows)
    drawn = f"mean of up to {draws} draws" if draws > 1 else "one draw"
    caption = f"{' / '.join(found.headline)}, {drawn} of labelled patients; below, 95 % intervals, {over(draws)}"
    if any(row.probe not in PROBES for row in found.rows):
        caption += "; frozen (first stages), full, decay, LoRA: fine-tuned; scratch: trained from random weights"
    made = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    made.caption = escape("\n".join((caption, *found.notes)))
    made.add_column("arm", overflow="fold")
    made.add_column("probe", no_wrap=True)
    sizes = {row.fraction: row.images for row in found.rows}
    for fraction in sorted(sizes):
        made.add_column(f"{fraction:.0%} of labels\n{sizes[fraction]:,.0f} images", justify="right", no_wrap=True)
    for arm, rows in groupby(found.rows, key=lambda row: row.arm):
        lines = [(probe, list(cells)) for probe, cells in groupby(rows, key=lambda row: row.probe)]
        for probe, cells in lines:
            name, last = SHOWN.get(probe, probe), probe == lines[-1][0]
            made.add_row(escape(arm), name, *(cell(row.mean, row.low, row.high) for row in cells), end_section=last)
    return made


def over(draws: int) -> str:
    """Return in words what the intervals of so many draws are over: a single one does not tell its own chance."""
    return "over draws (Student) and test patients (bootstrap)" if draws > 1 else "over test patients alone (bootstrap)"


def calibration_table(found: Evaluation) -> Table:
    """Return how far confidence can be trusted, of single models, ensembles and MC dropout, at each fraction."""
    fractions = sorted({row.fraction for row in found.rows})
    columns = [f"{fraction:.0%} of labels\nECE err AUC" for fraction in fractions]
    made = table("Calibration and uncertainty", "arm", "probe", *columns)
    made.columns[1].justify = "left"
    for column in made.columns[2:]:
        column.no_wrap = True
    made.caption_justify = "left"
    made.caption = (
        "ECE: expected calibration error, 0 is best. err: AUC with which the entropy of answers tells wrong ones "
        "from right ones, .5 is chance"
    )
    rows = {(row.arm, row.probe, row.fraction): row for row in (*found.rows, *found.uncertain)}
    names = sorted({key[:2] for key in rows}, key=lambda name: _place(found, *name))
    for arm, lines in groupby(names, key=lambda name: name[0]):
        probes = [probe for _, probe in lines]
        for probe in probes:
            cells = [_calibrated(rows.get((arm, probe, fraction))) for fraction in fractions]
            made.add_row(escape(arm), _shown(probe), *cells, end_section=probe == probes[-1])
    return made


def retrieval_table(found: Evaluation) -> Table:
    """Return how many of the training images that come back for a test image share its label."""
    first = found.retrieval[0].found
    title = f"Retrieval: {first.queries:,} test images among {first.gallery:,} training images, frozen features"
    made = table(title, "arm", "mAP", *(f"precision@{k}" for k in first.precision), "chance")
    for one in found.retrieval:
        figures = (one.found.mean_average_precision, *one.found.precision.values(), one.found.chance)
        made.add_row(escape(one.arm), *(f"{value:.3f}" for value in figures))
    return made


def subgroup_table(found: Evaluation) -> Table:
    """Return each group's scores at the largest fraction, a block a group, of the last probe that arms share.

    A group and an arm are a line each: arms as columns leave no room for names in a terminal of 80 characters.
    """
    arms = list(dict.fromkeys(row.arm for row in found.rows))
    probes = [{group.probe for group in found.subgroups if group.arm == arm} for arm in arms]
    chosen = [probe for probe in dict.fromkeys(row.probe for row in found.rows) if all(probe in own for own in probes)]
    title = f"Groups of test images: {' / '.join(found.headline)}, {_shown(chosen[-1])}, largest share of labels"
    made = table(title, "group, and its arms", "images / patients", "score")
    made.columns[0].overflow = "fold"
    made.columns[2].no_wrap = True
    by_group = groupby(
        sorted((g for g in found.subgroups if g.probe == chosen[-1]), key=lambda g: (g.column, g.value)),
        key=lambda g: (g.column, g.value),
    )
    for (column, value), members in by_group:
        of_arm = {member.arm: member for member in members}
        one = next(iter(of_arm.values()))
        small = "[yellow]too small to tell[/]" if one.small else ""
        made.add_row(f"[bold]{escape(f'{column} = {value}')}[/]", f"{one.images:,} / {one.patients:,}", small)
        for arm in arms:
            of = of_arm[arm]
            scores = cell(of.mean, of.low, of.high) if of.mean else "one class"
            made.add_row(f"  {escape(arm)}", "", scores, end_section=arm == arms[-1])
    return made


def draw_all(found: Evaluation, images: LabelledImages, folder: Path) -> None:
    """Write reliability.png, confusion.png (of one label an image) and neighbours-ARM.png into a folder."""
    draw_reliability(found.details, folder / "reliability.png")
    if not images.multi_label:
        draw_confusion(found.details, found.classes, folder / "confusion.png")
    for one in found.retrieval:
        title = f"{one.arm}: test images, and the training images nearest to them"
        draw_retrieved(images, one.shown, folder / f"neighbours-{_file_name(one.arm)}.png", title)


def _calibrated(row: Row | None) -> str:
    if row is None:
        return ""
    errors = "  -" if row.finds_errors is None else short(row.finds_errors)
    return f"{short(row.ece)} {errors} {short(row.mean.auc)}"


def _shown(probe: str) -> str:
    """Return a probe's name for people, whatever stands behind its comma."""
    name, comma, rest = probe.partition(",")
    return SHOWN.get(name, name) + comma + rest


def _place(found: Evaluation, arm: str, probe: str) -> tuple[int, int, str]:
    """Return where a row stands: as the arms and probes came, a single model before what is made of it."""
    keys = list(dict.fromkeys((row.arm, row.probe) for row in found.rows))
    return [one for one, _ in keys].index(arm), keys.index((arm, probe.partition(",")[0])), probe


def _file_name(arm: str) -> str:
    return re.sub(r"[^\w.-]+", "-", arm).strip("-.") or "arm"
