"""PNG, JPEG and TIFF through Pillow, and arrays in npz and npy."""

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image, ImageOps

from wardround.data.facts import Facts, Frame, ReadError, Window
from wardround.data.intensities import stretched, windowed

_DEEP = ("I", "F")  # Pillow's modes with more than eight bits, "I;16" and its like included
_PHOTOMETRIC = 262  # TIFF's tag; 0: the lowest value is white
_GREY = ("1", "L", "LA", "La")


def picture_facts(path: Path) -> Facts:
    """Return what a picture's header says; the pages of a TIFF are frames."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
            grey = image.mode in _GREY or image.mode.startswith(_DEEP)
            # Cameras put a preview, a depth or a gain map behind a photograph.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            return Facts(frames, image.height, image.width, 1 if grey else 3)
    except Image.DecompressionBombError as error:
        raise ReadError("too large: its header declares more pixels than any image has") from error


def picture_frames(path: Path, numbers: Sequence[int], window: Window | None) -> Iterator[Frame]:
    """Yield pages, [H, W, 1 or 3] on [0, 1], upright as EXIF says, without transparency.

    Eight bits are taken as they are. Sixteen bits say nothing of the range they use, so without a
    window they are stretched between percentiles.
    """
    # By its name, Pillow 13 would map a plain TIFF that is turned with the sides it has once upright: scrambled.
    with path.open("rb") as file, Image.open(file, formats=("PNG", "JPEG", "TIFF")) as image:
        for index in numbers:
            image.seek(index)
            deep = image.mode.startswith(_DEEP)
            # Of eight bits Pillow does it by itself.
            inverted = deep and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
            page = ImageOps.exif_transpose(image)
            if not deep:
                page = page.convert("L" if page.mode in _GREY else "RGB")
            seen = _shown(np.asarray(page), window)
            yield 1 - seen if inverted else seen


def array_facts(path: Path) -> Facts:
    """Return what the header of an npy, or of an npz with one array, says: H x W or H x W x C."""
    with path.open("rb") as file:
        shape, dtype = _header(file)
    if dtype.hasobject or dtype.kind not in "buif":
        raise ReadError("its array holds no real numbers")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3)):
        raise ReadError(f"its array has shape {list(shape)}; expected height x width, or height x width x 1 or 3")
    return Facts(1, shape[0], shape[1], 1 if len(shape) == 2 else shape[2])


def array_frames(path: Path, numbers: Sequence[int], window: Window | None) -> Iterator[Frame]:
    """Yield the array as the one frame it is; bytes and floats on [0, 1] are taken as they are."""
    loaded = np.load(path, allow_pickle=False)
    array = loaded if isinstance(loaded, np.ndarray) else loaded[loaded.files[0]]
    for _ in numbers:
        yield _shown(array, window)


def _shown(values: NDArray[Any], window: Window | None) -> Frame:
    """Return values [H, W] or [H, W, C] as [H, W, C] on [0, 1]."""
    whole = values if values.ndim == 3 else values[:, :, None]
    numbers = whole.astype(np.float32)
    if values.dtype == np.uint8:
        numbers /= np.float32(255)
        return numbers
    if window is not None:
        return windowed(np.nan_to_num(numbers), *window)
    if values.dtype.kind in "bf" and numbers.size and numbers.min() >= 0.0 and numbers.max() <= 1.0:
        return numbers
    return stretched(numbers)


def _header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype without reading the numbers, which could be many gigabytes."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) != 1:
                raise ReadError(f"an npz of {len(members)} arrays; expected one")
            with archive.open(members[0]) as member:
                return _npy_header(member)
    file.seek(0)
    return _npy_header(file)


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype from the start of an npy stream."""
    version = npy.read_magic(file)
    shape, _, dtype = npy.read_array_header_1_0(file) if version == (1, 0) else npy.read_array_header_2_0(file)
    return shape, dtype
