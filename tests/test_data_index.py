"""A site's index: every file accounted for, samples in content order, patients grouped and unnamed."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_labelled
from data_objects import SMALL, site_over, some_pixels, write_dicom
from PIL import Image

from wardround.config.federation import CriteriaConfig, DataConfig
from wardround.data import Index, SiteImages, open_site
from wardround.errors import DataError

READABLE = {  # of shared/data/dicom: files and the images that each gives with every frame taken
    "pydicom/examples_ybr_color.dcm": 30,
    "pydicom_data/emri_small.dcm": 10,
    "pydicom_data/eCT_Supplemental.dcm": 2,
    "nifti/example4d.nii.gz": 24,
}
QUARANTINED = {
    "corrupt_made/empty.dcm": "empty: 0 bytes",
    "corrupt_made/not_dicom.dcm": "not DICOM",
    "corrupt_made/cut_header.dcm": "no pixels: CT Image Storage without pixel data; it was cut off",
    "corrupt_made/cut_pixels.dcm": "cut off: 13700 of 32768 bytes of pixel data",
    "pydicom/MR_truncated.dcm": "cut off: 8130 of 8192 bytes of pixel data",
    "pydicom/liver_1frame.dcm": "no image: Segmentation Storage",
    "pydicom/rtdose.dcm": "no image: RT Dose Storage",
    "pydicom/badVR.dcm": "no image: RT Dose Storage",
    "pydicom/rtplan.dcm": "no image: RT Plan Storage",
    "pydicom/rtstruct.dcm": "no image: RT Structure Set Storage",
    "pydicom/reportsi.dcm": "no image: Basic Text SR Storage",
    "pydicom/waveform_ecg.dcm": "no image: 12-lead ECG Waveform Storage",
    "pydicom/no_meta.dcm": "not DICOM",
    "pydicom/JPEG-lossy.dcm": "damaged: its pixel data (JPEG Extended",
    "nibabel/csa_slice_norm.dcm": "no pixels: MR Image Storage",
    "nibabel/decimal_rescale.dcm": "blank: all its pixels show the same value",
    "SOURCE.md": "not an image",
    "index.csv": "not an image",
}


def accounted(index: Index) -> int:
    """Return how many files the index gives account of."""
    excluded = sum(index.excluded.values())
    return index.read + index.duplicates + index.opted_out + excluded + len(index.quarantined)


def three_patients(folder: Path) -> Path:
    """Write five images of three patients, one of them twice, and two files that are none."""
    for number, patient in enumerate(("anna", "anna", "ben", "ben", "cleo")):
        write_dicom(folder / f"{patient}/{number}.dcm", some_pixels(number), PatientID=patient, Modality="CR")
    shutil.copy(folder / "cleo/4.dcm", folder / "copy.dcm")
    (folder / "notes.txt").write_text("not an image")
    (folder / "empty.dcm").touch()
    return folder


def test_every_real_file_is_read_or_quarantined_with_a_reason(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shared_data("dicom")
    site = site_over(folder, tmp_path)
    data = DataConfig(image_size=16, convert_channels=True, criteria=CriteriaConfig(min_side=1))
    index = open_site(site, data).index
    assert index.files == sum(path.is_file() for path in folder.rglob("*")) == accounted(index)
    assert index.duplicates == 1 and not index.excluded  # CT_small.dcm lies there twice
    reasons = dict(index.quarantined)
    for name, reason in QUARANTINED.items():
        assert reasons[name].startswith(reason), name
    assert not reasons.keys() & READABLE.keys()
    assert index.read >= 115 and index.modalities["US"] == 34 and index.modalities["XA"] == 1
    assert all("\n" not in reason and len(reason) < 160 for reason in reasons.values())


def test_every_frame_of_the_real_files_is_an_image(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    for name, frames in READABLE.items():
        folder = tmp_path / name.replace("/", "-")
        folder.mkdir()
        shutil.copy(shared_data("dicom") / name, folder)
        index = open_site(
            site_over(folder, tmp_path / "work"), SMALL.model_copy(update={"convert_channels": True})
        ).index
        assert index.samples + sum(index.skipped_frames.values()) == frames, name
        assert index.patients == 1


def test_files_are_counted_by_what_became_of_them(tmp_path: Path) -> None:
    found = open_site(site_over(three_patients(tmp_path / "images"), tmp_path / "work"), SMALL)
    index = found.index
    assert (index.files, index.read, index.duplicates, index.samples, index.patients) == (8, 5, 1, 5, 3)
    assert index.quarantined == (
        ("empty.dcm", "empty: 0 bytes"),
        ("notes.txt", "not an image: neither DICOM, NIfTI, PNG, JPEG, TIFF nor npz"),
    )
    assert accounted(index) == index.files and index.modalities == {"CR": 5}
    assert found.images.shape == (5, 1, 16, 16) and found.images.dtype == np.uint8
    assert isinstance(found.images, np.memmap)
    assert (found.num_images, found.num_patients) == (5, 3)


def test_the_same_files_give_the_same_arrays_wherever_they_lie(tmp_path: Path) -> None:
    folder = three_patients(tmp_path / "images")
    here = open_site(site_over(folder, tmp_path / "work"), SMALL)
    moved = tmp_path / "elsewhere"
    for number, path in enumerate(sorted(folder.rglob("*.dcm"), reverse=True)):
        moved.mkdir(exist_ok=True)
        shutil.copy(path, moved / f"{number}.bin")
    there = open_site(site_over(moved, tmp_path / "another"), SMALL)  # with another salt
    np.testing.assert_array_equal(here.images, there.images)
    np.testing.assert_array_equal(here.patients, there.patients)
    assert here.patients.dtype == np.int32 and list(np.unique(here.patients)) == [0, 1, 2]
    firsts = [int(np.flatnonzero(here.patients == patient)[0]) for patient in range(3)]
    assert firsts == sorted(firsts)  # numbered by first appearance


def test_images_of_one_patient_share_a_number_whatever_case_their_id_is_in(tmp_path: Path) -> None:
    for number, patient in enumerate(("Ab1", "ab1 ", "b", "", "")):
        write_dicom(tmp_path / f"images/{number}.dcm", some_pixels(number), PatientID=patient)
    found = open_site(site_over(tmp_path / "images", tmp_path / "work"), SMALL)
    # Ab1 twice, b once; without an ID each file is a patient of its own.
    assert sorted(np.bincount(found.patients)) == [1, 1, 1, 2]


def test_criteria_exclude_by_header_and_count_each_reason(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    kinds = {
        "fits": {"BodyPartExamined": "CHEST", "ViewPosition": "PA", "StudyDate": "20240501"},
        "other-modality": {"Modality": "MR"},
        "other-part": {"BodyPartExamined": "HAND"},
        "no-part": {},
        "other-view": {"BodyPartExamined": "CHEST", "ViewPosition": "LL"},
        "early": {"BodyPartExamined": "CHEST", "ViewPosition": "PA", "StudyDate": "20231231"},
        "late": {"BodyPartExamined": "CHEST", "ViewPosition": "PA", "StudyDate": "20250101"},
        "undated": {"BodyPartExamined": "CHEST", "ViewPosition": "PA"},
    }
    for number, (name, elements) in enumerate(kinds.items()):
        write_dicom(folder / f"{name}.dcm", some_pixels(number), **elements)
    small = {"BodyPartExamined": "CHEST", "ViewPosition": "PA", "StudyDate": "20240501"}
    write_dicom(folder / "small.dcm", some_pixels(9, (20, 11)), **small)
    criteria = CriteriaConfig(
        modality=("cr",),
        body_part=("CHEST",),
        view=("PA", "AP"),
        date_from="2024-01-01",
        date_to="2024-12-31",
        min_side=12,
    )
    index = open_site(site_over(folder, tmp_path / "work"), DataConfig(image_size=16, criteria=criteria)).index
    assert index.excluded == {
        "modality MR": 1,
        "body part HAND": 1,
        "body part not stated": 1,
        "view LL": 1,
        "study date too early": 1,
        "study date too late": 1,
        "study date not stated": 1,
        "smaller than 12 pixels": 1,
    }
    assert index.read == 1 and accounted(index) == 9


def test_what_is_excluded_is_never_decoded(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write_dicom(folder / "cr.dcm", some_pixels(1))
    write_dicom(folder / "mr.dcm", some_pixels(2), Modality="MR", NumberOfFrames=5)  # decoding it would fail
    data = DataConfig(image_size=16, criteria=CriteriaConfig(modality=("CR",)))
    index = open_site(site_over(folder, tmp_path / "work"), data).index
    assert index.excluded == {"modality MR": 1} and not index.quarantined


def test_at_most_so_many_images_of_a_patient_in_content_order(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for number in range(4):
        write_dicom(folder / f"{number}.dcm", some_pixels(number, (3, 20, 20)), PatientID="anna")
    write_dicom(folder / "b.dcm", some_pixels(9), PatientID="ben")
    site = site_over(folder, tmp_path / "work")
    everything = open_site(site, SMALL)
    limited = open_site(site, DataConfig(image_size=16, criteria=CriteriaConfig(max_images_per_patient=5)))
    assert limited.index.samples == 6 and limited.index.skipped_frames == {"beyond the patient's limit": 7}

    def of_anna(found: SiteImages) -> np.ndarray:
        return found.images[found.patients == np.bincount(found.patients).argmax()]

    np.testing.assert_array_equal(of_anna(limited), of_anna(everything)[:5])
    np.testing.assert_array_equal(open_site(site, SMALL).images, everything.images)  # and back


def test_of_many_frames_every_nth_is_taken_and_blank_ones_are_not(tmp_path: Path) -> None:
    frames = some_pixels(1, (7, 20, 20))
    frames[3] = 8
    write_dicom(tmp_path / "images/a.dcm", frames)
    found = open_site(site_over(tmp_path / "images", tmp_path / "work"), DataConfig(image_size=20, slice_stride=3))
    np.testing.assert_array_equal(found.images[:, 0], frames[[0, 6]])
    assert found.index.skipped_frames == {"between the strides": 4, "blank": 1}


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path: Path) -> None:
    folder = three_patients(tmp_path / "images")
    outside = write_dicom(tmp_path / "outside/x.dcm", some_pixels(50))
    (folder / "linked.dcm").symlink_to(outside)
    (folder / "broken.dcm").symlink_to(tmp_path / "nowhere")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    index = open_site(site_over(folder, tmp_path / "work"), SMALL).index
    assert index.read == 6 and accounted(index) == index.files == 12
    reasons = dict(index.quarantined)
    assert reasons["loop"] == "a link to a folder; mount or copy that folder inside"
    assert reasons["broken.dcm"] == reasons["pipe"] == "no regular file, or a broken link"


def test_what_cannot_even_be_looked_at_is_one_file_of_the_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = three_patients(tmp_path / "images")
    (folder / "endless.dcm").symlink_to("x" * 300)  # no file system has such a name
    (folder / "listed-only/inner").mkdir(parents=True)
    write_dicom(folder / "listed-only/0.dcm", some_pixels(60))
    asked = Path.stat

    def stat(path: Path, **given: Any) -> os.stat_result:
        """Ask as an account that may list a folder and not enter it: root may do both."""
        if path.parent.name == "listed-only":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return asked(path, **given)

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(Path, "lstat", lambda path: stat(path, follow_symlinks=False))
    index = open_site(site_over(folder, tmp_path / "work"), SMALL).index
    assert index.read == 5 and accounted(index) == index.files == 10
    reasons = dict(index.quarantined)
    assert reasons["endless.dcm"] == "cannot be opened: File name too long"
    assert reasons["listed-only/0.dcm"] == "cannot be opened: Permission denied"


def test_an_images_folder_that_may_not_be_entered_is_named_and_not_the_work_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    assert problem(tmp_path / "images", tmp_path / "work") == (
        f"site 'lyon': the images folder {tmp_path / 'images'} cannot be looked into: Permission denied. Let the "
        "account that runs Wardround read it."
    )


def test_a_row_whose_file_no_disk_can_hold_is_named(tmp_path: Path) -> None:
    write_dicom(tmp_path / "images/0.dcm", some_pixels(0))
    (tmp_path / "images/labels.csv").write_text(f"file,label,patient,site,split\n{'x' * 300},a,p,s,train\n")
    assert problem(tmp_path / "images", tmp_path / "work").startswith("images/labels.csv, row 2: the file 'xxx")


def test_a_name_is_said_on_one_line_that_any_terminal_shows(tmp_path: Path) -> None:
    folder = three_patients(tmp_path / "images")
    for number, name in enumerate((b"two\nlines \x1b[31m", b"latin-\xe9", "caf\u00e9 \u65e5".encode())):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).write_text(f"no image {number}")
    index = open_site(site_over(folder, tmp_path / "work"), SMALL).index
    names = [name for name, _ in index.quarantined]
    assert names == ["caf\u00e9 \u65e5", "empty.dcm", "latin-\\udce9", "notes.txt", "two\\nlines \\x1b[31m"]


def test_a_labelled_folder_gives_the_rows_of_a_site_and_its_splits(labelled: Path, tmp_path: Path) -> None:
    lyon = open_site(site_over(labelled, tmp_path / "lyon", site="lyon"), SMALL)
    assert lyon.index.samples == 12 and lyon.num_patients == 6  # three in five are for training
    both = open_site(site_over(labelled, tmp_path / "both", splits=("train", "val", "test")), SMALL)
    assert both.index.samples == 50 and both.num_patients == 25
    tree = open_site(site_over(labelled, tmp_path / "tree", kind="tree"), SMALL)
    assert tree.index.samples == 50 and tree.num_patients == 50  # a picture says of no patient
    assert dict(tree.index.quarantined).keys() == {"labels.csv"}


def test_the_tables_patient_counts_before_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for number in range(2):
        write_dicom(folder / f"{number}.dcm", some_pixels(number), PatientID="same")
    (folder / "labels.csv").write_text("file,label,patient,site,split\n0.dcm,a,p0,s,train\n1.dcm,a,p1,s,train\n")
    assert open_site(site_over(folder, tmp_path / "work"), SMALL).num_patients == 2


def test_a_patient_whom_a_table_names_for_some_files_alone_is_not_split(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    rows = ["file,label,patient,site,split"]
    known = [("anna", "p1"), ("anna", ""), ("ben", "p2"), ("cleo", "p3"), ("cleo", "p4")]  # by header, and by table
    for number, (header, table) in enumerate(known):
        write_dicom(folder / f"{number}.dcm", some_pixels(number), PatientID=header)
        rows.append(f"{number}.dcm,a,{table},s,train")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    found = open_site(site_over(folder, tmp_path / "work"), SMALL)
    numbers = {origin.path.stem: patient for origin, patient in zip(found.origins, found.patients, strict=True)}
    assert numbers["0"] == numbers["1"] and found.num_patients == 4  # anna, ben, and the two whom the table tells apart


# What a person can do wrong: one line each, nothing written over.


def problem(site_folder: Path, work: Path, data: DataConfig = SMALL, **images: object) -> str:
    """Return the message of the error that a site raises."""
    with pytest.raises(DataError) as caught:
        open_site(site_over(site_folder, work, **images), data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    assert problem(tmp_path / "none", tmp_path / "work") == (
        f"site 'lyon': the images folder {tmp_path / 'none'} does not exist. Set [images] folder."
    )
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    assert "is empty" in problem(tmp_path / "empty", tmp_path / "work")


def test_a_folder_without_a_readable_image_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write_dicom(folder / "mr.dcm", some_pixels(1), Modality="MR")
    (folder / "b.txt").write_text("text")
    (folder / "a.dcm").touch()
    data = DataConfig(image_size=16, criteria=CriteriaConfig(modality=("CR",)))
    assert problem(folder, tmp_path / "work", data) == (
        "site 'lyon': no image among 3 files: 2 cannot be read, 1 excluded (modality MR); first: 'a.dcm': empty: 0 "
        "bytes. Set [images] folder, or mend these files."
    )


def test_another_number_of_channels_is_left_out_and_counted_unless_the_federation_converts(tmp_path: Path) -> None:
    """One patient's colour picture among grey ones may not decide whether the site answers."""
    folder = tmp_path / "images"
    write_dicom(folder / "grey.dcm", some_pixels(1))
    Image.fromarray(some_pixels(2, (20, 20, 3))).save(folder / "colour.png")
    grey = DataConfig(image_size=16, criteria=CriteriaConfig(min_side=1))
    found = open_site(site_over(folder, tmp_path / "work"), grey)
    assert found.images.shape == (1, 1, 16, 16)
    assert found.index.excluded == {"3 channels, without convert_channels": 1}
    colour = grey.model_copy(update={"channels": 3, "mean": (0.5,) * 3, "std": (0.2,) * 3})
    assert open_site(site_over(folder, tmp_path / "work"), colour).index.excluded == {
        "1 channel, without convert_channels": 1
    }
    converted = open_site(site_over(folder, tmp_path / "work"), colour.model_copy(update={"convert_channels": True}))
    assert converted.images.shape == (2, 3, 16, 16)
    (folder / "grey.dcm").unlink()
    assert problem(folder, tmp_path / "work") == (
        "site 'lyon': no image among 1 files: 1 excluded (3 channels, without convert_channels); all were excluded. "
        "Set [images] folder, or mend these files."
    )


