"""One open round on disk: who was asked, what has come in, and who counts.

The decision to close is written before anything is folded, so a server that is killed between the
two folds the same updates again.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from wardround.encoding import SCALES, decode_one
from wardround.errors import CheckpointError
from wardround.registry.durable import write_file
from wardround.registry.tensors import TensorFile
from wardround.server.aggregate import Read
from wardround.update import Array, Declared, Refusal

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Closed:
    """The persisted decision about a round."""

    updates: dict[str, str]  # site -> SHA-256 of its spooled update
    declared: dict[str, Declared]
    refused: dict[str, str]  # site -> code and reason
    bytes: int  # of the updates as they crossed
    sent: int  # bytes of the tasks' states, by the process that closed
    ledgers: dict[str, str]  # site -> LENGTH:HASH of its ledger, also of those whose update is refused
    rounds: dict[str, int]  # site -> the round that its update was asked in; with a buffer, that may be an earlier one
    training: dict[str, int] = field(default_factory=dict)  # site -> the round of what it was asked and still works on
    dropped: dict[str, int] = field(default_factory=dict)  # site -> the round of an update that came too late to count
    received: dict[str, int] = field(default_factory=dict)  # site -> bytes of its update as it crossed


class Spool:
    """A round's folder while the round is open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hashes: dict[str, str] = {}  # site -> SHA-256 of what this process has kept

    def cohort(self) -> dict[str, int] | None:
        """Return the sites that were asked, each with the round it was asked in; None where this one has not begun."""
        return self._read("cohort.json", lambda found: {site: int(number) for site, number in found.items()})

    def open(self, cohort: Mapping[str, int]) -> None:
        """Write down who is asked, and in which round: this one, or an earlier one that is not answered yet."""
        write_file(self.folder / "cohort.json", json.dumps(cohort).encode())

    def add(self, site: str, block: bytes) -> None:
        """Keep a checked update."""
        write_file(self._update(site), block)
        self._hashes[site] = hashlib.sha256(block).hexdigest()

    def arrived(self) -> list[str]:
        """Return the sites whose updates are here, by name."""
        return sorted(path.name.removesuffix(".safetensors") for path in self.folder.glob("updates/[!.]*.safetensors"))

    def close(
        self,
        refused: Mapping[str, Refusal],
        ledgers: Mapping[str, str],
        received: Mapping[str, int],
        sent: int,
        training: Mapping[str, int] | None = None,
        dropped: Mapping[str, int] | None = None,
    ) -> Closed:
        """Decide, on disk, that what has arrived counts and nothing after it does.

        `ledgers` are the heads that came with refused updates; `received` and `sent` are bytes as they crossed.
        """
        declared, hashes, rounds, sizes = {}, {}, {}, {}
        for site in self.arrived():
            path = self._update(site)
            header = TensorFile(path).header
            declared[site], rounds[site] = Declared(**header["declared"]), header["round"]
            hashes[site] = self._hashes.get(site) or _hash(path)
            sizes[site] = received.get(site, path.stat().st_size)  # what came before a restart counts by its size here
        reasons = {site: f"{refusal.code}: {refusal.text}" for site, refusal in refused.items() if site not in hashes}
        heads = {**ledgers, **{site: value.ledger for site, value in declared.items() if value.ledger is not None}}
        size, still, late = sum(sizes.values()), dict(training or {}), dict(dropped or {})
        closed = Closed(hashes, declared, reasons, size, sent, heads, rounds, still, late, sizes)
        write_file(self.folder / "closed.json", json.dumps(asdict(closed), indent=2, sort_keys=True).encode())
        return closed

    def closed(self) -> Closed | None:
        """Return the decision, or None while the round is open."""
        return self._read("closed.json", _closed)

    @contextmanager
    def reader(self, closed: Closed) -> Iterator[Read]:
        """Give a function that reads and decodes one tensor of one site's delta, after checking every update's hash.

        With a part, it reads no more of the tensor than that.
        """
        files: dict[str, TensorFile] = {}
        for site, sha in closed.updates.items():
            path = self._update(site)
            if not path.exists() or _hash(path) != sha:
                raise CheckpointError(
                    f"{path}: differs from what closed.json names; the round cannot be folded as decided. "
                    "Restore the file, or remove the round's folder to train it again."
                )
            files[site] = TensorFile(path)

        yield partial(_read, files)

    def drop_updates(self) -> None:
        """Delete the updates of a committed round: nobody needs a single site's delta any more."""
        shutil.rmtree(self.folder / "updates", ignore_errors=True)

    def _update(self, site: str) -> Path:
        return self.folder / "updates" / f"{site}.safetensors"

    def _read(self, name: str, made: Callable[[Any], Kept]) -> Kept | None:
        """Return what is made of a JSON file; None where there is none. Raises CheckpointError where it is damaged."""
        path = self.folder / name
        try:
            return made(json.loads(path.read_bytes())) if path.exists() else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: cannot be read; it is damaged. Restore it from a copy, or remove the round's folder to train "
                "it again."
            ) from error


def _closed(found: dict[str, Any]) -> Closed:
    return Closed(**found | {"declared": {site: Declared(**one) for site, one in found["declared"].items()}})


def _read(files: Mapping[str, TensorFile], site: str, name: str, *part: slice) -> Array:
    """Return a tensor of a site's delta, or part of its first axis."""
    file = files[site]
    first = (part[0].start or 0) * math.prod(file.layout_of(name)[0][1:]) if part else 0

    def get(key: str) -> Array:
        return file[key] if key.endswith(SCALES) else file.read(key, *part)  # all scales: a sixty-fourth of their codes

    return decode_one(get, name, file.header.get("encoding", "float32"), first)


def _hash(path: Path) -> str:
    """Return a file's SHA-256, without reading it into memory at once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
