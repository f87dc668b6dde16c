"""Three procedural hospitals: phantoms as three different scanners write them, in valid DICOM."""

import hashlib
import uuid
from dataclasses import dataclass
from datetime import date, timedelta
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    BasicTextSRStorage,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
)
from tqdm import tqdm

from wardround.data.phantom import FINDINGS, Plane, draw_anatomy, draw_image, resized

Stored = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class Scanner:
    """What one hospital's machine does to an image, and how it writes it."""

    site: str
    modality: str  # CR or DX
    height: int
    width: int
    bits: int  # stored; 8 of 8 allocated, else of 16
    inverted: bool  # MONOCHROME1
    syntax: str
    blur: int  # passes of a 1-2-1 filter, in both directions
    noise: float  # standard deviation, of the full range
    findings: tuple[float, ...]  # shares, in the order of FINDINGS: hospitals see different patients


SCANNERS = (
    Scanner("hillcrest", "CR", 240, 192, 12, True, ExplicitVRLittleEndian, 0, 0.012, (0.2, 0.2, 0.2, 0.4)),
    Scanner("northgate", "DX", 224, 224, 16, False, JPEG2000Lossless, 1, 0.006, (0.3, 0.3, 0.1, 0.3)),
    Scanner("riverside", "CR", 176, 176, 8, False, ImplicitVRLittleEndian, 0, 0.030, (0.1, 0.2, 0.4, 0.3)),
)


def write_hospitals(folder: Path, seed: int, patients: int = 100) -> list[str]:
    """Write three hospitals of so many patients each, with 2 to 4 images a patient; return the sites' names.

    `folder/SITE/PATIENT/IMAGE.dcm`, and in each site a few files that are cut off, a copy or no image.
    The same seed gives the same bytes. Patients are called Phantom: nobody can take them for people.
    """
    bar = tqdm(total=len(SCANNERS) * patients, desc="hospitals", unit="patient", disable=None, delay=2, leave=False)
    for place, scanner in enumerate(SCANNERS):
        for patient in range(patients):
            rng = np.random.default_rng([seed, 2, place, patient])  # 0 and 1 are procedural_set's
            _write_patient(folder / scanner.site, scanner, seed, patient, rng)
            bar.update()
        _write_odd_files(folder / scanner.site, scanner, seed)
    bar.close()
    return [scanner.site for scanner in SCANNERS]


def _write_patient(folder: Path, scanner: Scanner, seed: int, patient: int, rng: Generator) -> None:
    """Write one patient's images."""
    anatomy = draw_anatomy(str(rng.choice(FINDINGS, p=scanner.findings)), rng)
    place = folder / f"P{patient:04d}"
    place.mkdir(parents=True, exist_ok=True)
    for instance in range(1, int(rng.integers(2, 5)) + 1):
        stored = acquired(draw_image(anatomy, rng), scanner, rng)
        _write(image_object(stored, scanner, seed, patient, instance), place / f"IM{instance}.dcm", scanner.syntax)


def acquired(image: Plane, scanner: Scanner, rng: Generator) -> Stored:
    """Return stored values [H, W] as the scanner makes them of an image on [0, 1]."""
    for axis in (0, 1) * scanner.blur:
        image = (np.roll(image, 1, axis) + image + image + np.roll(image, -1, axis)) / np.float32(4)
    shown = resized(image, scanner.height, scanner.width)
    shown = shown + scanner.noise * rng.standard_normal(shown.shape, dtype=np.float32)
    if scanner.inverted:
        shown = 1 - shown
    # The detector's range is wider than what the window shows, but for eight bits, which are shown as they are.
    low, high = (0.0, 1.0) if scanner.bits == 8 else (0.15, 0.85)
    stored = np.rint((2**scanner.bits - 1) * np.clip(low + (high - low) * shown, 0, 1))
    return np.asarray(stored, np.uint8) if scanner.bits == 8 else np.asarray(stored, np.uint16)


def image_object(stored: Stored, scanner: Scanner, seed: int, patient: int, instance: int) -> Dataset:
    """Return a CR or DX image object with every element that its IOD asks for (PS3.3 A.2 and A.26)."""
    uid = _uid(seed, scanner.site, patient, instance)
    made = _object(scanner, seed, patient, instance)
    is_dx = scanner.modality == "DX"
    made.SOPClassUID = DigitalXRayImageStorageForPresentation if is_dx else ComputedRadiographyImageStorage
    made.SOPInstanceUID = uid
    made.Modality = scanner.modality
    made.BodyPartExamined, made.ViewPosition = "CHEST", "PA"
    made.ImageType = ["ORIGINAL", "PRIMARY", ""]
    made.PatientOrientation = ["L", "F"]
    made.BurnedInAnnotation = "NO"
    made.Rows, made.Columns = stored.shape
    made.SamplesPerPixel, made.PixelRepresentation = 1, 0
    made.PhotometricInterpretation = "MONOCHROME1" if scanner.inverted else "MONOCHROME2"
    made.BitsAllocated = 8 if scanner.bits == 8 else 16
    made.BitsStored, made.HighBit = scanner.bits, scanner.bits - 1
    made.LossyImageCompression = "00"
    if scanner.bits > 8:
        made.WindowCenter, made.WindowWidth = 2.0 ** (scanner.bits - 1), round(0.7 * 2**scanner.bits)
    if is_dx:
        _add_dx(made)
    _add_pixels(made, stored, scanner.syntax)
    return made


