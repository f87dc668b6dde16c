"""What a site has spent of its patients' privacy, over all federations that share it: a ledger that only grows.

A row is an intent: what a round is about to release. It is on disk before the first noised step, and
nothing takes it back, whatever becomes of the round; a round trained again is charged again. Rows
hold mechanisms, never epsilon, which is computed from all of them. Their hashes form a chain; its
length and head travel with every update, and the coordinator names the newest that it has seen with
every task, so that a ledger restored from an older copy, or deleted, is noticed.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from sqlite3 import Connection
from typing import Any

from wardround.errors import BudgetExhausted, PolicyRefusal
from wardround.privacy import chained_table as table
from wardround.privacy.accounting import Mechanism, epsilon, upward

_HEAD = re.compile(r"(\d{1,9}):([0-9a-f]{64})")
LEDGER = table.Kind(
    "ledger",
    "'wardround site ledger recover' charges what is lacking",
    ("CREATE TABLE IF NOT EXISTS gap (protocol TEXT PRIMARY KEY, content TEXT NOT NULL) STRICT",),
)


@dataclass(frozen=True)
class Intent:
    """What a training of a round is about to release."""

    federation: str
    protocol: str  # protocol digest
    round: int
    unit: str  # patient or image
    clip: float  # the clipping norm C
    mechanism: Mechanism
    seen: str = ""  # the newest LENGTH:HASH of this ledger that the coordinator has seen, from its task


@dataclass(frozen=True)
class Row:
    """One entry of the ledger."""

    seq: int
    hash: str
    kind: str  # intent, or recovered: charged for rows that were lost
    count: int  # how many trainings it stands for
    time: str  # UTC; for people, nothing is decided by it
    delta: float
    intent: Intent

    @property
    def mechanism(self) -> Mechanism:
        """All that the row charges."""
        return self.intent.mechanism.times(self.count)


class Ledger:
    """A site's ledger file. Two processes may charge at once: each sees what the other has spent.

    Every method checks the whole chain, and raises CheckpointError where it is broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """Return all rows, oldest first."""
        with table.transaction(self.path, LEDGER) as db:
            return _rows(db)

    def mechanisms(self) -> list[Mechanism]:
        """Return all that was ever charged."""
        return [row.mechanism for row in self.rows()]

    def head(self) -> str:
        """Return the length and the last hash, LENGTH:HASH."""
        return _head(self.rows())

    def gaps(self) -> list[Intent]:
        """Return the intents that met a ledger without what their coordinator has seen; `recover` settles them."""
        with table.transaction(self.path, LEDGER) as db:
            return _gaps(db)

    def charge(self, intent: Intent, ceiling: float, delta: float) -> str:
        """Write an intent and return the new head; when it returns, the row outlasts a power cut.

        Raises PolicyRefusal as `confirm` does, and BudgetExhausted where the row would take epsilon past the ceiling
        or the ledger counts by another unit or delta. Nothing is written then.
        """
        self.confirm(intent)
        with table.transaction(self.path, LEDGER) as db:
            rows = _rows(db)
            _check_terms(rows, intent.unit, delta)
            spent = [row.mechanism for row in rows]
            after = epsilon([*spent, intent.mechanism], delta)
            if after > ceiling:
                raise BudgetExhausted(
                    f"epsilon {upward(epsilon(spent, delta))} of this site's ceiling {ceiling:g} is spent (delta = "
                    f"{delta:g}, add/remove one {intent.unit}); round {intent.round} would take it to {upward(after)}. "
                    "Raise [privacy] epsilon in site.toml, or leave the federation."
                )
            return _append(db, _length(rows) + 1, "intent", 1, delta, intent)

    def confirm(self, intent: Intent) -> None:
        """Raise PolicyRefusal unless the ledger holds what the coordinator has seen of it.

        What is lacking is remembered here, so that `recover` needs no coordinator. Until then no
        federation's round is charged: the ledger is known to say too little.
        """
        if intent.seen and not _HEAD.fullmatch(intent.seen):
            raise PolicyRefusal("the task's ledger is no LENGTH:HASH; the coordinator runs another release.")
        with table.transaction(self.path, LEDGER) as db:
            rows = _rows(db)
            if not _knows(rows, intent.seen):
                content = json.dumps(asdict(intent), sort_keys=True)
                db.execute("INSERT OR REPLACE INTO gap VALUES (?, ?)", (intent.protocol, content))
            gaps = _gaps(db)
        if gaps:
            raise PolicyRefusal(
                "the ledger is older than what left this site: it was restored from a copy, or deleted. Put the "
                "newest one back, or run 'wardround site ledger recover SITE.toml', which charges what is lacking."
            )

    def recover(self, delta: float) -> list[Row]:
        """Charge what the ledger lacks, and return the rows written for it: one a gap.

        How many rows were lost is not known, only that they lie after the last head that this
        coordinator and this ledger both knew: all from there to what it has seen are charged, some of
        them perhaps twice, none too seldom. Each is charged as the costliest known: of the ledger, or of
        the round at hand. The new row's number follows what was seen, so that lengths only grow.
        """
        written = []
        with table.transaction(self.path, LEDGER) as db:
            for gap in _gaps(db):
                rows = _rows(db)
                _check_terms(rows, gap.unit, delta)
                seen = _length_of(gap.seen)
                known = [_length_of(row.intent.seen) for row in rows if row.intent.protocol == gap.protocol]
                shared = max(known, default=0)
                count = seen - shared if shared < seen else seen
                candidates = {gap.mechanism, *(row.intent.mechanism for row in rows)}
                worst = max(candidates, key=lambda one: epsilon([one.times(count)], delta))
                intent = replace(gap, mechanism=worst)
                _append(db, max(seen + 1, _length(rows) + count), "recovered", count, delta, intent)
                written.append(_rows(db)[-1])
            db.execute("DELETE FROM gap")
        return written


