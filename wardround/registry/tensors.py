"""Safetensors files that are read and written tensor by tensor, so that a whole one is never in memory.

They are read, not mapped: what is mapped counts as a process's memory until the kernel takes it back.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from wardround.errors import UpdateError
from wardround.update import META, Array, Layout

# Safetensors' names of numpy's types, in the order in which it places tensors in a file.
_NAMES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "float32": "F32", "uint32": "U32", "int32": "I32",
    "float16": "F16", "uint16": "U16", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_TYPES = {theirs: ours for ours, theirs in _NAMES.items()}
_ORDER = list(_NAMES)
_PIECE = 2**20  # bytes of a file at a time


class Place(NamedTuple):
    """Where a tensor lies."""

    shape: tuple[int, ...]
    dtype: str
    first: int  # byte, counted from the end of the file's header


class TensorFile(Mapping[str, Array]):
    """The tensors of a file, each read when it is asked for, and the file's own JSON header."""

    def __init__(self, path: Path) -> None:
        """Read a file's header. Raises OSError where it cannot be read, UpdateError where it is no such file.

        What the header says of the tensors is believed: a file from outside is checked before it is kept.
        """
        self.path = path
        with path.open("rb") as file:
            try:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > path.stat().st_size:
                    raise ValueError
                found = json.loads(file.read(length))
                self.header: dict[str, Any] = json.loads(found.pop("__metadata__")[META])
                self._places = _places(json.dumps(found))
            except (struct.error, KeyError, TypeError, ValueError) as error:
                raise UpdateError(f"{path.name} is no whole update or state; it was cut or altered.") from error
        self._start = 8 + length

    @property
    def layout(self) -> Layout:
        """The shape and dtype of every tensor, without reading it."""
        return {name: (place.shape, place.dtype) for name, place in self._places.items()}

    def layout_of(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return a tensor's shape and dtype, without reading it."""
        return self._places[name][:2]

    def read(self, name: str, part: slice | None = None) -> Array:
        """Return a tensor, or those rows of its first axis."""
        shape, dtype, first = self._places[name]
        if part is not None:
            row = math.prod(shape[1:]) * np.dtype(dtype).itemsize
            begin, end, _ = part.indices(shape[0])
            shape, first = (end - begin, *shape[1:]), first + begin * row
        return np.fromfile(self.path, dtype, math.prod(shape), offset=self._start + first).reshape(shape)

    def __getitem__(self, name: str) -> Array:
        """Return a tensor. Raises KeyError where there is none of that name."""
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        """Return the names of the tensors."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(self._places)


@lru_cache(maxsize=8)  # a thousand sites' updates lie alike
def _places(header: str) -> dict[str, Place]:
    return {
        name: Place(tuple(found["shape"]), _TYPES[found["dtype"]], found["data_offsets"][0])
        for name, found in json.loads(header).items()
    }


class TensorWriter:
    """A new file, mode 0600, whose tensors come in any order; its bytes are those of `update.pack`.

    Leaving the block fsyncs it; its SHA-256 is known then. Raises OSError where the disk refuses.
    """

    def __init__(self, path: Path, layout: Layout, header: Mapping[str, Any] | None = None) -> None:
        """Begin a file of tensors of this layout, and a JSON header."""
        said: dict[str, Any] = {"__metadata__": {META: json.dumps(header or {}, sort_keys=True)}}
        self._left, first = dict[str, Place](), 0
        for name in sorted(layout, key=lambda name: (_ORDER.index(layout[name][1]), name)):
            shape, dtype = layout[name]
            end = first + math.prod(shape) * np.dtype(dtype).itemsize
            said[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [first, end]}
            self._left[name], first = Place(shape, dtype, first), end
        text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._path, self._file = path, os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        self._sha, self._hashed = hashlib.sha256(), 0  # of what came in its place's order; bytes of tensors
        for block in (struct.pack("<Q", len(text)), text):
            self._file.write(block)
            self._sha.update(block)
        self._size = first

    def put(self, name: str, array: Array) -> None:
        """Write a tensor to its place."""
        place = self._left.pop(name)
        assert (tuple(array.shape), array.dtype.name) == place[:2], f"{name} is not what the layout says"
        block = np.asarray(array, order="C").data
        self._file.seek(self._start + place.first)
        self._file.write(block)
        if place.first == self._hashed:
            self._sha.update(block)
            self._hashed += block.nbytes

    def hexdigest(self) -> str:
        """Return the SHA-256 of the file, which is read for what did not come in the order in which it lies there."""
        if self._hashed < self._size:
            with self._path.open("rb") as file:
                file.seek(self._start + self._hashed)
                while piece := file.read(_PIECE):
                    self._sha.update(piece)
            self._hashed = self._size
        return self._sha.hexdigest()

    def __enter__(self) -> Self:
        """Give the file."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        """Fsync and close it; after an error, only close it."""
        with self._file:
            if kind is None:
                assert not self._left, f"{sorted(self._left)} are lacking"
                self._file.flush()
                os.fsync(self._file.fileno())
