"""DICOM: what a workstation shows is what training sees, and what is no image is refused with a reason."""

import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from data_objects import image_object, some_pixels, write_dicom
from pydicom import Dataset
from pydicom.pixels import apply_voi_lut, get_decoder
from pydicom.uid import (
    BasicTextSRStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    SegmentationStorage,
)

from wardround.data.facts import Facts, ReadError
from wardround.data.readers import quiet, read_facts, read_frames

RAMP = np.arange(64 * 64, dtype=np.int16).reshape(64, 64)  # 0..4095


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def shown(path: Path, window: tuple[float, float] | None = None) -> np.ndarray:
    """Return the first frame of a file as it is shown."""
    return next(read_frames(path, range(1), window))


def refusal(path: Path) -> str:
    """Return why a file cannot be read."""
    with pytest.raises(ReadError) as caught:
        list(read_frames(path, range(read_facts(path).frames), None))
    return str(caught.value)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_the_files_own_window_is_applied_as_the_standard_says(tmp_path: Path, function: str) -> None:
    elements = {"WindowCenter": 1100.5, "WindowWidth": 700, "VOILUTFunction": function}
    path = write_dicom(tmp_path / "a.dcm", RAMP, RescaleSlope="0.5", RescaleIntercept="-100", **elements)
    units = RAMP.astype(np.float64) * 0.5 - 100
    reference = apply_voi_lut(units, pydicom.dcmread(path))
    low, high = -(2**15) * 0.5 - 100, (2**15 - 1) * 0.5 - 100  # pydicom scales to the range of what can be stored
    np.testing.assert_allclose(shown(path)[:, :, 0], (reference - low) / (high - low), atol=1e-5)


def test_the_federations_window_replaces_the_files_own_in_the_modalitys_units(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=1, WindowWidth=2)
    # Centre 40 and width 401 show HU -160 as 0 and HU 240 as 1: stored 864 and 1264.
    picture = shown(path, window=(40.0, 401.0)).reshape(-1)
    assert picture[864] == pytest.approx(0, abs=2e-3)
    assert picture[864 + 200] == pytest.approx(0.5, abs=2e-3)
    assert picture[864 + 400] == pytest.approx(1, abs=2e-3)


def test_monochrome1_is_inverted_after_its_window(tmp_path: Path) -> None:
    window = {"WindowCenter": 2000, "WindowWidth": 3000}
    plain = shown(write_dicom(tmp_path / "2.dcm", RAMP, **window))
    inverted = shown(write_dicom(tmp_path / "1.dcm", RAMP, PhotometricInterpretation="MONOCHROME1", **window))
    np.testing.assert_allclose(inverted, 1 - plain, atol=1e-6)


