"""`labels.csv`, the table of a labelled folder: file, label, patient, site, split, and any more columns."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from wardround.errors import DataError

_COLUMNS = ("file", "patient", "site", "split")
BETWEEN = ";"  # stands between the labels of an image that has several


@dataclass(frozen=True)
class Row:
    """One image of a labelled folder."""

    file: str  # relative to the folder, with forward slashes
    path: Path
    patient: str
    site: str
    split: str
    label: str


def read_table(folder: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of labels.csv as dictionaries that have at least these columns."""
    try:
        with (folder / "labels.csv").open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            header = reader.fieldnames or []
            if not header:
                raise DataError(
                    f"{folder.name}/labels.csv: is empty; expected a line that names its columns, {', '.join(columns)}."
                )
            if missing := [name for name in columns if name not in header]:
                remedy = " Separate them by commas." if len(header) == 1 and ";" in header[0] else ""
                raise DataError(
                    f"{folder.name}/labels.csv: lacks the column '{missing[0]}'; its columns are {', '.join(header)}."
                    f"{remedy}"
                )
            return list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "not a table in UTF-8"
        raise DataError(f"{folder.name}/labels.csv: cannot be read: {reason}.") from error


def read_rows(folder: Path, label: str | None = None, *, multi_label: bool = False) -> list[Row]:
    """Return the rows of labels.csv in their order; `label` names the column of labels, None reads none.

    Raises DataError for a table that is missing, lacks a column, or names a file that is absent, named
    twice or outside the folder, and for a cell of one label that has none or, as `a;b`, several.
    Files may be links; folders on the way to them may not.
    """
    table = read_table(folder, (*_COLUMNS, label) if label else _COLUMNS)
    if not table:
        raise DataError(f"{folder.name}/labels.csv: has no row; expected one an image.")
    rows, seen = [], set()
    inside = cache(lambda parent: parent.resolve().is_relative_to(folder.resolve()))
    for line, cells in enumerate(table, start=2):
        where = f"{folder.name}/labels.csv, row {line}"
        name = cells["file"] or ""
        path = path_in(folder, name, where)
        if not inside(path.parent):
            raise DataError(f"{where}: '{name}' lies behind a link to another folder; copy or mount that inside.")
        if name in seen:
            raise DataError(f"{where}: '{name}' is listed twice; keep one row an image.")
        said = cells[label].strip() if label else ""
        if label and not multi_label:
            _check_one(said, label, where)
        seen.add(name)
        patient, site, split = ((cells[key] or "").strip() for key in ("patient", "site", "split"))
        rows.append(Row(name, path, patient, site, split, said))
    return rows


def label_sets(cell: str) -> tuple[str, ...]:
    """Return the labels in a cell, each once.

    >>> label_sets("effusion; mass;effusion"), label_sets("")
    (('effusion', 'mass'), ())
    """
    return tuple(sorted({name.strip() for name in cell.split(BETWEEN)} - {""}))


def chosen(rows: Iterable[Row], folder: Path, site: str | None, splits: Sequence[str]) -> list[Row]:
    """Return the rows of a site (None: of all) and of some splits. Raises DataError where there is none."""
    of_site = [row for row in rows if site is None or row.site == site]
    if not of_site:
        known = ", ".join(sorted({row.site for row in rows}))
        raise DataError(f"{folder.name}/labels.csv: no row says site '{site}'; its sites are {known}.")
    found = [row for row in of_site if row.split in splits]
    if not found:
        known = ", ".join(sorted({row.split for row in of_site}))
        raise DataError(f"{folder.name}/labels.csv: no row has split {' or '.join(splits)}; its splits are {known}.")
    return found


def _check_one(cell: str, label: str, where: str) -> None:
    """Raise DataError unless a cell holds one label."""
    if not cell:
        raise DataError(f"{where}: column '{label}' is empty; give every image a label, or leave its row out.")
    if BETWEEN in cell:
        raise DataError(
            f"{where}: column '{label}' holds several labels ('{cell}') where one is expected; "
            "say --multi-label, or give each image one."
        )


def path_in(folder: Path, name: str, where: str) -> Path:
    """Return where a file lies. Raises DataError where its name leads out of the folder, or to no file."""
    pure = PurePosixPath(name)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise DataError(f"{where}: '{name}' is no path inside the folder; write it relative to labels.csv.")
    path = folder / name
    try:
        there = path.is_file()
    except OSError:  # a name longer than disks hold, or a folder that may not be entered
        there = False
    if not there:
        raise DataError(f"{where}: the file '{name}' does not exist; add it, or leave the row out.")
    return path
