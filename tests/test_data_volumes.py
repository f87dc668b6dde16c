"""Volumes: where a voxel lands, which slices are one volume, and the account of all files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from conftest import tiny
from data_objects import site_over, write_dicom
from numpy.typing import NDArray
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage

from wardround.config.federation import DataConfig
from wardround.data import open_site, procedural_set, read_labelled
from wardround.data.readers import quiet
from wardround.errors import ConfigError, DataError

CUBES = DataConfig(dimensions=3, image_size=16, spacing=(2.0, 2.0, 2.0))


def changed(**changes: Any) -> DataConfig:
    return DataConfig.model_validate({**CUBES.model_dump(), **changes})


def write_nifti(path: Path, values: NDArray[Any], affine: NDArray[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


def blob(seed: int, shape: tuple[int, ...] = (20, 20, 20)) -> NDArray[np.int16]:
    """Return a smooth random volume with a body in the air: no two windows of it are alike."""
    draw = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    waves = sum(np.sin(np.tensordot(draw.normal(0, 4, 3), grid, 1)) for _ in range(4))
    return np.asarray((np.linalg.norm(grid, axis=0) < 1.2) * (1000 + 100 * waves), np.int16)


def write_series(folder: Path, volume: NDArray[np.int16], series: str = "2.25.7", **elements: Any) -> list[Path]:
    """Write an axial CT series [slices, rows, columns], 2 mm apart in all directions, one file a slice."""
    paths = []
    for place, stored in enumerate(volume):
        name = f"{(place * 7) % len(volume):03d}-{series}.dcm"  # names, like numbers, are in no order of space
        geometry = {
            "SOPClassUID": CTImageStorage,
            "SOPInstanceUID": f"{series}.{place + 1}",
            "SeriesInstanceUID": series,
            "Modality": "CT",
            "InstanceNumber": (place * 7) % len(volume) + 1,
            "ImagePositionPatient": [-10.0, -20.0, 2.0 * place],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [2, 2],
            "RescaleSlope": 1,
            "RescaleIntercept": -1000,
        }
        paths.append(write_dicom(folder / name, stored, **{**geometry, **elements}))
    return paths


def only_reason(folder: Path, work: Path, data: DataConfig = CUBES) -> str:
    """Return the reason for which all files of a site are quarantined."""
    write_nifti(folder / "good.nii", blob(99), np.diag([2.0, 2, 2, 1]))
    index = open_site(site_over(folder, work), data).index
    (reason,) = {reason for _, reason in index.quarantined}
    assert index.read == 1 and len(index.quarantined) == index.files - 1
    return reason


def test_a_marked_voxel_lands_where_its_millimetres_say() -> None:
    """The file's first axis runs to the left, its second to the feet, its third to the back."""
    from wardround.data.volumes import resampled

    values = np.zeros((10, 12, 14), np.float32)
    values[2, 3, 4] = 1.0
    affine = np.array([[-2.0, 0, 0, 50], [0, 0, -3, 60], [0, -4, 0, 70], [0, 0, 0, 1]])
    # By hand: right 50 - 2*2 = 46 mm, anterior 60 - 3*4 = 48 mm, superior 70 - 4*3 = 58 mm. The lowest
    # corner is at right 50 - 2*9 = 32, anterior 60 - 3*13 = 21, superior 70 - 4*11 = 26 mm.
    own = np.asarray(resampled(values, affine, (4.0, 3.0, 2.0)))[0]
    assert own.shape == (12, 14, 10)
    assert np.argwhere(own > 0.99).tolist() == [[(58 - 26) // 4, (48 - 21) // 3, (46 - 32) // 2]]
    # At half the spacing in the first direction the voxel sits at twice its place, between halves.
    finer = np.asarray(resampled(values, affine, (2.0, 3.0, 2.0)))[0]
    assert finer.shape == (23, 14, 10)
    assert finer[14:19, 9, 7].tolist() == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0], abs=1e-6)


def test_a_coarser_spacing_averages_instead_of_skipping() -> None:
    from wardround.data.volumes import resampled

    stripes = np.tile(np.array([0.0, 1.0], np.float32), 16)[:, None, None].repeat(8, 1).repeat(8, 2)
    coarse = np.asarray(resampled(stripes, np.diag([1.0, 1, 1, 1]), (1.0, 1.0, 4.0)))[0]
    assert coarse.shape == (8, 8, 9)
    assert coarse[4, 4, 2:7] == pytest.approx(0.5, abs=0.15)  # skipping would show 0 or 1 throughout


