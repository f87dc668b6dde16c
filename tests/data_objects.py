"""Small DICOM files, and sites over a folder, for the tests of wardround.data."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

from wardround.config import SiteConfig
from wardround.config.federation import DataConfig
from wardround.config.site import ImagesConfig


def image_object(stored: NDArray[Any], **elements: Any) -> Dataset:
    """Return a grey or RGB image object with these stored values: [H, W], [F, H, W] or [H, W, 3]."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = ComputedRadiographyImageStorage, "2.25.1"
    made.Modality, made.PatientID, made.PatientName = "CR", "P1", "Test^Person"
    colour = stored.ndim == 3 and stored.shape[2] == 3
    if stored.ndim == 3 and not colour:
        made.NumberOfFrames = len(stored)
    made.Rows, made.Columns = stored.shape[:2] if colour else stored.shape[-2:]
    made.SamplesPerPixel, made.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        made.PlanarConfiguration = 0
    bits = stored.dtype.itemsize * 8
    made.BitsAllocated = made.BitsStored = bits
    made.HighBit, made.PixelRepresentation = bits - 1, int(stored.dtype.kind == "i")
    made.PixelData = stored.tobytes()
    made["PixelData"].VR = "OW"
    for name, value in elements.items():
        setattr(made, name, value)
    return made


def write_dicom(path: Path, stored: NDArray[Any], **elements: Any) -> Path:
    """Write an image object and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image_object(stored, **elements).save_as(path, enforce_file_format=True)
    return path


def some_pixels(seed: int, shape: tuple[int, ...] = (20, 20), dtype: Any = np.uint8) -> NDArray[Any]:
    """Return random pixels, different for every seed."""
    top = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, top, shape, dtype=dtype, endpoint=True)


def site_over(folder: Path, work: Path, **images: Any) -> SiteConfig:
    """Return the config of a site with its images in a folder."""
    return SiteConfig(format=1, name="lyon", images=ImagesConfig(folder=folder, **images), work=work)


SMALL = DataConfig(image_size=16)
