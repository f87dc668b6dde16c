"""Volumes, pictures and arrays; and formats told from bytes, not names."""

import gzip
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from data_objects import some_pixels, write_dicom
from PIL import Image

from wardround.data.facts import ReadError
from wardround.data.intensities import stretched, to_square, windowed
from wardround.data.readers import format_of, quiet, read_facts, read_frames


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def shown(path: Path, window: tuple[float, float] | None = None) -> list[np.ndarray]:
    """Return all frames of a file."""
    return list(read_frames(path, range(read_facts(path).frames), window))


def refusal(path: Path) -> str:
    """Return why a file cannot be read."""
    with pytest.raises(ReadError) as caught:
        shown(path)
    return str(caught.value)


def write_volume(path: Path, values: np.ndarray) -> Path:
    """Write a NIfTI file of these voxels."""
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    return path


def save_picture(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    """Write a picture with Pillow."""
    Image.fromarray(pixels).save(path, **options)
    return path


def test_a_volume_is_its_slices_along_the_third_axis_upright(tmp_path: Path) -> None:
    volume = np.zeros((5, 7, 3), np.int16)
    volume[1, 6, 2] = 1000  # at the top, second from the left, of the last slice
    path = write_volume(tmp_path / "a.nii.gz", volume)
    facts = read_facts(path)
    assert (facts.frames, facts.height, facts.width, facts.channels) == (3, 7, 5, 1)
    slices = shown(path)
    assert slices[2][0, 1, 0] == 1 and slices[2].sum() == 1 and slices[0].sum() == 0


def test_of_a_series_of_volumes_the_first_counts(tmp_path: Path) -> None:
    series = np.stack([np.arange(48).reshape(4, 4, 3), np.full((4, 4, 3), 7)], axis=-1).astype(np.float32)
    first = shown(write_volume(tmp_path / "first.nii", series[..., 0]))
    np.testing.assert_array_equal(shown(write_volume(tmp_path / "series.nii", series)), first)


def test_nan_and_infinity_in_a_volume_stay_where_they_are(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).uniform(10, 20, (16, 16, 2))
    volume[0, 0, 0], volume[1, 0, 0], volume[2, 0, 0] = np.nan, np.inf, -np.inf
    first = shown(write_volume(tmp_path / "a.nii", volume))[0]
    assert np.isfinite(first).all()
    assert first[-1, :3, 0].tolist() == [0, 1, 0]
    assert 0.4 < np.median(first) < 0.6  # the others are stretched as if those three were not there


def test_a_window_in_the_config_holds_for_volumes_too(tmp_path: Path) -> None:
    volume = np.array([-1000.0, -160, 40, 239, 3000]).reshape(5, 1, 1).astype(np.float32)
    values = shown(write_volume(tmp_path / "ct.nii", volume), window=(40.0, 400.0))[0].reshape(-1)
    assert values == pytest.approx([0, 0, 0.5, 1, 1], abs=2e-3)


def test_colour_volumes_and_absurd_ones_are_refused(tmp_path: Path) -> None:
    colours = np.zeros((4, 4, 2), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    assert refusal(write_volume(tmp_path / "rgb.nii", colours)).startswith("its voxels are colours")
    header = nibabel.Nifti1Header()
    header.set_data_shape((30_000, 30_000, 30_000))
    huge = tmp_path / "huge.nii.gz"
    huge.write_bytes(gzip.compress(header.binaryblock + bytes(1000)))
    assert refusal(huge).startswith("too large: a volume of 30000 x 30000 x 30000")
    cut = tmp_path / "cut.nii"
    cut.write_bytes(write_volume(tmp_path / "whole.nii", np.ones((9, 9, 9))).read_bytes()[:2000])
    assert refusal(cut).startswith("damaged")


def test_nibabel_prints_nothing_on_a_header_that_it_mends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_volume(tmp_path / "a.nii", np.arange(27.0).reshape(3, 3, 3))
    content = bytearray(path.read_bytes())
    content[254:256] = (41).to_bytes(2, "little")  # sform_code
    path.write_bytes(content)
    assert len(shown(path)) == 3
    assert capfd.readouterr().err == ""


def test_freesurfer_volumes_are_read(shared_data: Callable[[str], Path]) -> None:
    slices = shown(shared_data("dicom") / "nifti" / "test.mgz")
    assert len(slices) == 5 and slices[0].shape == (4, 3, 1)


def test_eight_bit_pictures_are_taken_as_they_are(tmp_path: Path) -> None:
    grey, colour = some_pixels(1, (9, 11)), some_pixels(2, (9, 11, 3))
    np.testing.assert_allclose(shown(save_picture(tmp_path / "g.png", grey))[0][:, :, 0], grey / 255, atol=1e-6)
    np.testing.assert_allclose(shown(save_picture(tmp_path / "c.png", colour))[0], colour / 255, atol=1e-6)
    opaque = np.dstack([colour, np.full((9, 11), 128, np.uint8)])
    np.testing.assert_allclose(shown(save_picture(tmp_path / "a.png", opaque))[0], colour / 255, atol=1e-6)
    assert shown(save_picture(tmp_path / "j.jpg", colour))[0].shape == (9, 11, 3)


def test_sixteen_bit_pictures_are_stretched_or_windowed(tmp_path: Path) -> None:
    twelve_bits = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    path = save_picture(tmp_path / "a.png", twelve_bits)
    picture = shown(path)[0]
    assert picture.min() == 0 and picture.max() == 1 and picture.mean() == pytest.approx(0.5, abs=0.01)
    low, high = np.percentile(twelve_bits, (0.5, 99.5))
    np.testing.assert_allclose(picture[:, :, 0], np.clip((twelve_bits - low) / (high - low), 0, 1), atol=1e-5)
    half = shown(path, window=(2048.0, 4096.0))[0]
    assert half.reshape(-1)[1024] == pytest.approx(0.25, abs=1e-3)


def test_a_tiff_is_its_pages_and_a_photograph_stands_upright(tmp_path: Path) -> None:
    pages = [Image.fromarray(some_pixels(seed, (6, 8))) for seed in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert [frame.shape for frame in shown(tmp_path / "a.tif")] == [(6, 8, 1)] * 3
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to see it upright
    photograph = save_picture(tmp_path / "a.jpg", some_pixels(1, (6, 8)), exif=exif)
    assert shown(photograph)[0].shape == (8, 6, 1)


def test_a_photograph_is_one_image_whatever_its_camera_put_behind_it(tmp_path: Path) -> None:
    photograph, behind = (Image.fromarray(some_pixels(seed, (24, 24, 3))) for seed in (1, 2))
    photograph.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[behind])  # a preview, or a gain map
    assert len(shown(tmp_path / "a.jpg")) == 1


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_stands_upright_in_each_of_the_eight_orientations(dtype: Any, compression: str, tmp_path: Path) -> None:
    stored = some_pixels(1, (6, 8), dtype)
    half = np.rot90(stored, 2)
    turned = (stored, stored[:, ::-1], half, stored[::-1], stored.T, np.rot90(stored, -1), half.T, np.rot90(stored))
    for orientation, upright in enumerate(turned, start=1):
        path = save_picture(tmp_path / "a.tif", stored, tiffinfo={274: orientation}, compression=compression)
        top = np.iinfo(dtype).max
        seen = shown(path, window=(top / 2 + 0.5, top + 1.0))[0][:, :, 0]
        np.testing.assert_allclose(seen, upright / top, atol=1e-4, err_msg=f"orientation {orientation}")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_whose_zero_is_white_is_inverted(dtype: Any, tmp_path: Path) -> None:
    stored = some_pixels(1, (20, 20), dtype)
    black, white = (struct.pack("<HHIHH", 262, 3, 1, one, 0) for one in (1, 0))  # PhotometricInterpretation
    path = save_picture(tmp_path / "black.tif", stored)
    (tmp_path / "white.tif").write_bytes(path.read_bytes().replace(black, white))
    np.testing.assert_allclose(shown(tmp_path / "white.tif")[0], 1 - shown(path)[0], atol=1e-6)


def test_arrays_of_every_kind_are_read_or_refused(tmp_path: Path) -> None:
    def npz(name: str, **arrays: Any) -> Path:
        np.savez_compressed(tmp_path / name, **arrays)
        return tmp_path / name

    pixels = some_pixels(1, (6, 8))
    np.testing.assert_allclose(shown(npz("u1.npz", a=pixels))[0][:, :, 0], pixels / 255, atol=1e-6)
    fractions = pixels / np.float32(300)  # at most 0.85: not stretched, or the same grey would differ by image
    np.testing.assert_allclose(shown(npz("f4.npz", a=fractions))[0][:, :, 0], fractions, atol=1e-6)
    assert shown(npz("c.npz", a=some_pixels(1, (6, 8, 3))))[0].shape == (6, 8, 3)
    hounsfield = np.linspace(-1000, 1000, 48).reshape(6, 8)
    assert shown(npz("f8.npz", a=hounsfield), window=(0.0, 2000.0))[0].mean() == pytest.approx(0.5, abs=0.01)
    assert shown(npz("stretched.npz", a=hounsfield))[0].max() == 1
    np.save(tmp_path / "a.npy", pixels)
    assert shown(tmp_path / "a.npy")[0].shape == (6, 8, 1)
    assert refusal(npz("two.npz", a=pixels, b=pixels)) == "an npz of 2 arrays; expected one"
    assert refusal(npz("4d.npz", a=np.zeros((2, 2, 2, 2)))).startswith("its array has shape [2, 2, 2, 2]")
    assert refusal(npz("object.npz", a=np.array([[{}]]))) == "its array holds no real numbers"


def test_an_array_that_claims_terabytes_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "huge.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("a.npy", "w") as member:
        header = {"descr": "<f8", "fortran_order": False, "shape": (2**20, 2**20)}
        np.lib.format.write_array_header_1_0(member, header)
    assert refusal(path).startswith("too large: 1 frames of 1048576 x 1048576 pixels")


def test_a_picture_that_inflates_to_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    for side, reason in ((9000, "too large: 1 frames of 9000 x 9000"), (20_000, "too large: its header declares")):
        path = save_picture(tmp_path / f"{side}.png", np.zeros((10, 10), np.uint8))
        content = bytearray(path.read_bytes())
        content[16:24] = side.to_bytes(4, "big") * 2  # width and height in IHDR
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        path.write_bytes(content)
        assert refusal(path).startswith(reason)


def test_a_cut_picture_is_refused(tmp_path: Path) -> None:
    for suffix in ("png", "jpg"):
        path = save_picture(tmp_path / f"a.{suffix}", some_pixels(1, (64, 64)))
        path.write_bytes(path.read_bytes()[:-600])
        assert refusal(path).startswith("damaged or cut off")


def test_the_bytes_tell_the_format_and_not_the_name(tmp_path: Path) -> None:
    dicom = write_dicom(tmp_path / "picture.png", some_pixels(1))
    assert format_of(dicom) == "DICOM" and len(shown(dicom)) == 1
    picture = save_picture(tmp_path / "image.bin", some_pixels(1), format="PNG")
    picture = picture.rename(tmp_path / "image.dcm")
    assert format_of(picture) == "picture" and len(shown(picture)) == 1


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.dcm", b"", "empty: 0 bytes"),
        ("a.dcm", b"a letter", "not DICOM: neither the DICM prefix nor a DICOM element at its start"),
        ("a.pdf", b"%PDF-1.7 and more", "not an image: neither DICOM, NIfTI, PNG, JPEG, TIFF nor npz"),
        ("a.docx", b"PK\x03\x04 no archive", "damaged: ValueError while reading its header"),
        ("a.png", b"\x89PNG\r\n\x1a\n and no more", "damaged or cut off: its header cannot be read"),
        ("a.nii", b"no header", "damaged: "),
    ],
)
def test_what_is_no_image_is_refused_with_a_reason(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert refusal(path).startswith(reason)


def test_a_window_of_two_grey_levels_is_a_step() -> None:
    values = np.array([10, 19, 20, 21], np.float32)
    assert windowed(values, 20, 1).tolist() == [0, 0, 1, 1]  # PS3.3 C.11.2.1.2: above centre - 0.5


def test_stretching_finds_the_picture_where_most_pixels_are_background() -> None:
    mostly_black = np.zeros(1000, np.float32)
    mostly_black[:3] = (1, 2, 4)
    assert stretched(mostly_black)[:4].tolist() == [0.25, 0.5, 1, 0]
    assert stretched(np.full(9, np.nan, np.float32)).tolist() == [0] * 9


@pytest.mark.parametrize("side", [512, 1000, 2048])
def test_percentiles_are_those_of_all_columns(side: int) -> None:
    columns = np.zeros((side, side), np.float32) + np.random.default_rng(0).normal(0, 1, side).astype(np.float32)
    low, high = np.percentile(columns, (0.5, 99.5))
    expected = np.clip((columns - low) / (high - low), 0, 1)
    np.testing.assert_allclose(stretched(columns), expected, atol=1 / 255)


def test_reduction_is_antialiased_and_keeps_the_mean() -> None:
    checks = np.indices((128, 128)).sum(0)[:, :, None] % 2 * np.float32(1)
    square = to_square(checks, 16, 1)
    assert square.shape == (1, 16, 16) and np.abs(square.astype(int) - 127.5).max() <= 1


def test_channels_convert_by_luma_and_by_copies() -> None:
    colour = np.ones((8, 8, 3), np.float32) * np.array([1, 0.5, 0], np.float32)
    assert to_square(colour, 8, 1)[0, 0, 0] == round(255 * (0.299 + 0.587 * 0.5))
    grey = to_square(colour[:, :, 1:2], 8, 3)
    assert grey.shape == (3, 8, 8) and (grey == 128).all()