def test_a_lookup_table_of_twelve_bits_in_and_eight_out_does_not_wrap_around(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 8], (np.arange(4096) // 16).astype("<u2").tobytes()
    path = write_dicom(tmp_path / "a.dcm", RAMP.astype(np.uint16), BitsStored=12, HighBit=11, VOILUTSequence=[table])
    np.testing.assert_allclose(shown(path)[:, :, 0], (RAMP // 16) / 255, atol=1e-6)
    wrapped = apply_voi_lut(RAMP.astype(np.uint16), pydicom.dcmread(path))
    assert wrapped.max() < 16, "pydicom no longer wraps: its apply_voi could be used"


def test_a_modality_table_gives_the_units_that_the_window_is_in(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [4096, 0, 16], "US"
    table.LUTData = (10 * np.arange(4096)).astype("<u2").tobytes()
    stored = RAMP.astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", stored, ModalityLUTSequence=[table], WindowCenter=20475.5, WindowWidth=40951)
    np.testing.assert_allclose(shown(path)[:, :, 0], RAMP / 4095, atol=1e-4)


def test_ct_without_a_window_shows_soft_tissue(tmp_path: Path) -> None:
    elements = {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": -1024}
    picture = shown(write_dicom(tmp_path / "a.dcm", RAMP, **elements)).reshape(-1)
    assert picture[1024 - 161] == 0 and picture[1024 + 241] == 1  # HU -161 and 241
    assert picture[1024 + 40] == pytest.approx(0.5, abs=2e-3)


def test_eight_bits_without_a_window_are_taken_as_they_are_and_sixteen_are_stretched(tmp_path: Path) -> None:
    eight = (RAMP // 32).astype(np.uint8)  # 0..127: dark, and it stays dark
    assert shown(write_dicom(tmp_path / "8.dcm", eight)).max() == pytest.approx(127 / 255)
    wide = shown(write_dicom(tmp_path / "16.dcm", (RAMP // 32).astype(np.uint16), Modality="MR"))
    assert wide.min() == 0 and wide.max() == 1


def test_each_frame_of_an_enhanced_object_has_the_window_of_its_functional_group(tmp_path: Path) -> None:
    def group(centre: float) -> Dataset:
        made, voi = Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth, voi.VOILUTFunction = centre, 100, "LINEAR_EXACT"
        made.FrameVOILUTSequence = [voi]
        return made

    shared, rescale = Dataset(), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 2, 0, "US"
    shared.PixelValueTransformationSequence = [rescale]
    path = write_dicom(
        tmp_path / "a.dcm",
        np.full((2, 8, 8), 30, np.uint16),  # 60 in units
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=[group(60), group(35)],
    )
    first, second = read_frames(path, range(2), None)
    assert first.mean() == pytest.approx(0.5) and second.mean() == pytest.approx(0.75)


def test_the_same_image_in_eight_encodings_is_the_same_image(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("dicom") / "pydicom"
    kinds = ("implicit", "bigendian", "RLE", "jp2klossless", "jpeg_ls_lossless", "padded")
    reference = shown(folder / "MR_small.dcm")
    for kind in kinds:
        np.testing.assert_array_equal(shown(folder / f"MR_small_{kind}.dcm"), reference, err_msg=kind)
    wg04 = [shown(folder.parent / "wg04" / f"CT1_{kind}.dcm") for kind in ("RLE", "J2KR", "JPLL")]
    np.testing.assert_array_equal(wg04[0], wg04[1])
    np.testing.assert_array_equal(wg04[0], wg04[2])


def test_colour_arrives_as_red_green_and_blue(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("dicom") / "pydicom"
    palette = shown(folder / "examples_palette.dcm")
    assert palette.shape == (350, 800, 3) and palette.std(axis=2).max() > 0.2
    ultrasound = shown(folder / "examples_ybr_color.dcm")  # nearly grey: a wrong colour space would tint it
    assert ultrasound.shape == (240, 320, 3) and ultrasound.std(axis=2).mean() < 0.02
    planes = shown(folder.parent / "pydicom_data" / "SC_rgb_2frame.dcm")
    np.testing.assert_allclose(planes[5, 5], (1, 0, 0), atol=0.01)


def test_facts_are_those_of_the_header_and_do_not_print_the_patient(tmp_path: Path) -> None:
    elements = {"BodyPartExamined": "chest", "ViewPosition": "PA", "StudyDate": "2024.02.29", "PatientID": " 0815 "}
    facts = read_facts(write_dicom(tmp_path / "a.dcm", some_pixels(1, (3, 12, 10)), **elements))
    assert (facts.frames, facts.height, facts.width, facts.channels) == (3, 12, 10, 1)
    assert (facts.modality, facts.body_part, facts.view) == ("CR", "CHEST", "PA")
    assert str(facts.study_date) == "2024-02-29" and facts.patient == "0815"
    assert "0815" not in repr(facts)


def test_files_without_preamble_are_read_in_any_encoding(tmp_path: Path) -> None:
    stored = some_pixels(1, dtype=np.uint16)
    reference = shown(write_dicom(tmp_path / "whole.dcm", stored))
    for implicit, little in ((True, True), (False, True), (False, False)):
        made = image_object(stored if little else stored.byteswap())
        del made.file_meta
        path = tmp_path / f"{implicit}-{little}.dcm"
        made.save_as(path, implicit_vr=implicit, little_endian=little)
        np.testing.assert_array_equal(shown(path), reference)


def test_signed_and_unused_bits_are_told_apart(tmp_path: Path) -> None:
    # Twelve bits stored in sixteen, an overlay in the unused bits: -5 as 0xFFB, and 0x7 above it.
    stored = np.array([[0x7FFB, 0x0005], [0x0000, 0x0001]], np.uint16)
    elements = {"BitsStored": 12, "HighBit": 11, "PixelRepresentation": 1, "WindowCenter": 0, "WindowWidth": 10}
    path = write_dicom(tmp_path / "a.dcm", stored, VOILUTFunction="LINEAR_EXACT", **elements)
    np.testing.assert_allclose(shown(path)[:, :, 0], [[0, 1], [0.5, 0.6]], atol=1e-6)


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"SOPClassUID": SegmentationStorage}, "no image: Segmentation Storage"),
        ({"SOPClassUID": BasicTextSRStorage}, "no image: Basic Text SR Storage"),
        ({"Modality": "RTDOSE", "SOPClassUID": "2.25.7"}, "no image: an object of unknown class"),
        ({"PhotometricInterpretation": "ARGB"}, "its photometric interpretation (ARGB) is not one of MONOCHROME1"),
        ({"Rows": 0}, "damaged: its header declares 1 frames of 0 x 20 pixels"),
        ({"Rows": 65535, "Columns": 65535}, "too large: 1 frames of 65535 x 65535 pixels; at most 64 megapixels"),
        ({"NumberOfFrames": 70_000}, "too large: 70000 frames"),
        ({"NumberOfFrames": 3}, "cut off: 400 of 1200 bytes of pixel data"),
        ({"BitsAllocated": None}, "damaged: its header element BitsAllocated is absent or no number"),
    ],
)
def test_what_is_no_image_says_what_it_is(tmp_path: Path, elements: dict[str, Any], reason: str) -> None:
    assert refusal(write_dicom(tmp_path / "a.dcm", some_pixels(1), **elements)).startswith(reason)


def test_a_missing_codec_names_the_extra_that_brings_it(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("dicom")
    decoder: Any = get_decoder(JPEGLSLossless)
    removed = {name: decoder._available.pop(name) for name in list(decoder._available)}  # as without the extra
    try:
        assert refusal(folder / "pydicom/MR_small_jpeg_ls_lossless.dcm") == (
            "codec missing: JPEG-LS Lossless Image Compression; install wardround[codecs]"
        )
    finally:
        decoder._available.update(removed)


def test_compressed_pixels_that_are_cut_or_flipped_are_refused(tmp_path: Path) -> None:
    from wardround.data.hospitals import SCANNERS, acquired, image_object

    scanner = next(one for one in SCANNERS if one.syntax == JPEG2000Lossless)
    stored = acquired(np.eye(128, dtype=np.float32), scanner, np.random.default_rng(0))
    made = image_object(stored, scanner, 0, 0, 1)
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = JPEG2000Lossless
    whole = tmp_path / "whole.dcm"
    made.save_as(whole, enforce_file_format=True)
    assert shown(whole).shape == (224, 224, 1)
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(whole.read_bytes()[:-5000])
    assert refusal(cut).startswith("cut off: the file ends inside an element")
    start = made.PixelData.index(b"\xff\x4f\xff\x51")
    made.PixelData = made.PixelData[: start + 4] + bytes(300) + made.PixelData[start + 304 :]
    flipped = tmp_path / "flipped.dcm"
    made.save_as(flipped, enforce_file_format=True)
    assert refusal(flipped).startswith("damaged: its pixel data (JPEG 2000")


def test_damaged_run_lengths_are_refused_though_their_decoder_panics(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    content = (shared_data("dicom") / "pydicom/MR_small_RLE.dcm").read_bytes()
    start = content.index(b"\xfe\xff\x00\xe0", content.index(b"\xe0\x7f\x10\x00") + 20) + 8 + 64  # after its header
    path = tmp_path / "a.dcm"
    path.write_bytes(content[:start] + b"\x81\x00" * 800 + content[start + 1600 :])  # each two bytes become 128
    assert refusal(path).startswith("damaged: ")


def test_a_deflated_file_that_would_fill_the_memory_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wardround.data.dicom._INFLATED", 2**24)
    made = image_object(some_pixels(1))
    made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = tmp_path / "bomb.dcm"
    made.save_as(path, enforce_file_format=True)
    assert shown(path).shape == (20, 20, 1)
    content = path.read_bytes()
    (meta,) = np.frombuffer(content[140:144], "<u4")
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    zeros = b"".join([deflate.compress(bytes(2**20)) for _ in range(17)] + [deflate.flush()])
    path.write_bytes(content[: 144 + int(meta)] + zeros)
    assert refusal(path) == "too large: it inflates to more than 16 MiB"


def test_nothing_of_a_patient_reaches_a_log_a_warning_or_a_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "Doe^Jane"
    path = write_dicom(
        tmp_path / "a.dcm", some_pixels(1), PatientName=secret, PatientID=secret, Modality="lung of " + secret
    )
    content = path.read_bytes().replace(b"\x28\x00\x10\x00US\x02\x00\x14\x00", b"\x28\x00\x10\x00IS\x02\x00ab")
    assert content != path.read_bytes()
    path.write_bytes(content)  # Rows is now a text, and no number
    with caplog.at_level(logging.DEBUG):
        reason = refusal(path)
    assert reason == "damaged: its header element Rows is absent or no number"
    assert secret not in caplog.text + reason


def test_a_code_that_holds_something_else_is_left_out(tmp_path: Path) -> None:
    facts = read_facts(write_dicom(tmp_path / "a.dcm", some_pixels(1), BodyPartExamined="knee of Mr Miller, left"))
    assert isinstance(facts, Facts) and facts.body_part == ""


def test_big_endian_colour_keeps_its_bytes_apart(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("dicom") / "pydicom/ExplVR_BigEnd.dcm"
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == ExplicitVRBigEndian
    np.testing.assert_allclose(shown(path), pydicom.dcmread(path).pixel_array / 255, atol=1e-6)
