"""The slices of a DICOM series as one volume, each in the place where the patient has it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray

from wardround.data.dicom import number, read, text
from wardround.data.dicom_pixels import CT_WINDOW, macro, values
from wardround.data.facts import MAX_VOXELS, ReadError, Window
from wardround.data.intensities import Values, shown_volume

Affine = NDArray[np.float64]  # [4, 4], from an index to millimetres: right, anterior, superior

_SAME_PLACE = 0.01  # millimetres
_OFF = 0.1  # share of the gap by which a slice may lie off its even place: scanners round positions
_DEFERRED = 4096  # bytes: longer elements stay on disk, so that a header costs no pixels


@dataclass(frozen=True)
class Plane:
    """Where one frame of one file lies."""

    path: Path
    frame: int
    order: tuple[int, int]  # InstanceNumber, frame: acquired in this order
    shape: tuple[int, int]  # rows, columns
    position: NDArray[np.float64]  # [3], millimetres, centre of the first pixel (left, posterior, superior)
    steps: NDArray[np.float64]  # [2, 3], millimetres: to the next column, to the next row

    @property
    def height(self) -> float:
        """Millimetres along the normal, in the direction in which slices are stacked."""
        normal = np.cross(*self.steps)
        return float(self.position @ normal / np.linalg.norm(normal))


def volume(paths: Sequence[Path], window: Window | None) -> tuple[Values, Affine]:
    """Return the volume [columns, rows, slices] on [0, 1], and its affine.

    Where slices repeat a place, as in a series over time, the first acquired counts. CT without a
    `window` takes its soft-tissue window, all else is stretched. Raises ReadError where slices are
    missing or do not fit together.
    """
    planes = _first_at_each_place([plane for path in paths for plane in _planes(path)])
    _refuse_what_is_no_volume(planes)
    columns, rows = planes[0].steps
    step = (planes[-1].position - planes[0].position) / (len(planes) - 1)
    affine = np.eye(4)
    affine[:3] = np.stack([columns, rows, step, planes[0].position], axis=1)
    affine[:2] *= -1  # DICOM's left and posterior to right and anterior
    header = read(paths[0], _DEFERRED)
    if window is None and text(header, "Modality") == "CT":
        window = CT_WINDOW
    shown = shown_volume(_stacked(planes), window)
    return 1 - shown if text(header, "PhotometricInterpretation") == "MONOCHROME1" else shown, affine


def _planes(path: Path) -> list[Plane]:
    """Return where the frames of a file lie, from its header alone."""
    header = read(path, _DEFERRED)
    count = number(header, "NumberOfFrames") if header.get("NumberOfFrames") is not None else 1
    first = number(header, "InstanceNumber") if header.get("InstanceNumber") is not None else 0
    shape = (number(header, "Rows"), number(header, "Columns"))
    planes = []
    for frame in range(count):
        place = _numbers(macro(header, frame, "PlanePositionSequence"), "ImagePositionPatient", 3)
        cosines = _numbers(macro(header, frame, "PlaneOrientationSequence"), "ImageOrientationPatient", 6)
        spacing = _numbers(macro(header, frame, "PixelMeasuresSequence"), "PixelSpacing", 2)
        steps = cosines.reshape(2, 3) * spacing[::-1, None]  # the standard gives rows' distance first
        if not np.linalg.norm(np.cross(*steps)) > 0.0:  # NaN too
            raise ReadError("its ImageOrientationPatient and PixelSpacing span no plane")
        planes.append(Plane(path, frame, (first, frame), shape, place, steps))
    return planes


def _first_at_each_place(planes: Sequence[Plane]) -> list[Plane]:
    """Return planes by height; of those at the same height, the first acquired."""
    chosen: list[Plane] = []
    for plane in sorted(planes, key=lambda one: (one.height, one.order)):
        if chosen and plane.height - chosen[-1].height < _SAME_PLACE:
            chosen[-1] = min(chosen[-1], plane, key=lambda one: one.order)
        else:
            chosen.append(plane)
    return chosen


def _refuse_what_is_no_volume(planes: Sequence[Plane]) -> None:
    """Raise ReadError unless planes are parallel, alike and evenly spaced."""
    first = planes[0]
    if any(one.shape != first.shape or not np.allclose(one.steps, first.steps, atol=1e-3) for one in planes):
        raise ReadError("no volume: the slices of its series differ in size, direction or pixel spacing")
    if len(planes) < 2:
        raise ReadError("no volume: its series has slices at one place only")
    if first.shape[0] * first.shape[1] * len(planes) > MAX_VOXELS:
        raise ReadError("too large: at most 512 x 512 x 512 voxels are read")
    even = np.linspace(first.position, planes[-1].position, len(planes))
    off = np.linalg.norm([one.position for one in planes] - even, axis=1).max()
    if off > _OFF * np.linalg.norm(even[1] - even[0]):
        raise ReadError("no volume: the slices of its series are not evenly spaced; some are missing, or it holds two")


def _stacked(planes: Sequence[Plane]) -> Values:
    """Return the values of planes: [columns, rows, slices], in the modality's units."""
    stack = np.empty((len(planes), *planes[0].shape), np.float32)
    frames: dict[Path, list[tuple[int, int]]] = {}
    for place, plane in enumerate(planes):
        frames.setdefault(plane.path, []).append((plane.frame, place))
    for path, places in frames.items():
        places.sort()
        for (_, place), image in zip(places, values(path, [frame for frame, _ in places]), strict=True):
            stack[place] = image
    return stack.transpose(2, 1, 0)


def _numbers(dataset: pydicom.Dataset, element: str, count: int) -> NDArray[np.float64]:
    """Return an element of so many numbers. Raises ReadError where it has others."""
    try:
        found = np.array([float(value) for value in dataset[element].value])
    except (KeyError, TypeError, ValueError) as error:
        raise ReadError(f"no volume: its slices do not say where they lie ({element} is absent)") from error
    if found.shape != (count,) or not np.isfinite(found).all():
        raise ReadError(f"damaged: its header element {element} has not {count} numbers")
    return found
