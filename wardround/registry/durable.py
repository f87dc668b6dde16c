"""Writing so that a power cut leaves either the old file or the new one, never a part of it."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wardround.errors import CheckpointError
from wardround.update import State, pack_file

# Of the disk or a limit on it; whatever else there is lies in the place that was named.
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def write_file(path: Path, block: bytes) -> None:
    """Write a file aside, fsync it and rename it into place. Raises CheckpointError where the disk refuses."""
    with new_file(path) as aside:
        aside.write_bytes(block)


def write_tensors(path: Path, tensors: State, header: Mapping[str, Any] | None = None) -> None:
    """Write arrays and a JSON header as `write_file` does, without a second copy of them in memory."""
    with new_file(path) as aside:
        pack_file(aside, tensors, header or {})


def private_folder(path: Path) -> None:
    """Make a folder that no other account enters, mode 0700; one that is there stays as it is."""
    with _disk_errors(path):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give an empty file to write into, mode 0600; leaving the block fsyncs it and renames it to `path`."""
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            yield Path(name)
            sync(Path(name))  # by its name: safetensors puts a file of its own in the place of this one
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Give a folder to write into; leaving the block renames it to `path`: that rename is the commit.

    After an error or Ctrl-C nothing is left of it; what a crash left half-written is removed by the next try.
    `replace` puts it in the place of a folder that is there, which until then stays; a crash between the two renames
    leaves it aside, and the next try puts it back first.
    """
    aside, former = (path.with_name(f".{path.name}.{what}") for what in ("partial", "former"))
    with _disk_errors(path):
        _put_back(path, former)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
            sync(aside)
            if replace and path.exists():
                path.rename(former)  # no folder is renamed over one that holds files
            aside.rename(path)
        except BaseException:
            _put_back(path, former)
            shutil.rmtree(aside, ignore_errors=True)
            raise
        sync(path.parent)
        shutil.rmtree(former, ignore_errors=True)


def _put_back(path: Path, former: Path) -> None:
    """Undo a replacement that was cut in the middle; remove what was replaced, where it was not."""
    if former.exists() and not path.exists():
        former.rename(path)
    shutil.rmtree(former, ignore_errors=True)


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "Name another place."
        if error.errno in _OF_THE_DISK:
            remedy = "Nothing committed is lost; mend the disk and start the same command again."
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}. {remedy}") from error
