"""Every message in and out of this site: a log that is only added to, for the people who answer for the site.

A row is on disk before the answer that it tells of is handed to the connection. Rows are chained as the
ledger's are, and the chain's length and head leave with every update, so that the other side holds what
contradicts a log that is cut, restored or rewritten later. Each row holds a random number: a head tells
how many messages there were, which the coordinator knows, and nothing of what is in the rows.
"""

import json
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from wardround.errors import CheckpointError, UpdateError
from wardround.privacy import chained_table as table
from wardround.update import Refusal, Task, Update

LOG = table.Kind("audit log", "the log then begins anew, which the coordinator notices")
_SHORT = 16  # digits of a protocol digest


@dataclass(frozen=True)
class Crossing:
    """One message, as far as the log tells of it."""

    direction: Literal["in", "out"]
    peer: str  # the fingerprint of the coordinator's key; "" for a message that it did not sign
    kind: str  # in: task, evaluation, or unreadable; out: update, replay, scores, or refusal: CODE
    round: int  # 0 where the message names none
    protocol: str  # the first digits of its digest
    bytes: int  # of the message's parts, as they crossed
    sha256: str  # over these parts
    epsilon: float | None = None  # spent in this federation by then, where this round was charged


@dataclass(frozen=True)
class Row:
    """One entry of the log."""

    seq: int
    hash: str
    time: str  # UTC; for people, nothing is decided by it
    crossing: Crossing

    def flat(self) -> dict[str, Any]:
        """Return all that the row tells, by name."""
        own = asdict(self)
        crossing: dict[str, Any] = own.pop("crossing")
        return own | crossing


@dataclass
class Exchange:
    """What becomes of one task: filled in while it is answered, so that a failure is told as far as it came."""

    peer: str
    round: int = 0
    protocol: str = ""
    kind: str = "update"
    epsilon: float | None = None
    head: str | None = None  # of the log, the task in it

    def crossing(self, direction: Literal["in", "out"], kind: str, parts: Iterable[bytes]) -> Crossing:
        """Return a message of this exchange; `parts` is all that crosses, in order."""
        total, found = 0, sha256()
        for part in parts:
            total += len(part)
            found.update(part)
        return Crossing(direction, self.peer, kind, self.round, self.protocol, total, found.hexdigest(), self.epsilon)


class AuditLog:
    """A site's log file. Raises CheckpointError where it cannot be used."""

    def __init__(self, work: Path) -> None:
        self.work, self.path = work, work / "audit.db"

    def add(self, crossing: Crossing) -> str:
        """Write a row and return the new head, LENGTH:HASH; when it returns, the row outlasts a power cut."""
        time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        content = {**asdict(crossing), "time": time, "random": secrets.token_hex(16)}
        with table.transaction(self.path, LOG) as db:
            seq = table.last(db)[0] + 1
            return f"{seq}:{table.append(db, seq, json.dumps(content, sort_keys=True, separators=(',', ':')))}"

    def rows(self) -> tuple[list[Row], str]:
        """Return the rows up to where the chain holds, oldest first, and what breaks it there, or ""."""
        with table.transaction(self.path, LOG) as db:
            found, problem = table.scan(db)
        return [_row(seq, text, digest) for seq, text, digest in found], problem

    def verified(self) -> tuple[list[Row], int]:
        """Return all rows, and how many updates in the journal left with a head of theirs.

        Raises CheckpointError, which says up to where the log holds, where it was altered or cut.
        """
        rows, problem = self.rows()
        heads = {f"{row.seq}:{row.hash}" for row in rows}
        left = list(self._heads_that_left())
        if not problem and (lost := [head for head in left if head not in heads]):
            seen = max(int(head.partition(":")[0]) for head in lost)
            problem = f"an update left with a head of {seen} rows that is not among its {len(rows)}: it was cut"
        if problem:
            upto = f"row {rows[-1].seq} ({rows[-1].time})" if rows else "no row"
            raise CheckpointError(
                f"the audit log holds up to {upto}: {problem}. Put back the newest copy that is whole; what the "
                "coordinator keeps with each round says which head it saw."
            )
        return rows, len(left)

    def _heads_that_left(self) -> Iterable[str]:
        for path in sorted(self.work.glob("journal/*/round-*/update.safetensors")):
            try:
                head = Update.from_bytes(path.read_bytes()).declared.audit
            except (OSError, UpdateError):  # the journal minds its own damage
                continue
            if head is not None:
                yield head


def protocol_of(task: Task) -> str:
    """Return the first digits of the digest of a task's protocol, as it came; "" where it cannot be read."""
    try:
        text = json.dumps(json.loads(task.protocol), sort_keys=True, separators=(",", ":"))
    except ValueError:
        return ""
    return sha256(text.encode()).hexdigest()[:_SHORT]


def kind_of(answer: bytes | Refusal, exchange: Exchange) -> str:
    """Return how the log calls an answer."""
    return f"refusal: {answer.code}" if isinstance(answer, Refusal) else exchange.kind


def _row(seq: int, text: str, digest: str) -> Row:
    content = json.loads(text)
    del content["random"]
    return Row(seq, digest, content.pop("time"), Crossing(**content))
