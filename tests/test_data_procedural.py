"""Phantoms: valid DICOM of three scanners, and a set whose classes are there to be learnt."""

import hashlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from data_objects import site_over
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from wardround.config.federation import DataConfig
from wardround.data import SiteImages, open_site, positioning_set, procedural_set, write_hospitals

SMALL = DataConfig(image_size=32)
PATIENTS = 6

# The elements of type 1 in the modules that the two IODs make mandatory (PS3.3 A.2 and A.26).
TYPE_1 = [
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "Modality",
    "SpecificCharacterSet",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelData",
    "ImageType",
]
TYPE_1_DX = [
    "PresentationIntentType",
    "ImageLaterality",
    "AnatomicRegionSequence",
    "PixelIntensityRelationship",
    "PixelIntensityRelationshipSign",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "PresentationLUTShape",
    "LossyImageCompression",
    "BurnedInAnnotation",
    "PatientOrientation",
    "ImagerPixelSpacing",
    "WindowCenter",
    "WindowWidth",
]
TYPE_2 = [
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
    "SeriesNumber",
    "InstanceNumber",
    "Manufacturer",
    "BodyPartExamined",
    "ViewPosition",
]


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of three small hospitals."""
    folder = tmp_path_factory.mktemp("hospitals")
    assert write_hospitals(folder, seed=5, patients=PATIENTS) == ["hillcrest", "northgate", "riverside"]
    return folder


@pytest.fixture(scope="module")
def indexed(hospitals: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SiteImages]:
    """Return what training sees of each."""
    work = tmp_path_factory.mktemp("work")
    return {path.name: open_site(site_over(path, work / path.name), SMALL) for path in hospitals.iterdir()}


def test_every_image_has_what_its_iod_asks_for(hospitals: Path) -> None:
    objects = [pydicom.dcmread(path) for path in hospitals.glob("*/P*/IM?.dcm")]
    uids = {made.SOPInstanceUID for made in objects}
    assert len(uids) == len(objects) > 3 * PATIENTS
    for made in objects:
        asked = TYPE_1 + (TYPE_1_DX if made.Modality == "DX" else [])
        assert not [name for name in asked if made.get(name) in (None, "", [])]
        assert not [name for name in TYPE_2 if name not in made]
        assert str(made.PatientName).startswith("Phantom^")
        assert made.HighBit == made.BitsStored - 1 and made.pixel_array.max() < 2**made.BitsStored
        assert all(pydicom.uid.UID(made[name].value).is_valid for name in ("SOPInstanceUID", "StudyInstanceUID"))
        assert made.file_meta.MediaStorageSOPInstanceUID == made.SOPInstanceUID


def test_each_hospital_has_a_scanner_of_its_own(hospitals: Path) -> None:
    kinds = set()
    for folder in hospitals.iterdir():
        made = pydicom.dcmread(folder / "P0001/IM1.dcm")
        syntax = made.file_meta.TransferSyntaxUID
        kinds.add((made.BitsStored, made.PhotometricInterpretation, syntax.is_compressed, made.Rows, made.Columns))
    assert {bits for bits, *_ in kinds} == {8, 12, 16} and {inverted for _, inverted, *_ in kinds} == {
        "MONOCHROME1",
        "MONOCHROME2",
    }
    assert sum(compressed for _, _, compressed, *_ in kinds) == 1 and len(kinds) == 3


def test_every_file_of_a_hospital_is_accounted_for(indexed: dict[str, SiteImages]) -> None:
    for found in indexed.values():
        index = found.index
        assert index.patients == PATIENTS and 2 * PATIENTS <= index.samples <= 4 * PATIENTS
        assert index.duplicates == 1 and not index.excluded
        reasons = dict(index.quarantined)
        assert reasons.keys() == {"README.txt", "interrupted.dcm", "report.dcm"}
        assert reasons["report.dcm"] == "no image: Basic Text SR Storage"
        assert reasons["interrupted.dcm"].startswith("cut off: ")
        assert index.files == index.read + index.duplicates + len(index.quarantined)


def test_the_scanners_differences_are_gone_once_an_image_is_shown(indexed: dict[str, SiteImages]) -> None:
    means = [found.images.mean() / 255 for found in indexed.values()]
    assert max(means) - min(means) < 0.05  # inverted, windowed and scaled as their headers say
    corners = [found.images[:, 0, :2, :2].mean() / 255 for found in indexed.values()]
    assert max(corners) < 0.25  # air is dark in all of them


def test_the_same_seed_writes_the_same_bytes(hospitals: Path, tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        sha = hashlib.sha256()
        for path in sorted(folder.rglob("*.dcm")):
            sha.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
        return sha.hexdigest()

    write_hospitals(tmp_path / "again", seed=5, patients=PATIENTS)
    assert digest(tmp_path / "again") == digest(hospitals)
    write_hospitals(tmp_path / "other", seed=6, patients=PATIENTS)
    assert digest(tmp_path / "other") != digest(hospitals)


def test_positions_are_balanced_over_findings_and_patient_disjoint() -> None:
    found = positioning_set(360, seed=1, data=SMALL)
    assert found.classes == ("tilted left", "straight", "tilted right")
    assert np.bincount(found.labels).tolist() == [120, 120, 120]
    splits = [set(found.patients[found.splits == split]) for split in ("train", "val", "test")]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 180
    left, right = (found.images[found.labels == label].mean(0)[0].astype(float) for label in (0, 2))
    # Tilted to opposite sides, the mean images lean against each other: above and below, left and right.
    lean = (left - right) * np.sign(np.outer(np.linspace(-1, 1, 32), np.linspace(-1, 1, 32)))
    assert abs(lean.mean()) > 1


def test_the_set_has_balanced_classes_and_patient_disjoint_splits() -> None:
    found = procedural_set(400, seed=1, data=SMALL)
    assert found.images.shape == (400, 1, 32, 32) and found.classes == ("consolidation", "effusion", "nodule", "normal")
    assert np.bincount(found.labels).tolist() == [100] * 4
    members = [set(found.patients[found.splits == split]) for split in ("train", "val", "test")]
    assert [len(one) for one in members] == pytest.approx([120, 30, 50], abs=8)
    assert not (members[0] & members[1] or members[0] & members[2] or members[1] & members[2])
    for split in ("train", "val", "test"):
        assert np.bincount(found.labels[found.splits == split]).min() > 0
    for patient in (0, 1, 77):
        assert len(set(found.labels[found.patients == patient])) == 1


def test_a_set_is_a_function_of_its_seed_and_longer_ones_go_on() -> None:
    short, long = procedural_set(10, 3, SMALL), procedural_set(20, 3, SMALL)
    np.testing.assert_array_equal(short.images, long.images[:10])
    np.testing.assert_array_equal(short.splits, long.splits[:10])
    assert not np.array_equal(procedural_set(10, 4, SMALL).images, short.images)
    assert procedural_set(4, 3, DataConfig(channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)).images.shape == (4, 3, 64, 64)


def test_raw_pixels_tell_something_of_the_findings_but_leave_room() -> None:
    found = procedural_set(600, seed=2, data=SMALL)
    pixels = found.images.reshape(600, -1) / 255.0
    train, test = found.splits == "train", found.splits == "test"
    model = LogisticRegression(C=0.01, max_iter=200).fit(pixels[train], found.labels[train])
    score = balanced_accuracy_score(found.labels[test], model.predict(pixels[test]))
    assert 0.27 < score < 0.65  # chance is 0.25