def test_a_work_folder_inside_the_images_is_refused(tmp_path: Path) -> None:
    folder = three_patients(tmp_path / "images")
    assert "the work folder lies inside the images folder" in problem(folder, folder / "work")
    assert not (folder / "work").exists()


def test_a_table_that_is_wrong_is_refused_with_the_row(tmp_path: Path) -> None:
    folder = write_labelled(tmp_path / "data", {"lyon": 4})
    table = (folder / "labels.csv").read_text().splitlines()

    def refused(*lines: str, **images: object) -> str:
        (folder / "labels.csv").write_text("\n".join(lines) + "\n")
        return problem(folder, tmp_path / "work", **images)

    assert refused("file,label,patient,site", *table[1:]) == (
        "data/labels.csv: lacks the column 'split'; its columns are file, label, patient, site."
    )
    assert "row 3: the file 'images/none.png' does not exist" in refused(*table[:2], "images/none.png,a,p,lyon,train")
    assert "row 3: 'images/lyon-0.png' is listed twice" in refused(*table[:2], table[1])
    for name in ("../secret.png", "/etc/passwd", "images/../../x", ""):
        assert f"'{name}' is no path inside the folder" in refused(table[0], f"{name},a,p,lyon,train")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.png").touch()
    (folder / "link").symlink_to(tmp_path / "outside")
    assert "lies behind a link to another folder" in refused(table[0], "link/x.png,a,p,lyon,train")
    assert refused(*table, site="oslo") == "data/labels.csv: no row says site 'oslo'; its sites are lyon."
    assert refused(*table, splits=("dev",)) == "data/labels.csv: no row has split dev; its splits are train."
    assert "has no row" in refused(table[0])
    (folder / "labels.csv").write_bytes(b"\xff\xfe\x00")
    assert "not a table in UTF-8" in problem(folder, tmp_path / "work")


