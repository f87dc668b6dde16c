"""Signed messages: what was altered, replayed or meant for another is refused at either end."""

import dataclasses
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from wardround.errors import PolicyRefusal
from wardround.signatures import is_signed, sign
from wardround.update import Refusal, Task
from wardround.wire import answer_to_records, message_to_answer, records_to_task, task_to_records

COORDINATOR, LYON = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
TASK = Task(round=3, protocol="{}", last_folded=2, state=b"weights", ledger="1:" + "0" * 64)


def test_a_signature_holds_for_exactly_these_parts_in_this_order() -> None:
    signature = sign(LYON, "update", "lyon", b"block")
    assert is_signed(LYON.public_key(), signature, "update", "lyon", b"block")
    others = [
        ("update", "lyonb", b"lock"),
        ("lyon", "update", b"block"),
        ("update", "lyon"),
        ("update", "oslo", b"block"),
    ]
    for parts in others:
        assert not is_signed(LYON.public_key(), signature, *parts)
    assert not is_signed(COORDINATOR.public_key(), signature, "update", "lyon", b"block")


def test_a_site_takes_the_task_that_was_signed_for_it() -> None:
    assert records_to_task(task_to_records(TASK, "lyon", COORDINATOR), "lyon", COORDINATOR.public_key()) == TASK


@pytest.mark.parametrize(
    "change", [{"round": 4}, {"protocol": '{"x": 1}'}, {"last_folded": 1}, {"state": b"WEIGHTS"}, {"ledger": ""}]
)
def test_a_task_that_was_altered_on_the_way_is_refused(change: dict[str, Any]) -> None:
    sound = task_to_records(TASK, "lyon", COORDINATOR)
    forged = task_to_records(dataclasses.replace(TASK, **change), "lyon", None)
    fields = {**forged.config_records["task"], "signature": sound.config_records["task"]["signature"]}
    records = RecordDict({"task": ConfigRecord(fields), "state": forged.array_records["state"]})
    with pytest.raises(PolicyRefusal, match="not signed by the coordinator"):
        records_to_task(records, "lyon", COORDINATOR.public_key())


def test_a_task_without_signature_or_for_another_site_or_by_another_key_is_refused() -> None:
    for site, key in (("lyon", None), ("oslo", COORDINATOR), ("lyon", LYON)):
        with pytest.raises(PolicyRefusal, match="not signed by the coordinator"):
            records_to_task(task_to_records(TASK, site, key), "lyon", COORDINATOR.public_key())


def reply(answer: bytes | Refusal, site: str, round: str, key: ec.EllipticCurvePrivateKey | None) -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
    return Message(answer_to_records(answer, site, round, key), 1, "train")


@pytest.mark.parametrize("answer", [b"update" * 100, Refusal("policy", "not approved")])
def test_the_server_takes_the_answer_of_the_sites_own_key_for_this_round_alone(answer: bytes | Refusal) -> None:
    public = LYON.public_key()
    taken = message_to_answer(reply(answer, "lyon", "3", LYON), "lyon", "3", public)
    assert not isinstance(taken, Refusal) or taken == answer
    for site, round, key in (("lyon", "2", LYON), ("oslo", "3", LYON), ("lyon", "3", COORDINATOR), ("lyon", "3", None)):
        refused = message_to_answer(reply(answer, site, round, key), "lyon", "3", public)
        assert isinstance(refused, Refusal) and refused.code == "invalid"


def test_one_process_needs_no_keys() -> None:
    assert records_to_task(task_to_records(TASK, "lyon", None), "lyon", None) == TASK
