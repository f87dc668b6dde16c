"""What crosses, smaller: numbers as bfloat16 or int8, what that loses kept for the next time, and zstd.

A sender encodes delta + residual and keeps what the receiver then lacks as its next residual: error
feedback, by which what the receiver has added up stays within one residual of the true sum (Seide et
al. 2014, "1-bit SGD"; Karimireddy et al. 2019, arXiv:1901.09847, algorithm 1). Float32 tensors alone
are encoded; any other dtype, such as a count, crosses exactly.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import zstandard
from numpy.typing import NDArray

from wardround.config.federation import Encoding
from wardround.errors import UpdateError
from wardround.update import Array, Layout, State, check_tensors

BLOCK = 256  # values that share a scale, which makes 1.6 % more bytes than the codes alone
SCALES = ":scales"  # after a tensor's name: its int8 scales, float32 [values / BLOCK, rounded up]
_RESIDUAL = "residual."  # before the names of what was lost, in the site memory and in a checkpoint
_HEADERS = 1_000_000  # bytes: generous for names and shapes
_PIECE = 2**20  # bytes of a file at a time

Floats = NDArray[np.float32]


def encode(tensors: Mapping[str, Array], kind: Encoding, residual: Mapping[str, Array]) -> tuple[State, State]:
    """Return the encoded arrays of tensors plus residual, and the next residual; a missing residual is zero.

    bfloat16: uint16, the upper half of a float32, rounded to nearest, ties to even. int8: codes and scales,
    see `_to_int8`. float32: the tensors as they are, and no residual. Raises UpdateError where NaN,
    infinity or a number too large would be lost.

    >>> encoded, lost = encode({"w": np.array([1.0, 0.3], np.float32)}, "int8", {})
    >>> encoded["w"], lost["w"].round(4)
    (array([127,  38], dtype=int8), array([0.    , 0.0008], dtype=float32))
    """
    encoded: State = {}
    lost: State = {}
    for name, array in tensors.items():
        if kind == "float32" or array.dtype != np.float32:
            encoded[name] = array
            continue
        wanted = np.asarray(array + residual[name] if name in residual else array)  # a sum of 0-d is no array
        with np.errstate(all="ignore"):  # what is too large, or NaN, shows in what is lost
            encoded |= {f"{name}{part}": values for part, values in _TO[kind](wanted).items()}
            lost[name] = np.asarray(wanted - decode_one(encoded.__getitem__, name, kind))
        if not np.isfinite(lost[name]).all():
            raise UpdateError(f"tensor '{name}' holds NaN, infinity or a number too large for {kind}; it cannot cross.")
    return encoded, lost


def decode(encoded: Mapping[str, Array], kind: Encoding) -> State:
    """Return the tensors that `encode` gave these arrays for."""
    return {name: decode_one(encoded.__getitem__, name, kind) for name in encoded if not name.endswith(SCALES)}


def decode_one(get: Callable[[str], Array], name: str, kind: Encoding, first: int = 0) -> Array:
    """Return one tensor; `get` gives an encoded array by name.

    Where `get` gives a part of the tensor, `first` is the place of its first value in the whole one.
    """
    array = get(name)
    if kind == "bfloat16" and array.dtype == np.uint16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "int8" and array.dtype == np.int8:
        return np.asarray(array * _spread(get(f"{name}{SCALES}"), array.size, first).reshape(array.shape))
    return array


def stepped(state: State, encoded: Mapping[str, Array], kind: Encoding) -> State:
    """Return a state plus an encoded step: the same bits at the server and at every site."""
    return {name: np.asarray(old + decode_one(encoded.__getitem__, name, kind)) for name, old in state.items()}


def encoded_layout(layout: Layout, kind: Encoding) -> Layout:
    """Return names, shapes and dtypes of a layout's encoded arrays.

    >>> encoded_layout({"w": ((2, 200), "float32"), "seen": ((), "int64")}, "int8")
    {'w': ((2, 200), 'int8'), 'w:scales': ((2,), 'float32'), 'seen': ((), 'int64')}
    """
    found: Layout = {}
    for name, (shape, dtype) in layout.items():
        if dtype != "float32" or kind == "float32":
            found[name] = (shape, dtype)
        elif kind == "bfloat16":
            found[name] = (shape, "uint16")
        else:
            found[name] = (shape, "int8")
            found[f"{name}{SCALES}"] = ((-(-math.prod(shape) // BLOCK),), "float32")
    return found


def check_encoded(who: str, encoded: Mapping[str, Array], layout: Layout, kind: Encoding) -> None:
    """Raise UpdateError unless the arrays are those of a layout, so encoded, and decode to finite numbers."""
    check_tensors(who, encoded, encoded_layout(layout, kind))
    for name in layout if kind != "float32" else ():  # one at a time: all of a ViT-B are 344 MB
        with np.errstate(all="ignore"):
            decoded = decode_one(encoded.__getitem__, name, kind)
        check_tensors(who, {name: decoded}, {name: layout[name]})


def keep(lost: Mapping[str, Array]) -> State:
    """Return a residual under the names that it is kept by."""
    return {f"{_RESIDUAL}{name}": array for name, array in lost.items()}


def kept(memory: Mapping[str, Array]) -> tuple[State, State]:
    """Return the residual that is kept in a memory, and what else is there."""
    residual = {name.removeprefix(_RESIDUAL): a for name, a in memory.items() if name.startswith(_RESIDUAL)}
    return residual, {name: array for name, array in memory.items() if not name.startswith(_RESIDUAL)}


def residual_layout(layout: Layout) -> Layout:
    """Return the layout of what `keep` returns of a layout's residual."""
    return {f"{_RESIDUAL}{name}": place for name, place in layout.items() if place[1] == "float32"}


