"""Images with a mask each, that a downstream team owns: a labelled folder whose column `mask` names pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wardround.config.federation import DataConfig
from wardround.data.facts import ReadError
from wardround.data.labelled import patients_of, read_images
from wardround.data.labels import Row, path_in, read_rows, read_table
from wardround.data.readers import quiet, read_facts, reasons
from wardround.errors import DataError

_MODES = ("1", "L", "P", "I", "I;16")  # of Pillow: one number a pixel
_MOST = 32  # distinct values; more are a photograph, or edges that were smoothed


@dataclass(frozen=True)
class MaskedImages:
    """Images and masks, in the order of their table."""

    images: NDArray[np.uint8]  # [N, C, S, S], 0..255 means [0, 1]
    masks: NDArray[np.uint8]  # [N, S, S], places in values
    values: tuple[int, ...]  # what a mask's pixels may say, sorted; the first, 0, is the background
    patients: NDArray[np.int64]  # [N], 0..P-1 by first appearance
    splits: NDArray[np.str_]  # [N]
    named: NDArray[np.bool_] | None = None  # [N], whether anything says whose an image is; None: of all


def read_masked(folder: Path, data: DataConfig) -> MaskedImages:
    """Return all images of a labelled folder with their masks, both squeezed into the square that `data` says.

    A mask is a grey or palette picture of its image's own size: 0 is the background, each other value a class. It is
    resampled by its nearest pixels. Raises DataError for a table that is wrong, and for the first image or mask that
    is missing, damaged, of another size, or no mask.
    """
    rows = read_rows(folder)
    files = [cells["mask"].strip() for cells in read_table(folder, ("mask",))]
    images = read_images(folder, rows, data)
    planes = np.empty((len(rows), data.image_size, data.image_size), np.int64)
    with quiet():
        for place, (row, name) in enumerate(zip(rows, files, strict=True)):
            planes[place] = _mask(folder, row, name, f"{folder.name}/labels.csv, row {place + 2}", data.image_size)
    values = np.unique(planes).tolist()
    if len(values) > _MOST:
        raise DataError(
            f"{folder.name}: its masks hold {len(values)} different values; expected one a class and 0 for the "
            "background. Save them without smoothing or loss, as PNG."
        )
    values = sorted({0, *values})
    patients, named = patients_of(folder, rows, data)
    return MaskedImages(
        images=images,
        masks=np.searchsorted(values, planes).astype(np.uint8),
        values=tuple(values),
        patients=patients,
        splits=np.array([row.split for row in rows]),
        named=named,
    )


def _mask(folder: Path, row: Row, name: str, where: str, size: int) -> NDArray[Any]:
    """Return an image's mask as [size, size]."""
    if not name:
        raise DataError(f"{where}: column 'mask' is empty; an image without any finding needs a mask of zeros.")
    path = path_in(folder, name, where)
    try:
        facts = read_facts(row.path)
        with reasons("pixels"), Image.open(path, formats=("PNG", "TIFF")) as picture:
            if picture.mode not in _MODES:
                raise ReadError(f"is no mask: of mode {picture.mode}, expected grey or palette")
            if picture.size != (facts.width, facts.height):
                found, expected = (f"{one.height} x {one.width}" for one in (picture, facts))
                raise ReadError(f"has {found} pixels, its image '{row.file}' {expected}")
            grey = picture.convert("L") if picture.mode == "1" else picture
            return np.asarray(grey.resize((size, size), Image.Resampling.NEAREST))
    except ReadError as error:
        raise DataError(f"{where}: mask '{name}' {error}. Mend it, or leave its row out.") from error
