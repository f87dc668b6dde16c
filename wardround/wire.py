"""Tasks and answers to and from Flower's records. Beside the two apps and `simulate`, only this file knows flwr.

A state or an update crosses as one flat array of bytes: a round of Flower's costs a request for each
object, so a ViT sent tensor by tensor takes about four times the CPU of the same bytes sent flat.
"""

import json
from collections.abc import Iterator
from io import BytesIO

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from wardround.encoding import compress
from wardround.errors import PolicyRefusal, UpdateError
from wardround.signatures import is_signed, sign
from wardround.update import Refusal, Task, TaskKind, printable

# Of this protocol on the wire; both ends must speak the same. It goes up with whatever changes the fields of a task
# or of an update, or what is signed of them. A refusal never changes, so that the older end's word is read.
VERSION = 5
_NPY, _NPY_HEAD = "numpy.ndarray", 128  # Flower's word for numpy's file format; bytes of the header of a flat array


def task_to_records(
    task: Task, site: str, key: EllipticCurvePrivateKey | None, state: ArrayRecord | None = None
) -> RecordDict:
    """Return the records of one task for one site, signed by the coordinator; a single process needs no key.

    `state` is `block_record(task.state)`, where tasks of several sites share one.
    """
    fields: dict[str, int | str] = {
        "wire": VERSION,
        "round": task.round,
        "protocol": task.protocol,
        "last_folded": task.last_folded,
        "ledger": task.ledger,
        "units": task.units,
    }
    signature = sign(key, task.kind, site, json.dumps(fields, sort_keys=True), task.state) if key else b""
    record = ConfigRecord({**fields, "signature": signature})
    return RecordDict({"task": record, "state": state or block_record(task.state)})


def records_to_task(
    records: RecordDict, site: str, key: EllipticCurvePublicKey | None, kind: TaskKind = "task"
) -> Task:
    """Return the task in a message of this kind.

    Raises UpdateError where it is none, and PolicyRefusal where `key`, the coordinator's, did not sign it for
    this very site.
    """
    try:
        fields = dict(records.config_records["task"])
        if fields["wire"] != VERSION:
            spoken = printable(str(fields["wire"])[:20])
            raise PolicyRefusal(
                f"the coordinator speaks wire version {spoken}, this site {VERSION}; upgrade the older."
            )
        signature, state = fields.pop("signature"), _bytes(records, "state")
        text = json.dumps(fields, sort_keys=True)
        if key and not (isinstance(signature, bytes) and is_signed(key, signature, kind, site, text, state)):
            raise PolicyRefusal(
                "the message is not signed by the coordinator whose key came with this site's kit; ask the "
                "coordinator, and for a new kit if its key has changed."
            )
        return Task(
            round=int(fields["round"]),  # type: ignore[arg-type]  # a record's value is a union
            protocol=str(fields["protocol"]),
            last_folded=int(fields["last_folded"]),  # type: ignore[arg-type]
            state=state,
            ledger=str(fields["ledger"]),
            units=int(fields["units"]),  # type: ignore[arg-type]
            kind=kind,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UpdateError("the coordinator's message holds no task; its release differs from this site's.") from error


def is_last_round(records: RecordDict) -> bool:
    """Return whether a message asks for the last round of its protocol; False where it does not say."""
    try:
        fields = records.config_records["task"]
        return bool(fields["round"] == json.loads(str(fields["protocol"]))["training"]["rounds"])
    except (KeyError, TypeError, ValueError):
        return False


def answer_to_records(
    answer: bytes | Refusal, site: str, round: str, key: EllipticCurvePrivateKey | None
) -> RecordDict:
    """Return the records of an update's bytes, compressed, or of a refusal; signed by the site."""
    if isinstance(answer, Refusal):
        record = {"code": answer.code, "text": answer.text}
        signature = sign(key, "refusal", site, round, answer.code, answer.text) if key else b""
        return RecordDict({"refusal": ConfigRecord({**record, "signature": signature})})
    block = compress(answer)
    signature = sign(key, "update", site, round, block) if key else b""
    return RecordDict(
        {"update": block_record(block), "signed": ConfigRecord({"signature": signature, "wire": VERSION})}
    )


def message_to_answer(message: Message, site: str, round: str, key: EllipticCurvePublicKey | None) -> bytes | Refusal:
    """Return what a site answered, compressed as it crossed.

    What is neither update nor refusal, or not signed by `key`, the site's, becomes a refusal.
    """
    if message.has_error():
        # Flower's own reason may quote the site's exception, so only its code is kept.
        return Refusal("failed", f"the site's process ended without an answer (Flower's error {message.error.code})")
    records = message.content
    try:
        if "refusal" in records.config_records:
            fields = records.config_records["refusal"]
            found: bytes | Refusal = Refusal(str(fields["code"]), str(fields["text"])).shown()
            said: tuple[bytes | str, ...] = ("refusal", site, round, str(fields["code"]), str(fields["text"]))
            signature = fields["signature"]
        else:
            signed = records.config_records["signed"]
            if signed.get("wire") != VERSION:
                spoken = printable(str(signed.get("wire", "4 or older"))[:20])
                return Refusal(
                    "version", f"it speaks wire version {spoken}, the coordinator {VERSION}; upgrade the older."
                )
            found = _bytes(records, "update")
            said = ("update", site, round, found)
            signature = signed["signature"]
    except (KeyError, TypeError, ValueError):
        return Refusal("invalid", "the answer is neither an update nor a refusal")
    if key and not (isinstance(signature, bytes) and is_signed(key, signature, *said)):
        return Refusal("invalid", "the answer is not signed by the site's key, or is of another round")
    return found


def crossing(records: RecordDict) -> Iterator[bytes]:
    """Yield all that is in a message, for a log to count and hash: blocks as Flower packs them, the rest as JSON."""
    for _, record in sorted(records.items()):
        if isinstance(record, ArrayRecord):
            yield from (array.data for _, array in sorted(record.items()))
        else:
            yield json.dumps(dict(record), sort_keys=True, default=bytes.hex).encode()


def block_record(block: bytes) -> ArrayRecord:
    """Return bytes as one flat array of Flower's, which copies them."""
    return ArrayRecord({"block": Array(np.frombuffer(block, dtype=np.uint8))})


def _bytes(records: RecordDict, name: str) -> bytes:
    """Return what `block_record` was given, copied once where Flower's own reading copies it twice.

    Raises ValueError for another array.
    """
    array = records.array_records[name]["block"]
    head = BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": (len(array.data) - _NPY_HEAD,)}
    )
    # Compared and not parsed: what a site sends here is not checked yet.
    if array.stype != _NPY or array.data[:_NPY_HEAD] != head.getvalue():
        raise ValueError("is no flat array of bytes")
    return array.data[_NPY_HEAD:]
