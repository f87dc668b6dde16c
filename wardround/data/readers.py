"""Any file to its facts and frames; the bytes tell the format, and the name only where they cannot."""

import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pydicom.config
from PIL import Image

from wardround.data import dicom, dicom_pixels, nifti, pictures
from wardround.data.facts import Facts, Frame, PassingError, ReadError, Window


class Reader(NamedTuple):
    """How one format is read."""

    facts: Callable[[Path], Facts]
    frames: Callable[[Path, Sequence[int], Window | None], Iterator[Frame]]


READERS = {
    "DICOM": Reader(dicom.facts, dicom_pixels.frames),
    "volume": Reader(nifti.facts, nifti.frames),
    "picture": Reader(pictures.picture_facts, pictures.picture_frames),
    "array": Reader(pictures.array_facts, pictures.array_frames),
}

_STARTS = {
    b"\x89PNG\r\n\x1a\n": "picture",
    b"\xff\xd8\xff": "picture",
    b"II*\0": "picture",
    b"MM\0*": "picture",
    b"\x93NUMPY": "array",
    b"PK\x03\x04": "array",
}
_VOLUMES = ("DICOM", "volume")
_VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mgh", ".mgz")
BY_NAME = ("not an image", "not DICOM")  # how the reasons begin that another name would change


def read_facts(path: Path, dimensions: int = 2) -> Facts:
    """Return what a file says of itself, as an image or part of a volume. Raises ReadError, and nothing else."""
    with reasons("header"):
        kind = format_of(path)
        if dimensions == 3 and kind not in _VOLUMES:
            raise ReadError(f"no volume: a file of kind '{kind}'; volumes are NIfTI files and DICOM series")
        facts = READERS[kind].facts(path)
        if dimensions == 3 and facts.channels != 1:
            raise ReadError("no volume: it is in colour, and volumes are grey")
        return facts


def read_frames(path: Path, numbers: Sequence[int], window: Window | None) -> Iterator[Frame]:
    """Yield the frames of these numbers, [H, W, 1 or 3] on [0, 1]. Raises ReadError, and nothing else."""
    with reasons("pixels"):
        yield from READERS[format_of(path)].frames(path, numbers, window)


def format_of(path: Path) -> str:
    """Return the key of READERS for a file. Raises ReadError where it is none of them."""
    with path.open("rb") as file:
        head = file.read(352)
    if not head:
        raise ReadError("empty: 0 bytes")
    if head[128:132] == b"DICM" or _starts_with_element(head):
        return "DICOM"
    for start, kind in _STARTS.items():
        if head.startswith(start):
            return kind
    if is_named_volume(path):
        return "volume"
    if path.suffix.lower() in (".dcm", ".dicom"):
        raise ReadError("not DICOM: neither the DICM prefix nor a DICOM element at its start, whatever its name says")
    raise ReadError("not an image: neither DICOM, NIfTI, PNG, JPEG, TIFF nor npz")


def is_named_volume(path: Path) -> bool:
    """Return whether a file's name says that it is a volume, which compressed bytes do not."""
    return path.name.lower().endswith(_VOLUME_SUFFIXES)


def _starts_with_element(head: bytes) -> bool:
    """Return whether a file begins with an element of group 2 or 8: DICOM whose preamble was left out."""
    if len(head) < 8 or (head[0], head[1]) not in ((2, 0), (8, 0), (0, 2), (0, 8)):
        return False
    little = head[1] == 0
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    implicit = little and int.from_bytes(head[4:8], "little") <= 256
    return head[3 if little else 2] == 0 and (explicit or implicit)


_LIBRARIES = ("pydicom", "nibabel", "PIL", "pylibjpeg", "libjpeg", "openjpeg", "rle", "jpeg_ls")
_QUIET = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom's, nibabel's and Pillow's warnings away: what matters of them becomes a reason.

    They would otherwise reach the log of whoever embeds us, tag values included. Warning filters belong
    to the whole process, so only one thread is inside at a time; the workers it starts inherit them.
    """
    known = list(logging.root.manager.loggerDict)  # children too: nibabel.global has a handler of its own
    loggers = [logging.getLogger(name) for name in known if name.split(".")[0] in _LIBRARIES]
    before = [logger.disabled for logger in loggers]
    settings = pydicom.config.settings
    validation = settings.reading_validation_mode
    with _QUIET, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=rf"({'|'.join(_LIBRARIES)})(\.|$)")
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        for logger in loggers:
            logger.disabled = True
        settings.reading_validation_mode = pydicom.config.IGNORE
        try:
            yield
        finally:
            settings.reading_validation_mode = validation
            for logger, disabled in zip(loggers, before, strict=True):
                logger.disabled = disabled


@contextmanager
def reasons(part: str) -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into ReadError.

    The library's own text is left out: it may quote a patient's data.
    """
    try:
        yield
    except ReadError:
        raise
    except MemoryError as error:
        raise PassingError("too large for this machine's memory") from error
    except OSError as error:
        if error.strerror:
            raise PassingError(f"cannot be opened: {error.strerror}") from error
        raise ReadError(f"damaged or cut off: its {part} cannot be read") from error
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic in pylibjpeg-rle's Rust is no Exception
        raise ReadError(f"damaged: {type(error).__name__} while reading its {part}") from error