def test_the_slices_of_a_series_are_ordered_by_their_place(tmp_path: Path) -> None:
    volume = blob(1, (18, 17, 16))
    write_series(tmp_path / "site", volume)
    site = open_site(site_over(tmp_path / "site", tmp_path / "work"), changed(window=(0.0, 2000.0), image_size=32))
    assert (site.index.files, site.index.read, site.index.samples, site.index.patients) == (18, 18, 1, 1)
    assert site.images.shape == (1, 1, 32, 32, 32)
    # By hand: DICOM's rows run to the back and its columns to the left; both are turned around.
    turned = volume[:, ::-1, ::-1] - 1000.0
    expected = np.rint(((turned + 0.5) / 1999 + 0.5).clip(0, 1) * 255)
    body = expected > expected.mean()
    box = tuple(slice(np.nonzero(body)[a].min(), np.nonzero(body)[a].max() + 1) for a in range(3))
    cut = expected[box]
    margins = [((32 - edge) // 2, 32 - edge - (32 - edge) // 2) for edge in cut.shape]
    difference = site.images[0, 0].astype(int) - np.pad(cut, margins)
    assert np.abs(difference).max() <= 1


def test_a_series_is_the_volume_that_nifti_makes_of_it(tmp_path: Path) -> None:
    volume = blob(2)
    write_series(tmp_path / "dicom", volume)
    # NIfTI's first axis are DICOM's columns, and both first axes change their sign.
    write_nifti(tmp_path / "nifti/a.nii.gz", volume.transpose(2, 1, 0) - 1000, np.diag([-2.0, -2, 2, 1]))
    data = changed(window=(0.0, 2000.0), image_size=32)
    first, second = (open_site(site_over(tmp_path / n, tmp_path / f"work-{n}"), data) for n in ("dicom", "nifti"))
    assert np.array_equal(first.images, second.images)
    assert first.images.std() > 10


def test_two_series_in_one_folder_are_two_volumes(tmp_path: Path) -> None:
    write_series(tmp_path / "site", blob(1), "2.25.7", PatientID="P1")
    write_series(tmp_path / "site", blob(2), "2.25.8", PatientID="P2")
    site = open_site(site_over(tmp_path / "site", tmp_path / "work"), changed(cubes_per_volume=3))
    assert (site.index.read, site.index.samples, site.index.patients) == (40, 6, 2)
    assert site.patients.tolist() == [0, 0, 0, 1, 1, 1]
    assert dict(site.index.modalities) == {"CT": 6}


def test_a_missing_slice_quarantines_the_series(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "site", blob(1))
    paths[9].unlink()
    assert "not evenly spaced" in only_reason(tmp_path / "site", tmp_path / "work")


def test_a_damaged_slice_quarantines_the_series(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "site", blob(1))
    paths[9].write_bytes(paths[9].read_bytes()[:-100])
    assert "cut off" in only_reason(tmp_path / "site", tmp_path / "work")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"PixelSpacing": [3, 3]}, "differ in size, direction or pixel spacing"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, 1]}, "differ in size, direction or pixel spacing"),
        ({"ImagePositionPatient": None}, "do not say where they lie"),
        ({"PatientID": "P2"}, "different patients"),
        ({"PixelSpacing": [0, 0]}, "span no plane"),
    ],
)
def test_slices_that_do_not_fit_together_quarantine_the_series(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    write_series(tmp_path / "site", blob(1))
    odd = {"ImagePositionPatient": [-10.0, -20.0, 40.0], "SOPInstanceUID": "2.25.7.99", **changes}
    write_series(tmp_path / "site" / "odd", blob(3)[:1], **odd)
    assert reason in only_reason(tmp_path / "site", tmp_path / "work")


def test_what_is_no_volume_says_why(tmp_path: Path) -> None:
    site = tmp_path / "site"
    write_nifti(site / "flat.nii", blob(1)[:, :, :1], np.eye(4))
    write_nifti(site / "fine.nii", blob(1), np.diag([1000.0, 1000, 1000, 1]))
    write_nifti(site / "blank.nii", np.full((20, 20, 20), 7, np.int16), np.eye(4))
    write_nifti(site / "good.nii", blob(2), np.diag([2.0, 2, 2, 1]))
    write_series(site / "one", blob(3)[:1])
    np.save(site / "picture.npy", np.zeros((20, 20), np.uint8))
    reasons = dict(open_site(site_over(site, tmp_path / "work"), CUBES).index.quarantined)
    assert "one slice" in reasons["flat.nii"]
    assert "at the agreed spacing" in reasons["fine.nii"]
    assert "blank" in reasons["blank.nii"]
    assert "one place" in reasons["one/000-2.25.7.dcm"]
    assert "no volume: a file of kind 'array'" in reasons["picture.npy"]
    assert len(reasons) == 5


def test_of_a_series_over_time_the_first_volume_counts(tmp_path: Path) -> None:
    first, later = blob(1), blob(2)
    write_series(tmp_path / "once", first)
    write_series(tmp_path / "twice", first)
    for place, path in enumerate(write_series(tmp_path / "twice" / "later", later)):
        import pydicom

        header = pydicom.dcmread(path)
        header.InstanceNumber, header.SOPInstanceUID = 100 + place, f"2.25.9.{place + 1}"
        header.save_as(path)
    one, two = (
        open_site(site_over(tmp_path / n, tmp_path / f"w-{n}"), changed(image_size=32)) for n in ("once", "twice")
    )
    assert two.index.read == 40
    assert np.array_equal(one.images, two.images)


def test_cubes_are_a_function_of_the_content(tmp_path: Path) -> None:
    data = changed(cubes_per_volume=4)
    affine = np.diag([1.0, 1, 1, 1])
    for name in ("a/x.nii", "b/folder/y.nii"):
        write_nifti(tmp_path / name, blob(1, (40, 40, 40)), affine)
    write_nifti(tmp_path / "c/x.nii", blob(1, (40, 40, 40)) + np.int16(1), affine)
    first, moved, other = (open_site(site_over(tmp_path / n, tmp_path / f"w-{n}"), data).images for n in "abc")
    finer = changed(cubes_per_volume=4, spacing=(1.0, 1.0, 1.0))
    assert np.array_equal(first, moved)
    assert not np.array_equal(first, other)
    cubes = open_site(site_over(tmp_path / "a", tmp_path / "w-a"), finer).images
    assert len({cube.tobytes() for cube in cubes}) == 4


def test_a_volume_smaller_than_the_cube_is_padded_with_black(tmp_path: Path) -> None:
    write_nifti(tmp_path / "site/a.nii", np.arange(1, 18**3 + 1, dtype=np.int16).reshape(18, 18, 18), np.eye(4))
    cube = open_site(site_over(tmp_path / "site", tmp_path / "work"), CUBES).images[0, 0]
    assert cube.shape == (16, 16, 16)
    assert cube[:, 0].max() == cube[0].max() == 0 and cube.max() > 200


def test_nothing_is_decoded_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wardround.data import volumes

    paths = write_series(tmp_path / "site", blob(1))
    write_nifti(tmp_path / "site/a.nii", blob(2), np.diag([2.0, 2, 2, 1]))
    site = site_over(tmp_path / "site", tmp_path / "work")
    decoded: list[int] = []
    real = volumes.random_cubes

    def counted(files: Any, *rest: Any) -> Any:
        decoded.append(len(files))
        return real(files, *rest)

    monkeypatch.setattr(volumes, "random_cubes", counted)
    before = np.array(open_site(site, CUBES).images)
    assert sorted(decoded) == [1, 20]
    assert np.array_equal(open_site(site, CUBES).images, before) and len(decoded) == 2
    paths[-1].unlink()  # the series is another volume now, the file is the same
    assert open_site(site, CUBES).index.samples == 2
    assert sorted(decoded) == [1, 19, 20]


def test_a_patient_who_opts_out_takes_all_slices_along(tmp_path: Path) -> None:
    write_series(tmp_path / "site", blob(1), "2.25.7", PatientID="P1")
    write_series(tmp_path / "site", blob(2), "2.25.8", PatientID="P2")
    (tmp_path / "out.txt").write_text("P1\n")
    site = open_site(site_over(tmp_path / "site", tmp_path / "work", opt_out=tmp_path / "out.txt"), CUBES)
    assert (site.index.opted_out, site.index.read, site.num_patients) == (20, 20, 1)


def test_a_copy_of_a_series_counts_as_duplicates_and_a_criterion_leaves_all_slices_out(tmp_path: Path) -> None:
    write_series(tmp_path / "site/a", blob(1))
    write_series(tmp_path / "site/b", blob(1))
    write_nifti(tmp_path / "site/c.nii", blob(2), np.diag([2.0, 2, 2, 1]))
    work = tmp_path / "work"
    index = open_site(site_over(tmp_path / "site", work), CUBES).index
    assert (index.files, index.read, index.duplicates, index.samples) == (41, 21, 20, 2)
    index = open_site(site_over(tmp_path / "site", work), changed(criteria={"modality": ["CT"]})).index
    assert (index.read, dict(index.excluded)) == (20, {"modality not stated": 1})


def test_frames_of_an_enhanced_object_are_the_slices(tmp_path: Path) -> None:
    from pydicom import Dataset

    volume = blob(4)

    def group(**elements: Any) -> Dataset:
        made = Dataset()
        for name, value in elements.items():
            setattr(made, name, value)
        return made

    order = np.random.default_rng(0).permutation(len(volume)).tolist()
    frames = [group(PlanePositionSequence=[group(ImagePositionPatient=[0, 0, 2.0 * place])]) for place in order]
    shared = group(
        PlaneOrientationSequence=[group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelMeasuresSequence=[group(PixelSpacing=[2, 2])],
    )
    write_dicom(
        tmp_path / "many/a.dcm",
        volume[order],
        SOPClassUID=EnhancedMRImageStorage,
        Modality="MR",
        SeriesInstanceUID="2.25.7",
        PerFrameFunctionalGroupsSequence=frames,
        SharedFunctionalGroupsSequence=[shared],
    )
    write_series(tmp_path / "single", volume, Modality="MR", RescaleIntercept=0)
    many, single = (
        open_site(site_over(tmp_path / n, tmp_path / f"w-{n}"), changed(image_size=32)) for n in ("many", "single")
    )
    assert np.array_equal(many.images, single.images)


def test_a_labelled_folder_gives_the_middle_of_each_volume(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii", blob(1, (40, 40, 40)), np.diag([2.0, 2, 2, 1]))
    (tmp_path / "labels.csv").write_text("file,label,patient,site,split\na.nii,ill,p,s,train\n")
    found = read_labelled(tmp_path, CUBES)
    assert found.images.shape == (1, 1, 16, 16, 16) and found.images.std() > 10


def test_there_are_no_procedural_volumes() -> None:
    with pytest.raises(DataError, match="flat"):
        procedural_set(8, 0, CUBES)
    volumes = {"dimensions": 3, "spacing": [2, 2, 2]}
    with pytest.raises(ConfigError, match="no volumes"):
        tiny(backbone={"name": "monai_vit_tiny"}, data=volumes, evaluation_set={"kind": "procedural"})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"spacing": [1, 1, 1]}, "set dimensions = 3"),
        ({"cubes_per_volume": 2}, "set dimensions = 3"),
        ({"dimensions": 3}, "needs spacing"),
        ({"dimensions": 3, "spacing": [1, 0, 1]}, "above 0"),
        ({"dimensions": 3, "spacing": [1, 1, 1], "slice_stride": 2}, "read whole"),
    ],
)
def test_keys_that_do_not_fit_the_dimensions_are_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny(data=data)


