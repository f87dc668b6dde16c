"""Tasks and answers to and from Flower's records. Beside the two apps and `simulate`, only this file knows flwr.

A state or an update crosses as one flat array of bytes: a round of Flower's costs a request for each
object, so a ViT sent tensor by tensor takes about four times the CPU of the same bytes sent flat.
"""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from wardround.encoding import compress
from wardround.errors import UpdateError
from wardround.update import Refusal, Task

VERSION = 3  # of this protocol on the wire; both ends must speak the same


def task_to_records(task: Task) -> RecordDict:
    """Return the records of one task."""
    fields = ConfigRecord(
        {
            "wire": VERSION,
            "round": task.round,
            "protocol": task.protocol,
            "last_folded": task.last_folded,
            "ledger": task.ledger,
        }
    )
    return RecordDict({"task": fields, "state": _block(task.state)})


def records_to_task(records: RecordDict) -> Task:
    """Return the task in a message. Raises UpdateError where it is none."""
    try:
        fields = records.config_records["task"]
        if fields["wire"] != VERSION:
            raise UpdateError(
                f"the coordinator speaks wire version {fields['wire']!r}, this site {VERSION}; upgrade the older."
            )
        return Task(
            round=int(fields["round"]),  # type: ignore[arg-type]  # a record's value is a union
            protocol=str(fields["protocol"]),
            last_folded=int(fields["last_folded"]),  # type: ignore[arg-type]
            state=_bytes(records, "state"),
            ledger=str(fields["ledger"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UpdateError("the coordinator's message holds no task; its release differs from this site's.") from error


def answer_to_records(answer: bytes | Refusal) -> RecordDict:
    """Return the records of an update's bytes, compressed, or of a refusal."""
    if isinstance(answer, Refusal):
        return RecordDict({"refusal": ConfigRecord({"code": answer.code, "text": answer.text})})
    return RecordDict({"update": _block(compress(answer))})


def message_to_answer(message: Message) -> bytes | Refusal:
    """Return what a site answered, compressed as it crossed; what is neither update nor refusal becomes a refusal."""
    if message.has_error():
        # Flower's own reason may quote the site's exception, so only its code is kept.
        return Refusal("failed", f"the site's process ended without an answer (Flower's error {message.error.code})")
    records = message.content
    try:
        if "refusal" in records.config_records:
            fields = records.config_records["refusal"]
            return Refusal(str(fields["code"])[:20], str(fields["text"])[:500])
        return _bytes(records, "update")
    except (KeyError, TypeError, ValueError):
        return Refusal("invalid", "the answer is neither an update nor a refusal")


def _block(block: bytes) -> ArrayRecord:
    return ArrayRecord({"block": Array(np.frombuffer(block, dtype=np.uint8))})


def _bytes(records: RecordDict, name: str) -> bytes:
    return records.array_records[name]["block"].numpy().tobytes()
