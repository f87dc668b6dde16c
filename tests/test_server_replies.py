"""What a site sends over Flower's own Grid, which reads here what SuperLink passed on without a look into it.

SuperLink's part is played in memory, by its own check of objects; a real one lets these pass as well.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import (
    GetNodesRequest,
    GetNodesResponse,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)
from flwr.supercore.inflatable.inflatable_object import get_object_id, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, validate_object_content
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from honest_sites import SITES, Sites, ignore, make_run

from wardround.connection.coordinator import CheckedGrid
from wardround.errors import UpdateError
from wardround.server import app
from wardround.server.app import Fleet
from wardround.server.rounds import run_rounds, tasks_of
from wardround.server.run_folder import RunFolder
from wardround.wire import answer_to_records, records_to_task

Objects = dict[str, bytes]  # by the hash of their content, the message last


def put(kind: str, children: list[str], body: bytes, found: Objects) -> str:
    """Keep an object as SuperLink would, which looks at its head alone; return its number."""
    block = f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body
    validate_object_content(block)
    found[get_object_id(block)] = block
    return get_object_id(block)


def of_no_json(message: bytes) -> Objects:
    found: Objects = {}
    put("Message", [put("RecordDict", [], b"no JSON at all", found)], message, found)
    return found


def of_brackets(message: bytes) -> Objects:
    found: Objects = {}
    put("Message", [put("RecordDict", [], b"[" * 100_000, found)], message, found)
    return found


def of_no_message(message: bytes) -> Objects:
    found: Objects = {}
    put("RecordDict", [], b"{}", found)
    return found


def of_no_protobuf(message: bytes) -> Objects:
    found: Objects = {}
    put("Message", [put("RecordDict", [], b"{}", found)], b"\xff" * 9, found)
    return found


def of_another_record(message: bytes) -> Objects:
    found: Objects = {}
    put("Message", [put("ConfigRecord", [], b"", found)], message, found)
    return found


def of_nothing(message: bytes) -> Objects:
    found: Objects = {}
    put("Message", [], message, found)
    return found


HOSTILE: list[Callable[[bytes], Objects]] = [
    of_no_json, of_brackets, of_no_message, of_no_protobuf, of_another_record, of_nothing
]  # fmt: skip


class Link:
    """SuperLink, and three sites behind it, of which oslo answers each task with objects of its own making."""

    def __init__(self, run: RunFolder, spoil: Callable[[bytes], Objects]) -> None:
        self.sites, self.spoil = Sites(run), spoil
        self.objects: Objects = {}
        self.waiting: dict[str, str] = {}  # a task's number -> its site
        self.pulled: list[str] = []
        self.confirmed: list[str] = []

    def get_nodes(self, _: GetNodesRequest) -> GetNodesResponse:
        return GetNodesResponse(
            nodes=[NodeInfo(node_id=n, public_key=site.encode()) for n, site in enumerate(SITES, start=10)]
        )

    def push_messages(self, asked: PushAppMessagesRequest) -> PushAppMessagesResponse:
        numbers = [one.metadata.message_id for one in asked.messages_list]
        self.waiting |= {
            number: SITES[one.metadata.dst_node_id - 10]
            for number, one in zip(numbers, asked.messages_list, strict=True)
        }
        wanted = {one.object_id for tree in asked.message_object_trees for one in iterate_object_tree(tree)}
        return PushAppMessagesResponse(message_ids=numbers, objects_to_push=wanted, session_id="s")

    def push_object(self, asked: PushObjectRequest) -> PushObjectResponse:
        self.objects[asked.object_id] = asked.object_content
        return PushObjectResponse(stored=True)

    def pull_messages(self, asked: PullAppMessagesRequest) -> PullAppMessagesResponse:
        (number,) = asked.message_ids
        self.pulled.append(number)
        if number not in self.waiting:
            return PullAppMessagesResponse()
        site = self.waiting.pop(number)
        task = inflate_object_from_contents(number, self.objects, keep_object_contents=True)
        assert isinstance(task, Message)
        task.metadata.__dict__["_message_id"] = number
        reply = self.answered(site, task)
        own = self.spoil(reply.deflate().partition(b"\0")[2]) if site == "oslo" else contents(reply)
        self.objects |= own
        *parts, head = own
        proto = message_to_proto(remove_content_from_message(reply))
        proto.metadata.message_id = head
        tree = ObjectTree(object_id=head, children=[ObjectTree(object_id=part) for part in parts])
        return PullAppMessagesResponse(messages_list=[proto], message_object_trees=[tree])

    def answered(self, site: str, task: Message) -> Message:
        answer = self.sites.answer(site, records_to_task(task.content, site, None))
        return Message(answer_to_records(answer, site, task.metadata.group_id, None), reply_to=task)

    def pull_object(self, asked: PullObjectRequest) -> PullObjectResponse:
        content = self.objects[asked.object_id]
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def confirm(self, asked: ConfirmMessageReceivedRequest) -> ConfirmMessageReceivedResponse:
        self.confirmed.append(asked.message_object_id)
        return ConfirmMessageReceivedResponse()

    def grid(self) -> CheckedGrid:
        """Return production's Grid, whose client is this."""
        grid = CheckedGrid("127.0.0.1:1", True, token="t")
        client: Any = SimpleNamespace(
            GetNodes=self.get_nodes, PushMessages=self.push_messages, PushObject=self.push_object,
            PullMessages=self.pull_messages, PullObject=self.pull_object, ConfirmMessageReceived=self.confirm,
        )  # fmt: skip
        grid._client = client
        grid.set_run(Run.create_empty(1))
        return grid