def residual_of(memory: Mapping[str, Array], name: str) -> State:
    """Return one tensor's residual, where it is kept in a memory."""
    found = f"{_RESIDUAL}{name}"
    return {name: memory[found]} if found in memory else {}


def compress(block: bytes) -> bytes:
    """Return the bytes that cross for a block: zstd's fastest where that saves over 5 %, else the block itself."""
    packed = zstandard.ZstdCompressor(level=1).compress(block)
    return packed if len(packed) < 0.95 * len(block) else block


def compressed_file(path: Path) -> bytes:
    """Return what `compress` returns for a file's bytes, which then are in memory once."""
    size, packed = path.stat().st_size, bytearray()
    with path.open("rb") as file:
        stream = zstandard.ZstdCompressor(level=1).read_to_iter(file, size=size, read_size=_PIECE)
        for piece in stream:
            packed += piece
            if len(packed) >= 0.95 * size:
                return path.read_bytes()
    return bytes(packed)


def inflate(block: bytes, layout: Layout, kind: Encoding, who: str) -> bytes:
    """Return what `compress` was given. Raises UpdateError, before anything is inflated, for more than a layout takes.

    A block that begins with no zstd frame is its own content: the length that safetensors begins with
    would be above four gigabytes of header.
    """
    arrays = encoded_layout(layout, kind).values()
    limit = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays) + _HEADERS
    packed = block.startswith(zstandard.FRAME_HEADER)
    try:
        size = zstandard.frame_content_size(block) if packed else len(block)
        if size > limit:
            raise UpdateError(f"{who} has {size} bytes, expected at most {limit}.")
        # Of a frame that says its size, no more is inflated; without max_output_size, one that does not is an error.
        return zstandard.ZstdDecompressor().decompress(block, allow_extra_data=False) if packed else block
    except zstandard.ZstdError as error:
        raise UpdateError(f"{who} cannot be decompressed; it was cut or altered.") from error


def _to_bfloat16(values: Floats) -> State:
    bits = values.view(np.uint32)
    odd = bits >> np.uint32(16) & np.uint32(1)
    return {"": ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)}


def _to_int8(values: Floats) -> State:
    """Return codes from -127 to 127 in the tensor's shape, and a scale for every BLOCK values in memory order.

    A block's scale is its largest magnitude over 127; where that is zero, all its codes are.
    """
    flat = values.reshape(-1)
    lacking = np.zeros(-flat.size % BLOCK, flat.dtype)
    blocks = (np.append(flat, lacking) if lacking.size else flat).reshape(-1, BLOCK)
    work = np.abs(blocks)
    scales = work.max(axis=1) / np.float32(127)
    # In the one buffer: a pass over memory costs as much as the arithmetic in it.
    np.divide(blocks, np.where(scales > 0, scales, np.float32(1))[:, None], out=work)
    np.rint(work, out=work)
    # Below the normal numbers a scale has so few digits that a code could pass 127.
    np.clip(work, -127, 127, out=work)
    return {"": work.astype(np.int8).reshape(-1)[: flat.size].reshape(values.shape), SCALES: scales}


def _spread(scales: Floats, size: int, first: int = 0) -> Floats:
    """Return the scale of each of `size` values from the place `first` on."""
    start = first // BLOCK
    blocks = scales[start : -(-(first + size) // BLOCK)]
    return np.repeat(blocks, BLOCK)[first - start * BLOCK :][:size]


_TO: dict[str, Callable[[Floats], State]] = {"bfloat16": _to_bfloat16, "int8": _to_int8}