def _object(scanner: Scanner, seed: int, patient: int, instance: int) -> Dataset:
    """Return the patient, study, series and equipment of an object."""
    made = Dataset()
    made.SpecificCharacterSet = "ISO_IR 192"
    made.PatientName = f"Phantom^{scanner.site.title()} {patient:04d}"
    made.PatientID = f"{scanner.site.upper()}-{patient:04d}"
    made.PatientBirthDate, made.PatientSex = "", "O"
    made.StudyInstanceUID = _uid(seed, scanner.site, patient, "study")
    made.SeriesInstanceUID = _uid(seed, scanner.site, patient, "series")
    made.StudyDate = f"{date(2024, 1, 1) + timedelta(days=patient % 365):%Y%m%d}"
    made.StudyTime = made.ReferringPhysicianName = made.StudyID = made.AccessionNumber = ""
    made.SeriesNumber, made.InstanceNumber = 1, instance
    made.Manufacturer = "Wardround phantoms"
    return made


def _add_dx(made: Dataset) -> None:
    """Add what DX asks for beyond CR: its series, anatomy, image, detector and acquisition context."""
    made.PresentationIntentType = "FOR PRESENTATION"
    made.ImageLaterality = "U"
    region = Dataset()
    region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "51185008", "SCT", "Chest"
    made.AnatomicRegionSequence = [region]
    made.PixelIntensityRelationship, made.PixelIntensityRelationshipSign = "LOG", -1
    made.RescaleIntercept, made.RescaleSlope, made.RescaleType = 0, 1, "US"
    made.PresentationLUTShape = "IDENTITY"
    made.DetectorType, made.ImagerPixelSpacing = "", [1.5, 1.5]
    made.AcquisitionContextSequence = []


def _add_pixels(made: Dataset, stored: Stored, syntax: str) -> None:
    """Add the pixels, compressed where the transfer syntax says so; Pillow writes JPEG 2000 without a plugin."""
    if syntax != JPEG2000Lossless:
        made.PixelData = stored.tobytes()
        made["PixelData"].VR = "OB" if stored.dtype == np.uint8 and syntax != ImplicitVRLittleEndian else "OW"
        return
    buffer = BytesIO()
    Image.fromarray(stored).save(buffer, "JPEG2000", irreversible=False, no_jp2=True)
    made.PixelData = encapsulate([buffer.getvalue()])
    made["PixelData"].VR = "OB"


def _write_odd_files(folder: Path, scanner: Scanner, seed: int) -> None:
    """Write what lies about in a real export: a cut file, a copy, a report, a text."""
    whole = (folder / "P0000" / "IM1.dcm").read_bytes()
    (folder / "P0000" / "IM1 (copy).dcm").write_bytes(whole)
    (folder / "interrupted.dcm").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "README.txt").write_text("Exported for Wardround. These patients are phantoms.\n", encoding="utf-8")
    report = _object(scanner, seed, 0, 1)
    report.SOPClassUID, report.SOPInstanceUID = BasicTextSRStorage, _uid(seed, scanner.site, 0, "report")
    report.Modality = "SR"
    report.ContentDate, report.ContentTime = "20240101", "120000"
    report.ReferencedPerformedProcedureStepSequence = report.PerformedProcedureCodeSequence = []
    report.CompletionFlag, report.VerificationFlag = "COMPLETE", "UNVERIFIED"
    report.ValueType, report.ContinuityOfContent = "CONTAINER", "SEPARATE"
    title = Dataset()
    title.CodeValue, title.CodingSchemeDesignator, title.CodeMeaning = "18748-4", "LN", "Diagnostic Imaging Report"
    report.ConceptNameCodeSequence = [title]
    _write(report, folder / "report.dcm", ExplicitVRLittleEndian)


def _write(made: Dataset, path: Path, syntax: str) -> None:
    """Write an object with its file meta information, the same bytes each time."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.ImplementationClassUID = _uid("wardround")
    meta.ImplementationVersionName = "WARDROUND"
    made.file_meta = meta
    made.save_as(path, enforce_file_format=True)


def _uid(*parts: object) -> str:
    """Return a UID under 2.25, where anyone may make them from a UUID (PS3.5 B.2)."""
    name = hashlib.sha256(repr(parts).encode()).digest()[:16]
    return f"2.25.{uuid.UUID(bytes=name, version=4).int}"
