"""The header of a DICOM object: is it an image, can it be decoded here, and what does it say of itself."""

import re
import struct
import zlib
from datetime import date
from pathlib import Path
from typing import Any

import pydicom
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    UID_dictionary,
)

from wardround.data.facts import Facts, ReadError

# Other classes may carry pixel data too, but no picture of a patient: labels, doses, coefficients.
_IMAGES = ("Image Storage", "Enhanced US Volume Storage")
_UNKNOWN = "an object of unknown class"
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_CODE = re.compile(r"[A-Z0-9 _]{1,16}")  # DICOM's code string: what else stands there could be anything
_INFLATED = 2**30  # bytes
_DEFERRED = 4096  # bytes: longer elements stay on disk, so that a header costs no pixels


def facts(path: Path) -> Facts:
    """Return what the header says. Raises ReadError where the object is no image or needs a missing codec."""
    dataset = read(path, defer_size=_DEFERRED)
    _refuse_what_is_no_image(dataset)
    photometric = text(dataset, "PhotometricInterpretation")
    for element in ("BitsAllocated", "BitsStored", "PixelRepresentation", "SamplesPerPixel"):
        number(dataset, element)
    if photometric not in _GREY + _COLOUR:
        code = _code(dataset, "PhotometricInterpretation") or "not stated"
        raise ReadError(f"its photometric interpretation ({code}) is not one of {', '.join(_GREY + _COLOUR)}")
    _refuse_missing_codec(transfer_syntax(dataset))
    return Facts(
        frames=number(dataset, "NumberOfFrames") if dataset.get("NumberOfFrames") is not None else 1,
        height=number(dataset, "Rows"),
        width=number(dataset, "Columns"),
        channels=1 if photometric in _GREY else 3,
        modality=_code(dataset, "Modality"),
        body_part=_code(dataset, "BodyPartExamined"),
        view=_code(dataset, "ViewPosition"),
        study_date=_date(text(dataset, "StudyDate")),
        burnt=text(dataset, "BurnedInAnnotation").upper() == "YES",
        patient=text(dataset, "PatientID"),
        series=text(dataset, "SeriesInstanceUID"),
    )


def read(path: Path, defer_size: int | None = None) -> pydicom.Dataset:
    """Return the dataset in a file, also where its preamble or its file meta information is missing."""
    _refuse_deflate_bomb(path)
    dataset = pydicom.dcmread(path, defer_size=defer_size, force=True)
    if not dataset:
        raise ReadError("cut off: the file ends inside an element, its compressed pixels perhaps")
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding  # what pydicom saw in the bytes themselves
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset


def transfer_syntax(dataset: pydicom.Dataset) -> UID:
    """Return how the object is encoded."""
    return UID(dataset.file_meta.TransferSyntaxUID)


def text(dataset: pydicom.Dataset, element: str) -> str:
    """Return an element as text without padding; "" where it is absent or empty."""
    value = dataset.get(element)
    return "" if value is None else str(value).strip(" \0")


def number(dataset: pydicom.Dataset, element: str) -> int:
    """Return an element as a whole number. Raises ReadError where it is absent or none."""
    try:
        return int(dataset[element].value)
    except (KeyError, TypeError, ValueError) as error:
        raise ReadError(f"damaged: its header element {element} is absent or no number") from error


def _refuse_what_is_no_image(dataset: pydicom.Dataset) -> None:
    """Raise ReadError, naming the kind of object, unless it is one with pixels to look at."""
    uid = UID(text(dataset, "SOPClassUID") or str(dataset.file_meta.get("MediaStorageSOPClassUID", "")))
    kind = uid.name if uid in UID_dictionary else _UNKNOWN
    an_image = any(word in kind for word in _IMAGES)
    if (not an_image and kind != _UNKNOWN) or text(dataset, "Modality") in ("SEG", "RTDOSE"):
        raise ReadError(f"no image: {kind}")
    if "PixelData" not in dataset:
        cut = "; it was cut off, or only its header was exported" if an_image else ""
        raise ReadError(f"no pixels: {kind} without pixel data{cut}")


def _refuse_missing_codec(syntax: UID) -> None:
    """Raise ReadError where no decoder for the transfer syntax is installed, naming the remedy."""
    try:
        decoder: Any = get_decoder(syntax)
    except NotImplementedError as error:
        raise ReadError(f"its encoding ({syntax.name}) is not read; export it as uncompressed frames") from error
    if not decoder.is_available:
        raise ReadError(missing_codec(syntax))


def missing_codec(syntax: UID) -> str:
    """Return the reason for a compression that this installation cannot decode."""
    return f"codec missing: {syntax.name}; install wardround[codecs]"


def _code(dataset: pydicom.Dataset, element: str) -> str:
    """Return a code string, or "" where the element holds anything else."""
    value = text(dataset, element).upper()
    return value if _CODE.fullmatch(value) else ""


def _date(value: str) -> date | None:
    """Return a DICOM date, also in the form with dots of before 1993."""
    try:
        return date.fromisoformat(value.replace(".", ""))
    except ValueError:
        return None


def _refuse_deflate_bomb(path: Path) -> None:
    """Raise ReadError where a deflated object would take more than _INFLATED bytes: pydicom inflates it whole."""
    with path.open("rb") as file:
        head = file.read(1024)
        if DeflatedExplicitVRLittleEndian.encode() not in head:
            return
        (meta,) = struct.unpack("<I", head[140:144])  # FileMetaInformationGroupLength, always the first element
        file.seek(144 + meta)
        inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        for block in iter(lambda: inflate.unconsumed_tail or file.read(2**20), b""):
            size += len(inflate.decompress(block, 2**24))
            if size > _INFLATED:
                raise ReadError(f"too large: it inflates to more than {_INFLATED // 2**20} MiB")