def test_grey_volumes_become_colour_only_where_agreed(tmp_path: Path) -> None:
    write_nifti(tmp_path / "site/a.nii", blob(1), np.diag([2.0, 2, 2, 1]))
    site = site_over(tmp_path / "site", tmp_path / "work")
    colour = {"channels": 3, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    with pytest.raises(DataError, match="convert_channels"):
        open_site(site, changed(**colour))
    images = open_site(site, changed(**colour, convert_channels=True)).images
    assert images.shape == (1, 3, 16, 16, 16) and np.array_equal(images[0, 0], images[0, 2])


def test_real_files_are_read_or_named(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    """GE and Philips repeat each place over time, UIH is sagittal, Siemens and half of UIH are mosaics."""
    root = shared_data("dicom")
    found = {}
    for name in ("series_GE_MR", "series_Philips_MR", "series_UIH_MR", "nifti"):
        index = open_site(site_over(root / name, tmp_path / name), changed(criteria={"min_side": 1})).index
        assert index.files == index.read + len(index.quarantined)
        found[name] = (index.read, index.samples)
    assert found == {
        "series_GE_MR": (30, 1),
        "series_Philips_MR": (27, 1),
        "series_UIH_MR": (4, 1),
        "nifti": (8, 8),
    }


def test_a_series_has_the_shape_and_spacing_that_another_converter_finds(shared_data: Callable[[str], Path]) -> None:
    """dcm2niix made this NIfTI of another session of the same protocol."""
    from wardround.data import dicom_series

    root = shared_data("dicom")
    with quiet():
        values, affine = dicom_series.volume(sorted((root / "series_GE_MR").iterdir()), None)
    other = nibabel.load(root / "nifti/DCM2NIIX_regression_test_4.nii")
    assert values.shape == other.shape[:3]
    np.testing.assert_allclose(nibabel.affines.voxel_sizes(affine), nibabel.affines.voxel_sizes(other.affine), 1e-4)
