"""Whose release is it: the coordinator's ed25519 signature over the hash of every file.

    manifest.json   {"name", "files": {file: SHA-256}, "key": a line of OpenSSH, "signature"}

A signature by itself says that nothing was altered since somebody signed it. Who that was, a user knows by the
fingerprint that the coordinator read out, and pins it.
"""

import base64
import binascii
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_public_key,
)

from wardround.errors import CheckpointError, ConfigError
from wardround.registry.durable import write_file
from wardround.signatures import fingerprint
from wardround.update import printable

MANIFEST, KEY = "manifest.json", "release.key"
TRUST = "WARDROUND_TRUST"  # the environment's pinned fingerprints
_KIND = b"wardround release\n"  # what the signature is of
_PIN = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")


@dataclass(frozen=True)
class Signed:
    """What a manifest says, its signature verified."""

    name: str
    files: dict[str, str]
    by: str  # the key's fingerprint


def release_key(path: Path) -> Ed25519PrivateKey:
    """Return the key in a PEM file, made on the first call (mode 0600). Raises ConfigError for what is none."""
    if not path.exists():
        made = Ed25519PrivateKey.generate()
        write_file(path, made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return made
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path}: others can read it; 'chmod 600 {path}', and make another if they have.")
        found = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: is no unencrypted private key; put the original back.") from error
    if not isinstance(found, Ed25519PrivateKey):
        raise ConfigError(f"{path}: is a {type(found).__name__}, expected ed25519; put the original back.")
    return found


def kit_key(kit: Path) -> Ed25519PrivateKey:
    """Return the release key of a coordinator's folder. Raises ConfigError where it has none."""
    if not (kit / KEY).is_file():
        raise ConfigError(f"{kit}: has no {KEY}; 'wardround provision FEDERATION.toml' adds what a kit lacks.")
    return release_key(kit / KEY)


def write_manifest(folder: Path, name: str, files: dict[str, str], key: Ed25519PrivateKey) -> None:
    """Sign the hashes of a release's files, as the release of a name."""
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    said = {"name": name, "files": files, "key": line}
    signature = base64.b64encode(key.sign(_message(said))).decode()
    text = json.dumps({**said, "signature": signature}, indent=2, sort_keys=True)
    (folder / MANIFEST).write_text(f"{text}\n")


def read_manifest(block: bytes, where: str) -> Signed:
    """Return what a manifest says. Raises CheckpointError unless its own key has signed it."""
    try:
        said = json.loads(block)
        signature = base64.b64decode(said.pop("signature"), validate=True)
        key = load_ssh_public_key(said["key"].encode())
        if not isinstance(key, Ed25519PublicKey):
            raise ValueError("another kind of key")
        key.verify(signature, _message(said))
        files = {str(name): str(value) for name, value in said["files"].items()}
        return Signed(str(said["name"]), files, fingerprint(key))
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, UnsupportedAlgorithm) as error:
        raise CheckpointError(
            f"{where}: '{MANIFEST}' cannot be read; the release was altered. Pull it again."
        ) from error
    except InvalidSignature as error:
        raise CheckpointError(
            f"{where}: '{MANIFEST}' is not what its key signed; the release was altered. Pull it again."
        ) from error


def check(folder: Path, hashes: dict[str, str], name: str, trust: str | None = None, who: str = "") -> str | None:
    """Return the fingerprint of who signed the release of a name; None where nobody did and nobody is pinned.

    `hashes` are those of the folder's files. Raises CheckpointError where the signature does not hold, is of other
    files or of another name, or is not of a key in `trust`: one fingerprint, or several with commas between.
    """
    who, pinned = who or str(folder), pins(trust)
    if MANIFEST not in hashes:
        if pinned:
            raise CheckpointError(
                f"{who}: is not signed, expected {_or(pinned)}; refused. Name a signed one; to take it from whomever "
                f"it is, leave out --trust and {TRUST}."
            )
        return None
    signed = read_manifest((folder / MANIFEST).read_bytes(), who)
    here = {file: value for file, value in hashes.items() if file != MANIFEST}
    if here != signed.files:
        odd = printable(min(dict(here.items() ^ signed.files.items())))
        raise CheckpointError(f"{who}: '{odd}' is not as it was signed; the release was altered and is refused.")
    if signed.name != name:
        found = printable(signed.name)
        raise CheckpointError(f"{who}: was signed as a release of '{found}', not of '{name}'; refused.")
    if pinned and signed.by not in pinned:
        raise CheckpointError(
            f"{who}: is signed by {signed.by}, expected {_or(pinned)}; refused. Where the coordinator has another key "
            "by now, it will read out its fingerprint."
        )
    return signed.by


def pins(trust: str | None) -> frozenset[str]:
    """Return the fingerprints in a text, with commas or blanks between. Raises ConfigError for what is none."""
    found = frozenset((trust or "").replace(",", " ").split())
    for one in sorted(found):
        if not _PIN.fullmatch(one):
            raise ConfigError(
                f"trust '{one[:60]}': is no fingerprint; expected SHA256: and 43 letters, as 'wardround provision' "
                "prints it."
            )
    return found


def origin(signer: str | None, trust: str | None) -> str:
    """Return in one line what a user knows of a release's origin, once `check` has passed it."""
    if signer is None:
        return "origin not verified: nobody signed this release."
    if pins(trust):
        return f"origin verified: signed by {signer}, which is pinned."
    return (
        f"origin not verified: signed by {signer}, and no key is pinned. Compare it with the coordinator's, then pin "
        f"it: --trust {signer}, or {TRUST} in the environment."
    )


def pinned_here() -> str | None:
    """Return what the environment pins, or None."""
    return os.environ.get(TRUST) or None


def _message(said: dict[str, Any]) -> bytes:
    return _KIND + json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _or(pinned: frozenset[str]) -> str:
    return " or ".join(sorted(pinned))
