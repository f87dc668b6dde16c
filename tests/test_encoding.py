"""Numbers that cross in fewer bytes: by hand, against torch, and what is lost on the way."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from wardround.config.federation import Encoding
from wardround.encoding import (
    BLOCK,
    SCALES,
    check_encoded,
    compress,
    compressed_file,
    decode,
    decode_one,
    encode,
    encoded_layout,
    inflate,
    keep,
    kept,
)
from wardround.errors import UpdateError
from wardround.update import Array, State, layout, pack, state_hash

DRAW = np.random.default_rng(0)
STATE: State = {
    "scalar": np.array(0.3, np.float32),
    "one": np.array([-2.5], np.float32),
    "none": np.zeros((0, 3), np.float32),
    "bias": DRAW.normal(size=192).astype(np.float32),
    "kernel": DRAW.normal(size=(7, 3, 5, 11)).astype(np.float32),
    "seen": np.array(2**40 + 1),
}


def from_bits(*bits: int) -> Array:
    return np.array(bits, np.uint32).view(np.float32)


def one(array: Array, kind: Encoding) -> tuple[State, Array]:
    """Return the encoded arrays and the residual of one tensor."""
    encoded, lost = encode({"w": array}, kind, {})
    return encoded, lost["w"]


def test_bfloat16_rounds_to_nearest_and_ties_to_even() -> None:
    values = from_bits(0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000, 0x00008000, 0x80000000)
    encoded, _ = one(values, "bfloat16")
    assert [hex(code) for code in encoded["w"]] == ["0x3f80", "0x3f82", "0x3f81", "0x3f80", "0xbf82", "0x0", "0x8000"]


def test_bfloat16_is_torchs() -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 100_000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3e38)]
    encoded, _ = one(values, "bfloat16")
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16)
    assert np.array_equal(encoded["w"].view(np.int16), expected.view(torch.int16).numpy())
    assert np.array_equal(decode(encoded, "bfloat16")["w"], expected.float().numpy())


def test_int8_by_hand() -> None:
    values = np.zeros(BLOCK + 3, np.float32)
    values[:5] = [127.0, 0.5, 1.5, -2.5, -100.4]  # scale 1
    values[BLOCK:] = [0.0, -0.0254, 0.0127]  # its own: 0.0002
    encoded, lost = one(values, "int8")
    assert encoded["w"].dtype == np.int8
    assert encoded["w"][:5].tolist() == [127, 0, 2, -2, -100]
    assert encoded["w"][BLOCK:].tolist() == [0, -127, 64]  # 63.5 to even
    np.testing.assert_allclose(encoded[f"w{SCALES}"], [1.0, 0.0002], rtol=1e-6)
    np.testing.assert_allclose(lost[:5], [0.0, 0.5, -0.5, -0.5, -0.4], rtol=1e-5)
    np.testing.assert_allclose(lost[BLOCK:], [0.0, 0.0, -0.0001], atol=1e-9)


def test_a_block_of_zeros_and_one_below_the_normal_numbers_come_back_within_a_step() -> None:
    tiny = from_bits(180, 1, 0)  # the scale of 180 / 127 rounds down to 1 of these, and codes stop at 127
    for values in (np.zeros(5, np.float32), tiny):
        encoded, lost = one(values, "int8")
        assert np.array_equal(decode(encoded, "int8")["w"] + lost, values)
    assert one(tiny, "int8")[0]["w"].tolist() == [127, 1, 0]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_shapes_scalars_empty_tensors_and_whole_numbers_come_back(kind: Encoding) -> None:
    encoded, lost = encode(STATE, kind, {})
    assert layout(encoded) == encoded_layout(layout(STATE), kind)
    check_encoded("site 'lyon'", encoded, layout(STATE), kind)
    back = decode(encoded, kind)
    assert layout(back) == layout(STATE)
    assert back["seen"] == STATE["seen"]
    assert set(lost) == (set() if kind == "float32" else STATE.keys() - {"seen"})
    if kind == "float32":
        assert state_hash(back) == state_hash(STATE)


@pytest.mark.parametrize(("kind", "bound"), [("bfloat16", 2**-8), ("int8", 0.5 / 127 * (1 + 1e-6))])
def test_what_is_lost_is_at_most_half_a_step(kind: Encoding, bound: float) -> None:
    values = (DRAW.normal(size=40 * BLOCK) * np.exp(DRAW.normal(size=40 * BLOCK))).astype(np.float32)
    _, lost = one(values, kind)
    reach = np.abs(values).astype(np.float64)
    if kind == "int8":
        reach = np.repeat(reach.reshape(-1, BLOCK).max(1), BLOCK)
    assert (np.abs(lost) <= bound * reach).all()


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_what_is_decoded_adds_up_to_what_was_sent_less_the_last_residual(kind: Encoding) -> None:
    sent, came, residual = np.zeros(1000), np.zeros(1000), State()
    for _ in range(50):
        delta = DRAW.normal(size=1000).astype(np.float32)
        encoded, residual = encode({"w": delta}, kind, residual)
        sent, came = sent + delta, came + decode(encoded, kind)["w"]
    np.testing.assert_allclose(came + residual["w"], sent, atol=50 * 2**-22)
    assert np.abs(residual["w"]).max() < 0.05


def test_without_the_residual_what_is_small_never_arrives() -> None:
    delta = {"w": np.array([1.0, 0.003], np.float32)}
    forgetful, faithful, residual = 0.0, 0.0, State()
    for _ in range(100):
        forgetful += float(decode(encode(delta, "int8", {})[0], "int8")["w"][1])
        encoded, residual = encode(delta, "int8", residual)
        faithful += float(decode(encoded, "int8")["w"][1])
    assert forgetful == 0.0
    assert faithful == pytest.approx(0.3, abs=0.5 / 127)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_cross(kind: Encoding, value: float) -> None:
    with pytest.raises(UpdateError, match=f"tensor 'w' holds NaN, infinity or a number too large for {kind}"):
        one(np.array([1.0, value], np.float32), kind)


def test_the_largest_float_is_too_large_for_bfloat16() -> None:
    with pytest.raises(UpdateError, match="too large for bfloat16"):
        one(np.array(np.finfo(np.float32).max), "bfloat16")


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_part_of_a_tensor_decodes_as_it_does_in_the_whole(kind: Encoding) -> None:
    encoded, _ = encode({"w": STATE["kernel"]}, kind, {})
    whole, row = decode(encoded, kind)["w"], 3 * 5 * 11
    for low in range(7):
        for high in range(low, 8):
            part = {**encoded, "w": encoded["w"][low:high]}
            assert np.array_equal(decode_one(part.__getitem__, "w", kind, low * row), whole[low:high])


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("int8", {"w": np.zeros(300, np.float32)}, r"tensor 'w' is float32\[300\], expected int8\[300\]"),
        ("int8", {f"w{SCALES}": np.ones(3, np.float32)}, r"'w:scales' is float32\[3\], expected float32\[2\]"),
        ("int8", {f"w{SCALES}": np.array([1, np.inf], np.float32)}, "'w:scales' holds NaN or infinity"),
        ("int8", {f"w{SCALES}": np.full(2, 3e38, np.float32)}, "'w:scales' has a root mean square of"),
        ("int8", {"v": np.zeros(1, np.int8)}, "has 1 tensors too many"),
        ("bfloat16", {"w": np.full(300, 0x7F80, np.uint16)}, "'w' holds NaN or infinity"),
        ("bfloat16", {"w": np.zeros(300, np.int8)}, r"tensor 'w' is int8\[300\], expected uint16\[300\]"),
    ],
)
def test_encoded_arrays_that_do_not_fit_are_refused_by_name(kind: Encoding, change: State, words: str) -> None:
    values = {"w": np.linspace(-3, 3, 300, dtype=np.float32)}
    encoded, _ = encode(values, kind, {})
    with pytest.raises(UpdateError, match=words):
        check_encoded("site 'lyon'", encoded | change, layout(values), kind)


def test_a_residual_is_kept_beside_what_else_a_memory_holds() -> None:
    lost, moments = {"w": np.ones(2, np.float32)}, {"exp_avg.w": np.zeros(2, np.float32)}
    assert kept(moments | keep(lost)) == (lost, moments)


SMOOTH = {"w": np.linspace(0, 1, 4096, dtype=np.float32)}
BOUNDS = layout(SMOOTH)


def test_what_compresses_is_compressed_and_what_does_not_is_left_alone() -> None:
    block = pack(SMOOTH, {"round": 1})
    assert len(compress(block)) < 0.95 * len(block)
    assert compress(block) == compress(block)
    assert inflate(compress(block), BOUNDS, "float32", "it") == block
    noise = pack({"w": np.random.default_rng(2).integers(0, 256, 4096, dtype=np.uint8)}, {})
    assert compress(noise) is noise
    assert inflate(noise, BOUNDS, "float32", "it") is noise


def bomb(says: bool) -> bytes:
    """Return a frame of 300 megabytes of zeros, which may say its size."""
    size = 300 * 2**20
    packer = zstandard.ZstdCompressor().compressobj(size=size if says else -1)
    return b"".join([packer.compress(bytes(2**20)) for _ in range(300)]) + packer.flush()


@pytest.mark.parametrize("says", [True, False])
def test_a_zip_bomb_is_refused_before_it_is_inflated(says: bool) -> None:
    block = bomb(says)
    assert len(block) < 50_000
    tracemalloc.start()
    with pytest.raises(UpdateError, match="expected at most" if says else "cannot be decompressed"):
        inflate(block, BOUNDS, "int8", "site 'lyon': its update")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_zstandards_own_limit_does_not_hold_for_a_frame_that_says_its_size() -> None:
    """Why `inflate` asks the frame first."""
    block = zstandard.ZstdCompressor().compress(bytes(2**20))
    assert len(zstandard.ZstdDecompressor().decompress(block, max_output_size=10)) == 2**20


@pytest.mark.parametrize("saves", [True, False])
def test_a_file_crosses_as_its_bytes_would(saves: bool, tmp_path: Path) -> None:
    noise = DRAW.integers(0, 256, 5 * 2**20, np.uint8)
    block = pack({"w": noise // 64 if saves else noise}, {})
    (tmp_path / "file").write_bytes(block)
    packed = compressed_file(tmp_path / "file")
    assert (len(packed) < len(block)) is saves
    assert inflate(packed, {"w": ((5 * 2**20,), "uint8")}, "float32", "it") == block


def test_a_frame_that_says_too_little_and_one_with_more_behind_it_are_refused() -> None:
    block = compress(pack(SMOOTH, {}))
    size = zstandard.frame_content_size(block)
    place = block.index((size - 256).to_bytes(2, "little"))  # RFC 8878, 3.1.1.1.4: two bytes hold the size less 256
    liar = block[:place] + (size - 256 - 100).to_bytes(2, "little") + block[place + 2 :]
    assert zstandard.frame_content_size(liar) == size - 100
    for wrong in (liar, block + block):
        with pytest.raises(UpdateError, match="cannot be decompressed"):
            inflate(wrong, BOUNDS, "float32", "it")


@given(st.integers(min_value=4, max_value=len(compress(pack(SMOOTH, {}))) - 1))
def test_a_frame_cut_anywhere_is_refused(length: int) -> None:
    with pytest.raises(UpdateError, match="cut or altered"):
        inflate(compress(pack(SMOOTH, {}))[:length], BOUNDS, "float32", "it")


def test_a_block_is_held_to_its_own_encodings_size() -> None:
    block = b"\0" * 1_500_000
    big = {"w": ((250_000,), "float32")}
    assert inflate(block, big, "float32", "it") is block
    with pytest.raises(UpdateError, match="it has 1500000 bytes, expected at most 1253908"):
        inflate(block, big, "int8", "it")
