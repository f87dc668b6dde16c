"""Two releases of the wire, and texts of a hostile site: said by both ends, and harmless to read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from honest_sites import Sites, ignore, make_run
from test_signatures import COORDINATOR, LYON, TASK, reply

from wardround import wire
from wardround.errors import PolicyRefusal
from wardround.server.rounds import run_rounds
from wardround.signatures import sign
from wardround.update import Refusal, Task, TaskKind, Update
from wardround.wire import VERSION, message_to_answer, records_to_task, task_to_records

OLDER = VERSION - 1


def test_a_site_refuses_a_coordinator_of_another_version_and_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "VERSION", OLDER)
    records = task_to_records(TASK, "lyon", COORDINATOR)
    monkeypatch.undo()
    with pytest.raises(PolicyRefusal, match=f"speaks wire version {OLDER}, this site {VERSION}; upgrade the older"):
        records_to_task(records, "lyon", COORDINATOR.public_key())


def test_the_coordinator_refuses_an_update_of_another_version_and_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "VERSION", OLDER)
    message = reply(b"update", "lyon", "3", LYON)
    monkeypatch.undo()
    found = message_to_answer(message, "lyon", "3", LYON.public_key())
    assert found == Refusal("version", f"it speaks wire version {OLDER}, the coordinator {VERSION}; upgrade the older.")


def test_an_update_from_before_there_was_a_version_in_it_is_refused_as_such() -> None:
    message = reply(b"update", "lyon", "3", LYON)
    del message.content["signed"]["wire"]
    found = message_to_answer(message, "lyon", "3", LYON.public_key())
    assert isinstance(found, Refusal) and "wire version 4 or older" in found.text


def test_a_refusal_of_any_version_is_read_so_that_the_reason_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the oldest release would send: these three fields, signed so."""
    text = f"the coordinator speaks wire version {VERSION}, this site 4; upgrade the older."
    signature = sign(LYON, "refusal", "lyon", "3", "policy", text)
    message = reply(Refusal("", ""), "lyon", "3", LYON)
    message.content["refusal"] = ConfigRecord({"code": "policy", "text": text, "signature": signature})
    assert message_to_answer(message, "lyon", "3", LYON.public_key()) == Refusal("policy", text)


@pytest.mark.parametrize("spoken", ["9\x1b[2J", "x" * 10_000, -1, 4.5])
def test_a_version_that_is_none_is_refused_on_one_short_line(spoken: Any) -> None:
    sound = task_to_records(TASK, "lyon", None)
    fields = {**sound.config_records["task"], "wire": spoken}
    records = RecordDict({"task": ConfigRecord(fields), "state": sound.array_records["state"]})
    with pytest.raises(PolicyRefusal) as refused:
        records_to_task(records, "lyon", None)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 120


def test_the_text_of_a_refusal_is_one_line_that_moves_no_cursor() -> None:
    evil = Refusal("policy\x1b[2J", "no\nround 9 of 9: all is well\r\x1b]0;title\x07" + "x" * 1000)
    found = message_to_answer(reply(evil, "lyon", "3", LYON), "lyon", "3", LYON.public_key())
    assert isinstance(found, Refusal)
    assert found.code == "policy?[2J" and found.text.isprintable() and len(found.text) == 500


def test_a_task_says_its_version_in_what_is_signed() -> None:
    records = task_to_records(TASK, "lyon", COORDINATOR)
    fields = dict(records.config_records["task"])
    assert fields["wire"] == VERSION
    fields.pop("signature")
    assert "wire" in json.dumps(fields)


class Mixed(Sites):
    """Three honest sites, each of another release of one wire version."""

    def update(self, site: str, task: Task) -> Update:
        made = super().update(site, task)
        return dataclasses.replace(made, declared=dataclasses.replace(made.declared, version=f"0.1.{len(site)}-{site}"))


def test_releases_of_one_wire_version_work_together_and_the_record_says_which(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run_rounds(run, Mixed(run), ignore)
    said = {site: declared["version"] for site, declared in run.record(2)["sites"].items()}
    assert said == {site: f"0.1.4-{site}" for site in ("lyon", "oslo", "wien")}


@pytest.mark.parametrize(("kind", "other"), [("task", "evaluation"), ("evaluation", "task")])
def test_what_was_signed_as_a_question_is_not_taken_for_a_task_nor_the_other_way_round(
    kind: TaskKind, other: TaskKind
) -> None:
    records = task_to_records(dataclasses.replace(TASK, kind=kind), "lyon", COORDINATOR)
    assert records_to_task(records, "lyon", COORDINATOR.public_key(), kind).kind == kind
    with pytest.raises(PolicyRefusal, match="not signed by the coordinator"):
        records_to_task(records, "lyon", COORDINATOR.public_key(), other)


def test_the_last_round_is_known_and_what_cannot_be_read_is_not_it() -> None:
    protocol = json.dumps({"training": {"rounds": 3}})
    asked = [task_to_records(dataclasses.replace(TASK, round=n, protocol=protocol), "lyon", None) for n in (2, 3)]
    assert [wire.is_last_round(records) for records in asked] == [False, True]
    assert not wire.is_last_round(RecordDict())
    assert not wire.is_last_round(task_to_records(dataclasses.replace(TASK, protocol="[]"), "lyon", None))


def test_tasks_of_several_sites_share_one_block_and_each_has_its_own_signature() -> None:
    shared = wire.block_record(TASK.state)
    lyon, oslo = (task_to_records(TASK, site, COORDINATOR, shared) for site in ("lyon", "oslo"))
    assert lyon.array_records["state"] is oslo.array_records["state"]
    for site, records in (("lyon", lyon), ("oslo", oslo)):
        assert records_to_task(records, site, COORDINATOR.public_key()) == TASK
    with pytest.raises(PolicyRefusal, match="not signed"):
        records_to_task(lyon, "oslo", COORDINATOR.public_key())


@pytest.mark.parametrize("block", [b"", b"x", bytes(range(256)) * 30_000])
def test_a_block_crosses_byte_for_byte(block: bytes) -> None:
    records = RecordDict({"update": wire.block_record(block)})
    assert wire._bytes(records, "update") == block


WRONG = {
    "of numbers": Array(np.zeros(3, np.float32)),
    "of two axes": Array(np.zeros((2, 2), np.uint8)),
    "cut": Array("uint8", (9,), "numpy.ndarray", Array(np.zeros(9, np.uint8)).data[:-1]),
    "of no numpy file": Array("uint8", (9,), "numpy.ndarray", bytes(9)),
    "of another kind": Array("uint8", (9,), "pickle", Array(np.zeros(9, np.uint8)).data),
    "with a header that nobody can read": Array("uint8", (1,), "numpy.ndarray", b"\x93NUMPY\x01\x00\x08\x00{'''(\n  x"),
    "that numpy would unpickle": Array("O", (1,), "numpy.ndarray", b"\x93NUMPY\x01\x00\x10\x00{'descr': '|O'}\n"),
}


@pytest.mark.parametrize("array", WRONG.values(), ids=WRONG.keys())
def test_an_array_that_is_no_block_of_bytes_is_no_answer(array: Array) -> None:
    message = reply(b"update", "lyon", "3", LYON)
    message.content["update"] = ArrayRecord({"block": array})
    found = message_to_answer(message, "lyon", "3", LYON.public_key())
    assert found == Refusal("invalid", "the answer is neither an update nor a refusal")
