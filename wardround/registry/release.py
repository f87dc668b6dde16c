"""A release folder: the files that timm loads, and the hashes that vouch for them."""

import hashlib
import json
from pathlib import Path

from wardround.errors import CheckpointError
from wardround.registry.signing import MANIFEST, read_manifest

WEIGHTS, CONFIG, PROVENANCE = "model.safetensors", "config.json", "provenance.json"
Hashes = dict[str, str]  # file name, relative and with '/' -> SHA-256


def check(folder: Path) -> Hashes:
    """Return the hash of every file of a release, compared with those in its provenance and its manifest.

    Raises CheckpointError for a folder that timm could not load, or that was altered since it was written or signed.
    """
    hashes = file_hashes(folder)
    for name in (WEIGHTS, CONFIG):
        if name not in hashes:
            raise CheckpointError(f"{folder}: is no release: '{name}' is missing. Name the folder of a pulled model.")
    if PROVENANCE in hashes:
        compare(folder, hashes, _vouched(folder))
    if MANIFEST in hashes:
        compare(folder, hashes, read_manifest((folder / MANIFEST).read_bytes(), str(folder)).files)
    return hashes


def file_hashes(folder: Path) -> Hashes:
    """Return the SHA-256 of every file below a folder. Raises CheckpointError for what is no plain file."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is no folder. Name the folder of a pulled model.")
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path}: is a link or a device; a release holds plain files only. Remove it.")
        if path.is_file():
            with path.open("rb") as file:
                hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def compare(folder: Path, found: Hashes, expected: Hashes) -> None:
    """Raise CheckpointError unless every expected file is there with its hash."""
    for name, wanted in expected.items():
        if found.get(name) != wanted:
            state = "is missing" if name not in found else "differs from the hash recorded with it"
            raise CheckpointError(f"{folder}: '{name}' {state}; the release was cut or altered. Pull it again.")


def signer(folder: Path) -> str | None:
    """Return the fingerprint of who signed a release that `check` has passed, or None."""
    path = folder / MANIFEST
    return read_manifest(path.read_bytes(), str(folder)).by if path.exists() else None


def is_stock(folder: Path) -> bool:
    """Return whether stock timm loads a release, as its provenance says; one without any was written by timm."""
    path = folder / PROVENANCE
    return not path.exists() or bool(json.loads(path.read_bytes()).get("stock_timm", True))


def digest(hashes: Hashes) -> str:
    """Return one SHA-256 for a whole release, whatever the order of its files."""
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _vouched(folder: Path) -> Hashes:
    """Return the hashes in a release's provenance: none where it was written by hand without them."""
    try:
        vouched = json.loads((folder / PROVENANCE).read_bytes()).get("sha256", {})
        return {str(name): str(value) for name, value in vouched.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: '{PROVENANCE}' cannot be read; the release was cut or altered.") from error
