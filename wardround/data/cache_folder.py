"""Where a site's cache lies: one folder for each set of reader settings, one process at a time."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from wardround.config.federation import DataConfig
from wardround.data.cache import Cache, private
from wardround.data.patients import keyed_hash

READER = 3  # raise it with every change to what pixels or facts come out of a file
_DECODERS = (
    "pydicom",
    "pillow",
    "nibabel",
    "monai",
    "pylibjpeg-libjpeg",
    "pylibjpeg-openjpeg",
    "pylibjpeg-rle",
    "pyjpegls",
)


@contextmanager
def opened_cache(work: Path, data: DataConfig, salt: bytes, opt_outs: frozenset[str]) -> Iterator[Cache]:
    """Yield the cache for these settings; waits while another process indexes into the same work folder.

    Folders that could hold an image of a patient who has since opted out are deleted, as are those of
    other decoders, for another codec can give other pixels, and of another salt, for its patients have other names.
    """
    root = work / "cache"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with private(root / "lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        software = _short([READER, keyed_hash(salt, "cache"), *(_version(name) for name in _DECODERS)])
        folder = root / f"{software}-{_short(_settings(data))}"
        current = _short(sorted(opt_outs))
        for other in root.iterdir():
            if other.is_dir() and other != folder and not _is_current(other, software, current):
                shutil.rmtree(other)
        folder.mkdir(mode=0o700, exist_ok=True)
        yield Cache(folder, data.shape)
        with private(folder / "opt-outs", "wb") as file:
            file.write(current.encode())


def _is_current(folder: Path, software: str, opt_outs: str) -> bool:
    """Return whether another settings' folder was made by these decoders under this opt-out list."""
    mark = folder / "opt-outs"
    return folder.name.startswith(f"{software}-") and mark.is_file() and mark.read_text() == opt_outs


def _settings(data: DataConfig) -> dict[str, object]:
    """Return the settings that change a header's verdict or a pixel."""
    settings = data.model_dump(mode="json", exclude={"mean", "std"})
    settings["criteria"].pop("max_images_per_patient")  # chosen from the rows, at every index
    return settings


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _short(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
