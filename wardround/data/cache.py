"""The decode-once cache of one site: what is known of every file, and its images as bytes.

Below `work/cache/SOFTWARE-SETTINGS/`:

    index.jsonl   a line for each thing learnt: a journal while files are read, rewritten whole at the end
    rows-N.npy    [rows, C, S, S] or [rows, C, S, S, S] uint8 in content order: what training maps into memory
    fresh.bin     rows decoded since, of the same shape, each block with a checksum in the journal

The rename of index.jsonl is the commit: it names its rows-N.npy. A crash leaves the state before it or
after it, and what fresh.bin holds whole by then is not decoded again.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

Rows = NDArray[np.uint8]
Sample = tuple[str, int]  # content key (SHA-256 of the file, or of a series' keys), number of the frame or cube

_COPIED = 2**26  # bytes of rows copied at a time


@dataclass(frozen=True)
class Entry:
    """What is known of one content. It holds no identifier: `patient` is a keyed hash."""

    frames: int = 0
    channels: int = 0
    patient: str = ""
    modality: str = ""
    side: int = 0  # the shorter one of its frames, in pixels
    burnt: bool = False  # whether its header says that text is burnt into its pixels
    series: str = ""  # a keyed hash too; volumes: the slices that share it are one
    reason: str = ""  # why it is quarantined
    excluded: str = ""  # the criterion it does not meet
    blank: tuple[int, ...] = ()  # frames whose pixels are all alike
    kept: tuple[int, ...] = ()  # frames with a row in rows-N.npy, where they follow each other

    def __post_init__(self) -> None:
        object.__setattr__(self, "blank", tuple(self.blank))  # JSON gives lists
        object.__setattr__(self, "kept", tuple(self.kept))


@dataclass(frozen=True)
class Seen:
    """The state of a file when its content was hashed."""

    size: int
    mtime_ns: int
    key: str


class Cache:
    """One folder of the cache. Whoever opens it holds the lock (see `opened_cache`)."""

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.folder, self.shape = folder, shape
        self.entries: dict[str, Entry] = {}  # by content key
        self.seen: dict[str, Seen] = {}  # by the keyed hash of the file's path, which may name a patient
        self._fresh: dict[Sample, int] = {}  # row in fresh.bin
        self._rows = ""  # file name of the committed rows
        self._load()

    def learn(self, key: str, entry: Entry) -> None:
        """Remember what a content is, at once and across a crash."""
        self.entries[key] = entry
        self._append({"entry": key, **asdict(entry)})

    def see(self, file: str, seen: Seen) -> None:
        """Remember which content a file had, so that it is not read again while it stays as it is."""
        self.seen[file] = seen
        self._append({"seen": file, **asdict(seen)})

    def add(self, key: str, numbers: Sequence[int], rows: Rows) -> None:
        """Store the rows [F, C, S, S] or [F, C, S, S, S] of one content's frames."""
        block = rows.tobytes()
        with private(self.folder / "fresh.bin", "ab") as file:
            first = file.tell() // self._row_bytes
            file.write(block)
        line = {"fresh": key, "numbers": list(numbers), "first": first, "crc": zlib.crc32(block)}
        self._fresh.update({(key, number): first + place for place, number in enumerate(numbers)})
        self._append(line)

    def has(self, sample: Sample) -> bool:
        """Return whether a sample is decoded."""
        return sample in self._fresh or sample[1] in self.entries[sample[0]].kept

    def commit(self, order: Sequence[Sample], files: Iterable[str], units: Iterable[str] = ()) -> Rows:
        """Make these sorted samples the rows of the cache and forget all others; return them, memory-mapped.

        `files` are the hashed paths that exist, `units` the keys of series made of them. Costs a copy of
        all rows where one is added or dropped.
        """
        kept: dict[str, tuple[int, ...]] = {}
        for key, number in order:
            kept[key] = (*kept.get(key, ()), number)
        seen = {file: self.seen[file] for file in files}
        known = {one.key for one in seen.values()} | set(units)
        entries = {key: replace(e, kept=kept.get(key, ())) for key, e in self.entries.items() if key in known}
        if (entries, seen) != (self.entries, self.seen) or self._fresh or not self._rows:
            if not self._rows or kept != {key: e.kept for key, e in self.entries.items() if e.kept}:
                self._rows = self._write_rows(order)
            self.entries, self.seen, self._fresh = entries, seen, {}
            self._rewrite()
            self._sweep()
        return self._mapped()

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self.shape))

    def _load(self) -> None:
        """Take up what the journal says, up to the first line that a crash cut, and cut it there."""
        path = self.folder / "index.jsonl"
        whole = fresh_end = 0
        with private(path, "ab+") as file:
            file.seek(0)
            for text in file:
                line = _parsed(text)
                if line is None:
                    break
                fresh_end = max(fresh_end, self._take(line))
                whole += len(text)
            file.truncate(whole)
        with private(self.folder / "fresh.bin", "ab") as file:
            file.truncate(fresh_end * self._row_bytes)
        if not self._rows_are_whole():
            self._rows = ""
            self.entries = {key: replace(entry, kept=()) for key, entry in self.entries.items()}
        self._sweep()

    def _take(self, line: dict[str, Any]) -> int:
        """Take one line of the journal; return the row of fresh.bin at which its block ends, 0 for other lines."""
        match line:
            case {"rows": name}:
                self._rows = name
            case {"entry": key, **fields}:
                self.entries[key] = Entry(**fields)
            case {"seen": file, **fields}:
                self.seen[file] = Seen(**fields)
            case {"fresh": key, "numbers": numbers, "first": first, "crc": crc}:
                block = self._fresh_rows()[first : first + len(numbers)]
                if len(block) == len(numbers) and zlib.crc32(block.tobytes()) == crc:
                    self._fresh.update({(key, number): first + place for place, number in enumerate(numbers)})
                    return int(first + len(numbers))
        return 0

    def _rows_are_whole(self) -> bool:
        """Return whether the committed rows are there, as many as the entries say."""
        try:
            return self._rows != "" and len(self._mapped()) == sum(len(entry.kept) for entry in self.entries.values())
        except (OSError, ValueError):
            return False

    def _mapped(self) -> Rows:
        """Return the committed rows, memory-mapped."""
        mapped: Rows = np.load(self.folder / self._rows, mmap_mode="r")
        return mapped

    def _fresh_rows(self) -> Rows:
        """Return what fresh.bin holds in whole rows, memory-mapped."""
        path = self.folder / "fresh.bin"
        count = path.stat().st_size // self._row_bytes if path.exists() else 0
        return np.memmap(path, np.uint8, "r", shape=(count, *self.shape)) if count else np.empty((0, *self.shape), "u1")

    def _write_rows(self, order: Sequence[Sample]) -> str:
        """Write the next rows-N.npy; return its name."""
        name = f"rows-{int(self._rows[5:-4]) + 1 if self._rows else 1}.npy"
        with private(self.folder / name, "wb") as file:
            shape = (len(order), *self.shape)
            npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for block in self._blocks(order):  # written, not mapped: a full disk is then an error, not a SIGBUS
                file.write(block.tobytes())
            file.flush()
            os.fsync(file.fileno())
        return name

    def _blocks(self, order: Sequence[Sample]) -> Iterator[Rows]:
        """Yield rows in order, some at a time, from where each one lies now."""
        committed = self._mapped() if self._rows else None
        samples = ((key, number) for key in sorted(self.entries) for number in self.entries[key].kept)
        place = {sample: row for row, sample in enumerate(samples)}
        fresh = self._fresh_rows()
        count = max(1, _COPIED // self._row_bytes)
        for start in range(0, len(order), count):
            block = []
            for sample in order[start : start + count]:
                if sample in self._fresh:
                    block.append(fresh[self._fresh[sample]])
                else:
                    assert committed is not None
                    block.append(committed[place[sample]])
            yield np.stack(block)

    def _append(self, line: dict[str, Any]) -> None:
        with private(self.folder / "index.jsonl", "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")

    def _rewrite(self) -> None:
        """Replace the journal by what it amounts to: the commit."""
        lines: list[dict[str, Any]] = [{"rows": self._rows}]
        lines += [{"entry": key, **asdict(entry)} for key, entry in sorted(self.entries.items())]
        lines += [{"seen": file, **asdict(seen)} for file, seen in sorted(self.seen.items())]
        aside = self.folder / "index.partial"
        with private(aside, "wb") as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.folder / "index.jsonl")

    def _sweep(self) -> None:
        """Delete what no line of the journal names."""
        for path in self.folder.iterdir():
            stale = path.name.startswith("rows-") and path.name != self._rows
            if stale or path.name == "index.partial" or (path.name == "fresh.bin" and not self._fresh):
                path.unlink()


def private(path: Path, mode: str) -> IO[bytes]:
    """Open a file that only the site's own user can read, from the moment it exists."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))


def _parsed(text: bytes) -> dict[str, Any] | None:
    """Return a line of the journal, or None where a crash cut it."""
    try:
        line = json.loads(text) if text.endswith(b"\n") else None
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
