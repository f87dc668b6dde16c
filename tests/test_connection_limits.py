"""What a site's connection bears of a hostile coordinator, what it takes of the line, and when it is there at all."""

import asyncio
import gzip
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import httpx
import pytest
from conftest import known_at, tiny
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesResponse
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, PullObjectRequest, PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from test_connection import DEFAULTS, Scripted, reply, said, serving

from wardround.client import node
from wardround.connection import site as connection
from wardround.connection.meter import LARGEST_ANSWER
from wardround.provision import provision

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits")
    provision(tiny(), folder, ["lyon"])
    return folder


@contextmanager
def to(fleet: Scripted, kit: Path, megabits: float | None = None) -> Iterator[connection.SiteConnection]:
    key = load_ssh_private_key((kit / "lyon" / "site.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    with (
        serving(fleet, kit) as port,
        connection.connected(known_at(kit, f"localhost:{port}"), key, megabits=megabits) as made,
    ):
        yield made


class Giving(Scripted):
    """A Fleet service that has one message, of a megabyte, for whoever asks."""

    def __init__(self) -> None:
        super().__init__()
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
        message = Message(RecordDict({"task": ConfigRecord({"block": bytes(MEGABYTE)})}), 7, "train")
        message.metadata.__dict__["_message_id"] = message.object_id
        self.objects = {key: one.deflate() for key, one in get_all_nested_objects(message).items()}
        proto = message_to_proto(remove_content_from_message(message))
        found = PullMessagesResponse(messages_list=[proto], message_object_trees=[get_object_tree(message)])
        self.script["pull-messages"] = [said(found)]
        self.script["confirm-message-received"] = [said(ConfirmMessageReceivedResponse())]

    async def answer(self, request: Request) -> Response:
        if not request.url.path.endswith("/pull-object"):
            return await super().answer(request)
        asked = PullObjectRequest.FromString(await request.body())
        self.asked.append("pull-object")
        content = self.objects[asked.object_id]
        return said(PullObjectResponse(object_found=True, object_available=True, object_content=content))


def test_an_answer_without_end_is_cut_off_and_asked_for_again(kit: Path, caplog: pytest.LogCaptureFixture) -> None:
    fleet, sent = Scripted(), [0]

    async def endless() -> AsyncIterator[bytes]:
        while sent[0] < 10 * 2**30:
            sent[0] += 2**20
            await asyncio.sleep(0)  # else it never hears that nobody listens any more
            yield bytes(2**20)

    fleet.script["pull-messages"] = [StreamingResponse(endless()), said(DEFAULTS["pull-messages"])]
    with to(fleet, kit) as made:
        assert made.receive() is None
    assert fleet.asked.count("pull-messages") == 2
    assert sent[0] < 4 * LARGEST_ANSWER, "what the system's buffers hold beside"
    assert "it answers with more than 6,291,456 bytes" in caplog.text


def test_an_answer_that_would_unpack_to_far_more_is_not_unpacked(kit: Path, caplog: pytest.LogCaptureFixture) -> None:
    fleet = Scripted()
    bomb = gzip.compress(bytes(100 * MEGABYTE), 1)
    packed = Response(bomb, media_type="application/x-protobuf", headers={"content-encoding": "gzip"})
    fleet.script["pull-messages"] = [packed, said(DEFAULTS["pull-messages"])]
    with to(fleet, kit) as made:
        assert made.receive() is None
    assert "it answers compressed, unasked" in caplog.text


def test_a_message_of_more_parts_than_a_state_has_is_not_fetched(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Giving()
    monkeypatch.setattr(connection, "_MOST_OBJECTS", len(fleet.objects) - 1)
    with to(fleet, kit) as made:
        assert made.receive() is None
    assert "pull-object" not in fleet.asked


def test_a_site_is_not_sent_on_to_another_address(kit: Path) -> None:
    fleet, other = Scripted(), Scripted()
    with serving(other, kit) as port, to(fleet, kit) as made:
        elsewhere = {"location": f"https://localhost:{port}/v1/fleet/pull-messages"}
        fleet.script["pull-messages"] = [Response(status_code=307, headers=elsewhere)]
        with pytest.raises(httpx.HTTPStatusError, match="307"):
            made.receive()
    assert other.asked == []


def test_a_state_comes_no_faster_than_the_bandwidth(kit: Path) -> None:
    """A megabyte takes a second at eight megabits, and a few milliseconds on loopback."""
    with to(Giving(), kit, 8.0) as made:
        started = time.monotonic()
        message = made.receive()
        assert 0.8 < time.monotonic() - started < 20
        assert message is not None and message.content["task"]["block"] == bytes(MEGABYTE)


def test_an_update_leaves_no_faster_than_the_bandwidth_and_the_site_beats_meanwhile(kit: Path) -> None:
    fleet, answer = Scripted(), reply()
    answer.content["update"]["block"] = bytes(2 * MEGABYTE)
    lacking = PushMessagesResponse(objects_to_push=list(get_all_nested_objects(answer)), session_id="s")
    fleet.script["push-messages"] = [said(lacking)]
    with to(fleet, kit, 8.0) as made:
        started = time.monotonic()
        sending = threading.Thread(target=made.answer, args=(answer,))
        sending.start()
        time.sleep(0.3)
        before = time.monotonic()
        assert made.beat() and time.monotonic() - before < 1.0
        sending.join()
        assert 1.7 < time.monotonic() - started < 30


class End(Exception):  # noqa: N818  # no error of anyone
    """The test is over."""


class Clock:
    """Stands for the machine's clock: an hour a look, then the end."""

    def __init__(self, *hours: int) -> None:
        self.hours = iter(hours)

    def now(self) -> datetime:
        for hour in self.hours:
            return datetime(2026, 3, 1, hour)
        raise End


def test_a_site_is_connected_within_its_hours_alone(
    kit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = Scripted()
    monkeypatch.setattr(node, "_LOOK", 0.01)
    path, images = kit / "lyon" / "hours.toml", kit / "lyon" / "images"
    (kit / "lyon" / "work" / "flower").mkdir(parents=True)
    with serving(fleet, kit) as port:
        text = (kit / "lyon" / "site.toml").read_text().replace('# folder = "/data/images"', f'folder = "{images}"')
        text = text.replace("threads = 0", 'threads = 1\nhours = "20:00-06:00"')
        path.write_text(text.replace("localhost:8500", f"localhost:{port}"))
        for hours, asked in (((18, 18, 19), False), ((20, 20, 21, 22, 6, 6, 7), True)):
            monkeypatch.setattr(node, "datetime", Clock(*hours))
            with pytest.raises(End):
                node.answer_rounds(path)
            assert bool(fleet.asked) == asked
    polls = [name for name in fleet.asked if name != "send-node-heartbeat"]
    assert polls == ["activate-node", "pull-messages", "pull-messages", "deactivate-node"]
    assert capsys.readouterr().out.count("not within its hours, 20:00-06:00") == 2


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
