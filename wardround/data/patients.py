"""Which images belong to one patient, without keeping who that is; and who opted out."""

import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from wardround.errors import DataError

_SALT_BYTES = 32


def read_salt(work: Path) -> bytes:
    """Return the site's secret salt, made on first use; only the site's own user may read it."""
    path = work / "patients.salt"
    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        # A process number would not tell two writers apart: in two containers both are number 1.
        with tempfile.NamedTemporaryFile(dir=work, prefix="patients.salt.") as aside:
            aside.write(secrets.token_bytes(_SALT_BYTES))
            aside.flush()
            with suppress(FileExistsError):
                os.link(aside.name, path)  # atomic, and fails where another writer was first
    salt = path.read_bytes()
    if len(salt) != _SALT_BYTES:
        raise DataError(
            f"{path.name} in the work folder has {len(salt)} bytes, expected {_SALT_BYTES}: it was cut or replaced. "
            "Remove it; it and the cache are made again"
        )
    return salt


def pseudonym(salt: bytes, identifier: str) -> str:
    """Return the keyed hash (HMAC-SHA256) of an identifier: 32 hexadecimal digits; "" for none.

    Case and outer blanks do not count, nor who issued the identifier. Where that joins two people, they
    share a privacy unit and an opt-out: the error is on the safe side.
    """
    text = identifier.strip().casefold()
    return keyed_hash(salt, text) if text else ""


def keyed_hash(salt: bytes, text: str) -> str:
    """Return the HMAC-SHA256 of a text as it stands, a path's for instance: 32 hexadecimal digits."""
    return hmac.new(salt, text.encode(errors="surrogateescape"), hashlib.sha256).hexdigest()[:32]


def read_opt_outs(path: Path | None, site: str, salt: bytes) -> frozenset[str]:
    """Return the pseudonyms of the patients who opted out. Raises DataError where the list cannot be read.

    One PatientID a line; a line that starts with # is a comment.
    """
    if path is None:
        return frozenset()
    try:
        lines: Iterable[str] = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(
            f"site '{site}': the opt-out list cannot be read: {reason}. No image is used until it can: "
            "mend [images] opt_out, or remove the key if nobody opted out."
        ) from error
    return frozenset(pseudonym(salt, line) for line in lines if line.strip() and not line.lstrip().startswith("#"))