def test_patients_who_share_a_file_are_one(tmp_path: Path) -> None:
    """Else the file would move to the other where one of the two is taken away, and change that one's gradient."""
    folder = write_labelled(tmp_path / "data", {"lyon": 12})
    rows = (folder / "labels.csv").read_text().splitlines()
    file, label, _, site, split = rows[1].split(",")
    shutil.copy(folder / file, folder / "images/copy.png")
    (folder / "labels.csv").write_text("\n".join([*rows, f"images/copy.png,{label},lyon-p5,{site},{split}"]) + "\n")
    found = open_site(site_over(folder, tmp_path / "work", splits=("train", "val", "test")), SMALL)
    assert (found.num_patients, found.num_images, bool(found.named.all())) == (5, 12, True)


def test_a_file_that_is_left_out_joins_nobody(tmp_path: Path) -> None:
    rows = ["file,label,patient,site,split"]
    for seed, patient in enumerate(("anna", "ben", "cleo")):
        for name, pixels in {
            "seen": some_pixels(seed),
            "placeholder": np.zeros((20, 20), np.uint8),  # blank
            "icon": some_pixels(9, (8, 8)),  # smaller than min_side
            "logo": some_pixels(9, (20, 20, 3)),  # in colour, and the federation is grey
        }.items():
            path = tmp_path / f"images/{patient}/{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            rows.append(f"{patient}/{name}.png,a,{patient},s,train")
    (tmp_path / "images/labels.csv").write_text("\n".join(rows) + "\n")
    index = open_site(site_over(tmp_path / "images", tmp_path / "work"), SMALL).index
    assert (index.read, index.duplicates, index.patients) == (3, 6, 3) and accounted(index) == 12


def test_an_image_of_nobody_is_told_apart(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 20), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
    found = open_site(site_over(folder, tmp_path / "work"), SMALL)
    assert (found.named.tolist(), found.index.unnamed, found.num_patients) == ([False] * 3, 3, 3)
