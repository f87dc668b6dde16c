"""The frames of a DICOM image as a workstation shows them: modality LUT, window, inversion, colour."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels import apply_color_lut, get_decoder, iter_pixels

from wardround.data.dicom import missing_codec, number, read, text, transfer_syntax
from wardround.data.facts import Frame, ReadError, Window
from wardround.data.intensities import Values, stretched, windowed

CT_WINDOW = (40.0, 400.0)  # soft tissue in HU: what a console shows where a CT image names no window


def frames(path: Path, numbers: Sequence[int], window: Window | None) -> Iterator[Frame]:
    """Yield the frames of these numbers, [H, W, 1 or 3] on [0, 1]. Raises ReadError where they are damaged.

    `window` replaces the file's own. Without either, CT takes its soft-tissue window, up to eight bits
    are taken as they are, and all else is stretched between percentiles.
    """
    dataset = read(path)
    photometric = text(dataset, "PhotometricInterpretation")
    for index, stored in zip(numbers, _decoded(dataset, numbers), strict=True):
        if photometric == "PALETTE COLOR":
            colours = apply_color_lut(stored, dataset)
            yield (colours / np.float32(np.iinfo(colours.dtype).max)).astype(np.float32)
        elif stored.ndim == 3:
            yield _fraction(stored, number(dataset, "BitsStored"))
        else:
            shown = _shown(dataset, index, stored, window)
            yield (1 - shown if photometric == "MONOCHROME1" else shown)[:, :, None]


def values(path: Path, numbers: Sequence[int]) -> Iterator[Values]:
    """Yield the grey frames of these ascending numbers in the modality's units, through no window: [H, W]."""
    dataset = read(path)
    for index, stored in zip(numbers, _decoded(dataset, numbers), strict=True):
        yield _in_units(stored, macro(dataset, index, "PixelValueTransformationSequence"))


def _decoded(dataset: pydicom.Dataset, numbers: Sequence[int]) -> Iterator[NDArray[Any]]:
    """Yield stored values, [H, W] or [H, W, 3], with the reason where they cannot be had."""
    syntax = transfer_syntax(dataset)
    if not syntax.is_encapsulated:
        _refuse_cut(dataset)
    try:
        yield from iter_pixels(dataset, indices=numbers)
    except Exception as error:  # decoders raise anything on damaged bytes, and quote them
        if syntax.is_encapsulated and "pylibjpeg" not in get_decoder(syntax).available_plugins:
            # Pillow alone claims 12-bit JPEG and fails on it: the remedy is the same as for no decoder.
            raise ReadError(missing_codec(syntax) + "; or its pixel data are damaged") from error
        raise ReadError(f"damaged: its pixel data ({syntax.name}) cannot be decoded") from error


def _refuse_cut(dataset: pydicom.Dataset) -> None:
    """Raise ReadError where uncompressed pixel data are shorter than the header says."""
    count = number(dataset, "NumberOfFrames") if dataset.get("NumberOfFrames") is not None else 1
    pixels = number(dataset, "Rows") * number(dataset, "Columns") * number(dataset, "SamplesPerPixel") * count
    samples = 2 / 3 if text(dataset, "PhotometricInterpretation") == "YBR_FULL_422" else 1.0
    expected = int(pixels * samples * number(dataset, "BitsAllocated")) // 8
    found = len(dataset.PixelData)
    if found < expected:
        raise ReadError(f"cut off: {found} of {expected} bytes of pixel data")


def _shown(dataset: pydicom.Dataset, index: int, stored: NDArray[Any], window: Window | None) -> Values:
    """Return a grey frame on [0, 1] before inversion."""
    rescale = macro(dataset, index, "PixelValueTransformationSequence")
    values = _in_units(stored, rescale)
    if window is not None:
        return windowed(values, *window)
    voi = macro(dataset, index, "FrameVOILUTSequence")
    if voi.get("VOILUTSequence"):
        return _looked_up(values, voi.VOILUTSequence[0])
    centre, width = _first(voi.get("WindowCenter")), _first(voi.get("WindowWidth"))
    function = text(voi, "VOILUTFunction").upper() or "LINEAR"
    if centre is not None and width is not None and width >= (1 if function == "LINEAR" else 1e-9):
        return windowed(values, centre, width, function)
    if text(dataset, "Modality") == "CT" and rescale.get("RescaleIntercept") is not None:
        return windowed(values, *CT_WINDOW)
    bits = number(dataset, "BitsStored")
    if bits <= 8 and number(dataset, "PixelRepresentation") == 0:
        return _fraction(stored, bits)
    return stretched(values)


def _in_units(stored: NDArray[Any], rescale: pydicom.Dataset) -> Values:
    """Return stored values in the modality's units, HU for instance."""
    if rescale.get("ModalityLUTSequence"):
        item = rescale.ModalityLUTSequence[0]
        return _looked_up(stored.astype(np.float32), item) * np.float32(2 ** item.LUTDescriptor[2] - 1)
    slope, intercept = _first(rescale.get("RescaleSlope")), _first(rescale.get("RescaleIntercept"))
    values = stored.astype(np.float32)
    if slope is not None and intercept is not None:
        values *= np.float32(slope)
        values += np.float32(intercept)
    return values


def _looked_up(values: Values, item: pydicom.Dataset) -> Values:
    """Return values through a lookup table, on [0, 1].

    pydicom's own apply_voi keeps the index in the table's output type, so that a table of 4,096 entries
    with 8 bits wraps around at 256.
    """
    entries, first, bits = (int(value) for value in item.LUTDescriptor)
    data = item.LUTData
    if isinstance(data, bytes):
        words = ">u2" if item.original_encoding[1] is False else "<u2"
        data = np.frombuffer(data, np.uint8 if len(data) == (entries or 2**16) else words)
    table = _fraction(np.asarray(data), bits).clip(0, 1)
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)
    return table[index]


def _fraction(stored: NDArray[Any], bits: int) -> Values:
    """Return unsigned numbers of so many bits on [0, 1]."""
    return stored.astype(np.float32) / np.float32(2**bits - 1)


def macro(dataset: pydicom.Dataset, index: int, name: str) -> pydicom.Dataset:
    """Return where a frame's rescale, window or place stands: its own group, the shared one, or the object itself."""
    for groups, item in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
        sequence = dataset.get(groups)
        if sequence and item < len(sequence) and sequence[item].get(name):
            found: pydicom.Dataset = sequence[item][name].value[0]
            return found
    return dataset


def _first(value: Any) -> float | None:
    """Return a number, or the first of several; None where there is none that is finite."""
    try:
        result = float(value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value)
    except (TypeError, ValueError, IndexError):
        return None
    return result if np.isfinite(result) else None