def contents(reply: Message) -> Objects:
    """Return the objects of an honest reply, itself last."""
    found: Objects = {}

    def add(one: Any) -> None:
        for child in (one.children or {}).values():
            add(child)
        found[one.object_id] = one.deflate()

    add(reply)
    return found


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # without it, Message() raises
    monkeypatch.setattr(app, "POLL_SECONDS", 0.0)
    yield


@pytest.mark.parametrize("spoil", HOSTILE, ids=[one.__name__ for one in HOSTILE])
def test_a_reply_that_flower_cannot_read_is_its_sites_refusal_and_is_asked_for_once(
    tmp_path: Path, spoil: Callable[[bytes], Objects]
) -> None:
    run = make_run(tmp_path / "run", membership={"min_sites": 2})
    link = Link(run, spoil)
    run_rounds(run, Fleet(link.grid(), run, None).ask, ignore)
    assert run.committed() == [0, 1, 2]
    for number in (1, 2):
        assert run.record(number)["sites"].keys() == {"lyon", "wien"}
        assert run.record(number)["refused"]["oslo"].startswith("invalid: Flower cannot read the answer (")
    assert len(link.pulled) == len(set(link.pulled)) == 6, "SuperLink has forgotten it, and would have none"


def test_a_reply_that_flower_cannot_read_is_dropped_where_its_round_is_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    link = Link(run, of_no_json)
    fleet = Fleet(link.grid(), run, None)
    fleet.send(tasks_of(run, run.newest(), 1, ["oslo"], whole=True))
    (number,) = fleet.out
    fleet.late, fleet.out = {number: ("oslo", 1)}, {}
    fleet.drop_late()
    assert (fleet.late, fleet.dropped) == ({}, 1)


@pytest.mark.parametrize(
    "lost",
    [
        httpx.ConnectError("refused"),
        httpx.HTTPStatusError("500", request=httpx.Request("POST", "https://x"), response=httpx.Response(500)),
        RunNotRunningException(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_connection_that_is_lost_is_no_sites_doing(tmp_path: Path, lost: Exception) -> None:
    grid = Link(make_run(tmp_path / "run"), of_no_json).grid()

    def fail(_: PullAppMessagesRequest) -> PullAppMessagesResponse:
        raise lost

    grid._client.PullMessages = fail  # type: ignore[union-attr, method-assign]
    with pytest.raises(type(lost)):
        grid.pull_messages(["x"])


def test_what_flower_said_of_a_reply_is_kept_for_who_looks_into_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run")
    fleet = Fleet(Link(run, of_no_json).grid(), run, None)
    fleet.send(tasks_of(run, run.newest(), 1, ["oslo"], whole=True))
    with caplog.at_level("INFO"), pytest.raises(UpdateError, match=r"cannot read the answer \(JSONDecodeError\)"):
        fleet.grid.pull_messages(list(fleet.out))
    assert "Expecting value" in caplog.text
