"""Labelled images that a coordinator or a downstream team owns: read whole, for probes and pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from wardround.config.federation import DataConfig
from wardround.data.facts import ReadError
from wardround.data.intensities import to_square
from wardround.data.labels import Row, label_sets, read_rows, read_table
from wardround.data.readers import quiet, read_facts, read_frames
from wardround.errors import DataError


@dataclass(frozen=True)
class LabelledImages:
    """Images with what is known of each, in the order of their table."""

    images: NDArray[np.uint8]  # [N, C, S, S] or [N, C, S, S, S], 0..255 means [0, 1]
    labels: NDArray[np.int64]  # [N], places in classes; of several labels an image [N, K], 1 where it has one
    classes: tuple[str, ...]  # sorted
    patients: NDArray[np.int64]  # [N], 0..P-1 by first appearance
    sites: NDArray[np.str_]  # [N]
    splits: NDArray[np.str_]  # [N]
    named: NDArray[np.bool_] | None = None  # [N], whether anything says whose an image is; None: of all
    groups: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)  # by column [N], to be told apart in a result

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.labels.ndim == 2

    @property
    def one_hot(self) -> NDArray[np.int64]:
        """The labels as [N, K], 1 where an image has one."""
        return self.labels if self.multi_label else np.eye(len(self.classes), dtype=np.int64)[self.labels]


def read_labelled(
    folder: Path,
    data: DataConfig,
    label: str = "label",
    *,
    multi_label: bool = False,
    by: Sequence[str] = (),
    opted_out: Callable[[str], bool] | None = None,
) -> LabelledImages:
    """Return all images of a labelled folder, of every site and split; `label` names the column.

    With `multi_label` a cell holds labels with `;` between them, and an empty one means that the image has
    none. `by` names columns whose values become `groups`; an empty cell there is a group of its own. Where the
    patient of a row, or the one that its file names, has `opted_out`, it is left out unread.
    Raises DataError for a table that is wrong and for the first image that cannot be read: a set that
    measures should be whole. Holds N x C x S x S bytes in memory.
    """
    rows = read_rows(folder, label, multi_label=multi_label)
    table = read_table(folder, by)  # row by row the same
    if opted_out is not None:
        stays = [not any(map(opted_out, _owners(folder, row, data))) for row in rows]
        rows, table = list(compress(rows, stays)), list(compress(table, stays))
    sets = [label_sets(row.label) if multi_label else (row.label,) for row in rows]
    classes = tuple(sorted({name for found in sets for name in found}))
    places = {name: place for place, name in enumerate(classes)}
    labels = np.zeros((len(rows), len(classes)), np.int64)
    for line, found in zip(labels, sets, strict=True):
        line[[places[name] for name in found]] = 1
    patients, named = patients_of(folder, rows, data)
    return LabelledImages(
        images=read_images(folder, rows, data),
        labels=labels if multi_label else labels.argmax(axis=1),
        classes=classes,
        patients=patients,
        sites=np.array([row.site for row in rows]),
        splits=np.array([row.split for row in rows]),
        named=named,
        groups={name: np.array([cells[name].strip() or "(empty)" for cells in table]) for name in by},
    )


def select_site(images: LabelledImages, site: str | None) -> LabelledImages:
    """Return the images of one site, and the classes that they have; None: all of them as they are."""
    if site is None:
        return images
    rows = np.flatnonzero(images.sites == site)
    if not len(rows):
        raise DataError(f"no row of labels.csv has site '{site}'; found {', '.join(sorted(set(images.sites)))}.")
    names = ("images", "labels", "patients", "sites", "splits")
    parts = {name: getattr(images, name)[rows] for name in names}
    parts["named"] = None if images.named is None else images.named[rows]
    groups = {column: values[rows] for column, values in images.groups.items()}
    classes = images.classes
    if not images.multi_label:
        kept, parts["labels"] = np.unique(parts["labels"], return_inverse=True)
        classes = tuple(images.classes[place] for place in kept)
    return LabelledImages(**parts, classes=classes, groups=groups)


def patients_of(folder: Path, rows: Sequence[Row], data: DataConfig) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return a number for each row's patient, by first appearance, and whether anything names it: [N], [N].

    As at a site, the table's word counts before the file's, case does not count, and without either a file is a
    patient of its own.
    """
    with quiet():
        names = [(row.patient or _owners(folder, row, data)[1]).strip().casefold() for row in rows]
    numbers: dict[str, int] = {}  # no patient's name holds a NUL
    keys = [name or f"\0{row.file}" for name, row in zip(names, rows, strict=True)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64), np.array(names) != ""


def labelled_sites(folder: Path) -> list[str]:
    """Return the distinct values of the column `site` of labels.csv, sorted."""
    return sorted({cells["site"].strip() for cells in read_table(folder, ("site",))})


def channel_constants(folder: Path, data: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return each channel's mean and standard deviation on [0, 1] over the train split of a public folder.

    They go into a federation's config as declared constants: read from a site's own images, they would
    be a release of their own.
    """
    rows = [row for row in read_rows(folder) if row.split == "train"]
    if not rows:
        raise DataError(f"{folder.name}/labels.csv: no row has split train, over which the constants are taken.")
    pixels = read_images(folder, rows, data)
    # From the 256 counts of each channel: exact, and without a float copy of all pixels.
    counts = [np.bincount(pixels[:, channel].reshape(-1), minlength=256) for channel in range(data.channels)]
    levels = np.arange(256) / 255
    means = [float(np.average(levels, weights=count)) for count in counts]
    squares = [
        float(np.average((levels - mean) ** 2, weights=count)) for mean, count in zip(means, counts, strict=True)
    ]
    return tuple(means), tuple(square**0.5 for square in squares)


def read_images(folder: Path, rows: list[Row], data: DataConfig) -> NDArray[np.uint8]:
    """Return the images of these rows."""
    images = np.empty((len(rows), *data.shape), np.uint8)
    with quiet():
        for place, row in enumerate(tqdm(rows, folder.name, unit="image", disable=None, delay=2, leave=False)):
            try:
                images[place] = _read_image(row.path, data)
            except ReadError as error:
                raise _unread(folder, row, error) from error
    return images


def _owners(folder: Path, row: Row, data: DataConfig) -> tuple[str, str]:
    """Return the patients whom a row and the header of its file name; "" where either names none."""
    try:
        return row.patient, read_facts(row.path, data.dimensions).patient
    except ReadError as error:
        raise _unread(folder, row, error) from error


def _unread(folder: Path, row: Row, error: ReadError) -> DataError:
    return DataError(f"{folder.name}: '{row.file}': {error}. Mend it, or leave its row out.")


def _read_image(path: Path, data: DataConfig) -> NDArray[np.uint8]:
    """Return the one image in a file, [C, S, S], or the middle of its volume, [C, S, S, S]."""
    facts = read_facts(path, data.dimensions)
    if data.dimensions == 2 and facts.frames != 1:
        raise ReadError(f"it holds {facts.frames} images, and a row labels one")
    if facts.channels != data.channels and not data.convert_channels:
        raise ReadError(f"it has {facts.channels} channels, and [data] channels is {data.channels}")
    if data.dimensions == 3:
        from wardround.data.volumes import central_cube  # MONAI takes seconds to import

        return central_cube(path, data)
    (frame,) = read_frames(path, range(1), data.window)
    return to_square(frame, data.image_size, data.channels)