def _rows(db: Connection) -> list[Row]:
    return [
        Row(seq, digest, **{**(content := json.loads(text)), "intent": _intent(content["intent"])})
        for seq, text, digest in table.read(db, LEDGER)
    ]


def _gaps(db: Connection) -> list[Intent]:
    return [_intent(json.loads(text)) for (text,) in db.execute("SELECT content FROM gap ORDER BY protocol")]


def _intent(content: dict[str, Any]) -> Intent:
    return Intent(**{**content, "mechanism": Mechanism(**content["mechanism"])})


def _append(db: Connection, seq: int, kind: str, count: int, delta: float, intent: Intent) -> str:
    """Add a row as canonical JSON and return the new head."""
    time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    content = {"kind": kind, "count": count, "delta": delta, "time": time, "intent": asdict(intent)}
    return f"{seq}:{table.append(db, seq, json.dumps(content, sort_keys=True, separators=(',', ':')))}"


def _check_terms(rows: Sequence[Row], unit: str, delta: float) -> None:
    """Raise BudgetExhausted where a row of this unit and delta does not add up with those that are there."""
    if not rows:
        return
    first = rows[0]
    if delta != first.delta:
        raise BudgetExhausted(
            f"[privacy] delta = {delta:g} in site.toml, but the ledger is kept at {first.delta:g}, as its first row "
            "fixed; set it back."
        )
    if unit != first.intent.unit:
        raise BudgetExhausted(
            f"the federation's privacy unit is '{unit}', and this site's ledger counts by the {first.intent.unit}: "
            f"the two do not add up. Take part in federations with unit = '{first.intent.unit}'."
        )


def _knows(rows: Sequence[Row], seen: str) -> bool:
    """Return whether a head is one that this ledger had, or lost and was charged for."""
    return _length_of(seen) == 0 or any(
        seen in (f"{row.seq}:{row.hash}", row.intent.seen if row.kind == "recovered" else None) for row in rows
    )


def _length(rows: Sequence[Row]) -> int:
    return rows[-1].seq if rows else 0


def _length_of(head: str) -> int:
    return int(head.partition(":")[0] or 0)


def _head(rows: Sequence[Row]) -> str:
    return f"{_length(rows)}:{rows[-1].hash if rows else table.ORIGIN}"
