"""NIfTI and FreeSurfer volumes: whole, or as slices along their third axis in the orientation they are stored in."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from wardround.data.facts import MAX_VOXELS, Facts, Frame, ReadError, Window
from wardround.data.intensities import Values, coarse, shown_volume, stretched, windowed


def facts(path: Path) -> Facts:
    """Return what the header says: a slice along the third axis is a frame; of a series, the first volume counts."""
    image = nibabel.load(path)
    if image.get_data_dtype().names or image.get_data_dtype().kind == "c":
        raise ReadError("its voxels are colours or complex numbers; convert it to a grey volume")
    if len(image.shape) < 2:
        raise ReadError(f"no image: {len(image.shape)} dimensions")
    width, height, slices = (int(size) for size in (*image.shape, 1)[:3])
    if width * height * slices > MAX_VOXELS:
        raise ReadError(f"too large: a volume of {width} x {height} x {slices}; at most 512 x 512 x 512 are read")
    return Facts(frames=slices, height=height, width=width, channels=1)


def frames(path: Path, numbers: Sequence[int], window: Window | None) -> Iterator[Frame]:
    """Yield the slices of these numbers, [H, W, 1] on [0, 1], the second axis upwards as it is customary.

    Without a window all slices share one stretch between the volume's percentiles.
    """
    volume = _first_volume(nibabel.load(path))
    reference = coarse(volume)
    for index in numbers:
        values = _float32(np.rot90(volume[:, :, index]))
        shown = windowed(np.nan_to_num(values), *window) if window else stretched(values, reference)
        yield shown[:, :, None]


def volume(paths: Sequence[Path], window: Window | None) -> tuple[Values, NDArray[np.float64]]:
    """Return the volume in one file, [X, Y, Z] on [0, 1], and its affine [4, 4] to millimetres."""
    (path,) = paths
    image = nibabel.load(path)
    values = _float32(_first_volume(image))
    if min(values.shape) < 2:
        raise ReadError("no volume: it has one slice")
    return shown_volume(values, window), np.asarray(image.affine, np.float64)


def _first_volume(image: Any) -> Any:
    """Return [X, Y, Z] in the file's units, without reading the later volumes of a series."""
    dimensions = len(image.shape)
    if dimensions == 2:
        return np.asarray(image.dataobj)[:, :, None]
    return np.asarray(image.dataobj[(slice(None),) * 3 + (0,) * (dimensions - 3)])


def _float32(values: Any) -> Values:
    """Return numbers in float32; what is beyond its range becomes infinite, without a warning."""
    with np.errstate(all="ignore"):
        return np.asarray(values, np.float32)
