"""A table in an SQLite file that is only added to, each row bound to the one before: below the ledger and the log."""

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wardround.errors import CheckpointError

ORIGIN = "0" * 64  # the hash that the first row follows
_PATIENCE = 60.0  # seconds to wait while another process writes


@dataclass(frozen=True)
class Kind:
    """What a file is to a person: its name in messages, and what to do where it cannot be used or is broken."""

    name: str
    lost: str  # after "put back the newest copy"
    schema: tuple[str, ...] = ()  # tables beside the chained one


# In every kind of file the table is called ledger, as it was in the first.

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS ledger"
    " (seq INTEGER PRIMARY KEY, previous TEXT NOT NULL, content TEXT NOT NULL, hash TEXT NOT NULL) STRICT",
    "CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON ledger"
    " BEGIN SELECT RAISE(ABORT, 'the table is only added to'); END",
    "CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON ledger"
    " BEGIN SELECT RAISE(ABORT, 'the table is only added to'); END",
    # INSERT OR REPLACE deletes without firing the trigger above.
    "CREATE TRIGGER IF NOT EXISTS after_the_last BEFORE INSERT ON ledger"
    " WHEN NEW.seq <= (SELECT IFNULL(MAX(seq), 0) FROM ledger)"
    " BEGIN SELECT RAISE(ABORT, 'the table is only added to'); END",
)


@contextlib.contextmanager
def transaction(path: Path, kind: Kind) -> Iterator[sqlite3.Connection]:
    """Give a file of a kind, mode 0600, for one transaction; no other process reads or writes meanwhile.

    Leaving the block commits: what was written outlasts a power cut from then on. An error in the block
    takes all of it back, and what a killed process left half-written SQLite takes back at the next
    opening. Raises CheckpointError where the file is damaged, or the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # the journal that SQLite makes takes its mode
        with contextlib.closing(sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)) as db:
            # Under FULL the journal's removal is not synced: a power cut could bring the journal back, and
            # with it take back a charge that was reported as written. EXTRA is FULL, and syncs that too.
            db.execute("PRAGMA synchronous = EXTRA")
            db.execute("BEGIN IMMEDIATE")
            for statement in (*_SCHEMA, *kind.schema):
                db.execute(statement)
            yield db
            db.execute("COMMIT")
    except (sqlite3.Error, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be used as this site's {kind.name}: {error}. Mend the disk, or put back the newest copy "
            f"of the file; {kind.lost}."
        ) from error


def read(db: sqlite3.Connection, kind: Kind) -> list[tuple[int, str, str]]:
    """Return (seq, content, hash) of all rows. Raises CheckpointError at the first that breaks the chain."""
    rows, problem = scan(db)
    if problem:
        raise CheckpointError(
            f"the {kind.name}'s chain is broken: {problem}. Put back the newest copy that is whole, or remove the "
            f"file; {kind.lost}."
        )
    return rows


def scan(db: sqlite3.Connection) -> tuple[list[tuple[int, str, str]], str]:
    """Return (seq, content, hash) of the rows up to where the chain holds, and what breaks it there, or ""."""
    rows: list[tuple[int, str, str]] = []
    before, follows = 0, ORIGIN
    for seq, previous, content, found in db.execute("SELECT seq, previous, content, hash FROM ledger ORDER BY seq"):
        if found != _hash(seq, previous, content):
            return rows, f"row {seq} was altered"
        if previous != follows:
            return rows, f"row {seq} does not follow row {before}: rows were removed, replaced or reordered"
        rows.append((seq, content, found))
        before, follows = seq, found
    return rows, ""


def last(db: sqlite3.Connection) -> tuple[int, str]:
    """Return the number and the hash of the newest row; of an empty table 0 and ORIGIN."""
    return db.execute("SELECT seq, hash FROM ledger ORDER BY seq DESC LIMIT 1").fetchone() or (0, ORIGIN)


def append(db: sqlite3.Connection, seq: int, content: str) -> str:
    """Add a row after the last one and return its hash."""
    _, previous = last(db)
    made = _hash(seq, previous, content)
    db.execute("INSERT INTO ledger VALUES (?, ?, ?, ?)", (seq, previous, content, made))
    return made


def _hash(seq: int, previous: str, content: str) -> str:
    return hashlib.sha256(f"{seq}|{previous}|{content}".encode()).hexdigest()
