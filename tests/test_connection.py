"""What connection/ leans on inside Flower: where a new release moves it, this says so before a hospital does."""

import contextlib
import inspect
import itertools
import time
from base64 import b64decode
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from importlib.metadata import version
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from conftest import ROOT, known_at, serving_in_a_thread, tiny
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import (
    HEARTBEAT_BASE_MULTIPLIER,
    HEARTBEAT_CALL_TIMEOUT,
    HEARTBEAT_DEFAULT_INTERVAL,
    HEARTBEAT_RANDOM_RANGE,
    TIMESTAMP_HEADER,
)
from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    DeactivateNodeResponse,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.primitives.asymmetric import verify_signature
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from google.protobuf.message import Message as ProtobufMessage
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from wardround.connection import site as connection
from wardround.connection.answers import LARGEST_MESSAGE, LARGEST_OBJECT, is_answer, most_objects
from wardround.connection.clock import CoordinatorsClock
from wardround.processes import free_port
from wardround.provision import provision
from wardround.wire import answer_to_records

BEAT = connection._BEAT


def test_flower_is_the_release_that_this_was_written_for() -> None:
    assert version("flwr").startswith("1.41."), "read connection/ against the new release, then move the pin"


def test_a_client_of_the_fleet_takes_what_it_is_given() -> None:
    asked = list(inspect.signature(FleetHttpClient.from_server_address).parameters)
    assert asked[:4] == ["server_address", "insecure", "root_certificates", "interceptors"]


def test_stock_supernodes_sign_what_we_sign() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    signed = []
    for signature in (NodeAuthHttpInterceptor(key, key.public_key()), CoordinatorsClock(key)):
        request = httpx.Request("POST", "https://coordinator/v1/fleet/pull-messages")
        signature.intercept(ProtobufRequestContext("", Node(), request), lambda _: httpx.Response(200))
        stamp, proof = request.headers[TIMESTAMP_HEADER], b64decode(request.headers[FLEET_HTTP_SIGNATURE_HEADER])
        assert verify_signature(key.public_key(), stamp.encode(), proof)
        assert abs(datetime.fromisoformat(stamp).timestamp() - time.time()) < 5
        signed.append((sorted(request.headers), request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER]))
    assert signed[0] == signed[1]


@pytest.mark.parametrize("date", ["", "yesterday", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_refusal_whose_date_is_none_leaves_the_clock_as_it_is(date: str) -> None:
    clock = CoordinatorsClock(ec.generate_private_key(ec.SECP384R1()))
    request, calls = httpx.Request("POST", "https://coordinator/v1/fleet/pull-messages"), list[httpx.Request]()

    def refuse(context: ProtobufRequestContext) -> httpx.Response:
        calls.append(context.request)
        return httpx.Response(401, headers={"date": date})

    assert clock.intercept(ProtobufRequestContext("", Node(), request), refuse).status_code == 401
    assert clock.ahead == 0.0 and len(calls) == 1


@pytest.mark.parametrize(
    ("client", "calls"),
    [
        (
            FleetHttpClient,
            {
                "ActivateNode",
                "DeactivateNode",
                "SendNodeHeartbeat",
                "PullMessages",
                "PushMessages",
                "PullObject",
                "PushObject",
                "ConfirmMessageReceived",
            },
        ),
        (RuntimeHttpClient, {"AcquireTask", "PullTaskInput", "PushTaskOutput", "SendTaskHeartbeat", "GetNodes"}),
    ],
)
def test_the_calls_that_are_made_are_there(client: type, calls: set[str]) -> None:
    assert calls <= set(dir(client))


def test_the_grid_has_the_client_and_the_retries_that_are_taken_from_it() -> None:
    grid = HttpGrid("127.0.0.1:1", True, token="x")
    assert isinstance(grid._runtime_client, RuntimeHttpClient)
    assert grid._retry_invoker.max_tries is None, "while SuperLink is down, calls wait"
    grid.close()


def test_no_code_of_the_coordinators_is_asked_for() -> None:
    source = "".join(path.read_text() for path in (ROOT / "wardround" / "connection").glob("*.py"))
    assert "PullMessages" in source and "get_fab" not in source and "install_from_fab" not in source


class Scripted:
    """A Fleet service over TLS that answers as it is told, then as SuperLink would to a site with nothing to do.

    SuperLink loses no answer and fills no disk on demand; benchmarks/chaos.py breaks the real one.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.said: list[bytes] = []
        self.stamps: list[float] = []
        self.script: dict[str, list[Response]] = {}

    async def answer(self, request: Request) -> Response:
        self.said.append(await request.body())
        name = request.url.path.rpartition("/")[2]
        self.asked.append(name)
        self.stamps.append(datetime.fromisoformat(request.headers[TIMESTAMP_HEADER]).timestamp())
        return (self.script.get(name) or [said(DEFAULTS[name])]).pop(0)


DEFAULTS = {
    "activate-node": ActivateNodeResponse(node_id=7),
    "deactivate-node": DeactivateNodeResponse(),
    "send-node-heartbeat": SendNodeHeartbeatResponse(success=True),
    "pull-messages": PullMessagesResponse(),
    "push-messages": PushMessagesResponse(objects_to_push=[], session_id="s"),
    "push-object": PushObjectResponse(stored=True),
}


def said(message: ProtobufMessage) -> Response:
    return Response(message.SerializeToString(), media_type="application/x-protobuf")


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits")
    provision(tiny(), folder, ["lyon"])
    return folder


@contextlib.contextmanager
def serving(fleet: Scripted, kits: Path) -> Iterator[int]:
    """Give the port of a scripted service."""
    port, kit = free_port(), kits / "coordinator"
    app = Starlette(routes=[Route("/v1/fleet/{name}", fleet.answer, methods=["POST"])])
    files = {"ssl_certfile": kit / "server.crt", "ssl_keyfile": str(kit / "server.key")}
    with serving_in_a_thread(uvicorn.Config(app, port=port, ws="none", log_config=None, date_header=False, **files)):
        yield port


@contextlib.contextmanager
def to(
    fleet: Scripted, kits: Path, last: int | None = None, pulse: Path | None = None
) -> Iterator[connection.SiteConnection]:
    """Give a site's connection to a scripted service."""
    key = load_ssh_private_key((kits / "lyon" / "site.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    with (
        serving(fleet, kits) as port,
        connection.connected(known_at(kits, f"localhost:{port}"), key, last, pulse=pulse) as made,
    ):
        yield made


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_AWAY", 0.01)
    monkeypatch.setattr(connection, "_BEAT", 0.01)
    monkeypatch.setattr(connection, "_DOUBT", 0.0)
    monkeypatch.setattr(connection, "_LONGEST_PAUSE", 0.01)


def reply(content: RecordDict | None = None) -> Message:
    """Return an answer to a message of the coordinator's; of a kilobyte, unless its content is given."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 7, 1
    asked = Message(RecordDict(), dst_node_id=7, message_type="train")
    asked.metadata.__dict__["_message_id"] = "asked"
    return Message(content or RecordDict({"update": ConfigRecord({"block": bytes(1000)})}), reply_to=asked)


def test_a_clock_that_is_wrong_is_set_by_the_refusal_and_the_call_is_repeated(kits: Path) -> None:
    fleet, hour = Scripted(), 3600.0
    date = format_datetime(datetime.fromtimestamp(time.time() - hour, UTC), usegmt=True)
    fleet.script["activate-node"] = [Response(status_code=401, headers={"date": date}), said(DEFAULTS["activate-node"])]
    with to(fleet, kits) as made:
        assert made.node == 7
        answer = reply()
        created, over = answer.metadata.created_at, answer.metadata.created_at + answer.metadata.ttl
        made.answer(answer)
    assert fleet.asked[:2] == ["activate-node", "activate-node"]
    assert fleet.stamps[0] - fleet.stamps[1] == pytest.approx(hour, abs=3)
    assert created - answer.metadata.created_at == pytest.approx(hour, abs=3)
    assert answer.metadata.created_at + answer.metadata.ttl == pytest.approx(over), "it is void when it was"


def test_a_key_that_is_not_known_is_no_matter_of_clocks(kits: Path) -> None:
    fleet = Scripted()
    fleet.script["activate-node"] = [Response(status_code=401)]
    with pytest.raises(ConnectionRefusedError, match="does not know its key"), to(fleet, kits):
        pass
    assert fleet.asked == ["activate-node"]


def test_a_heart_beats_on_after_a_server_that_could_not_write(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flwr.supercore.heartbeat.exponential", lambda max_delay: itertools.repeat(0.01))
    fleet = Scripted()
    fleet.script["send-node-heartbeat"] = [Response(status_code=500), said(DEFAULTS["send-node-heartbeat"])]
    with to(fleet, kits):
        deadline = time.monotonic() + 20
        while fleet.asked.count("send-node-heartbeat") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_only_a_beat_that_was_heard_leaves_its_time(kits: Path, tmp_path: Path) -> None:
    """A container's health check reads it."""
    fleet, pulse = Scripted(), tmp_path / "beat"
    fleet.script["send-node-heartbeat"] = [Response(status_code=500)] * 3
    with to(fleet, kits, pulse=pulse) as made:
        assert not made.beat()
        assert not pulse.exists()
        while not made.beat():  # the heart of its own has taken one or the other refusal
            pass
        assert abs(pulse.stat().st_mtime - time.time()) < 5


def test_a_poll_whose_answer_may_be_lost_makes_the_site_hang_up_and_come_back(kits: Path) -> None:
    fleet = Scripted()
    with to(fleet, kits) as made:
        made.receive()
        assert "deactivate-node" not in fleet.asked
        fleet.script["pull-messages"] = [Response(status_code=502)]
        made.receive()
        gone = fleet.asked.index("deactivate-node")
        assert "send-node-heartbeat" in fleet.asked[gone:]


def test_who_was_killed_takes_its_own_place_again(kits: Path) -> None:
    fleet = Scripted()
    fleet.script["activate-node"] = [Response(status_code=412), said(DEFAULTS["activate-node"])]
    with to(fleet, kits, last=7) as made:
        assert made.node == 7
    assert fleet.asked[:3] == ["activate-node", "deactivate-node", "activate-node"]


def test_who_lives_keeps_its_place(kits: Path) -> None:
    fleet = Scripted()
    fleet.script["activate-node"] = [Response(status_code=412), Response(status_code=412)]
    with pytest.raises(ConnectionRefusedError, match="another container of this site"), to(fleet, kits, last=7):
        pass


def test_a_living_site_beats_while_another_waits_for_its_place() -> None:
    assert (HEARTBEAT_DEFAULT_INTERVAL - HEARTBEAT_CALL_TIMEOUT) * (
        HEARTBEAT_BASE_MULTIPLIER + max(HEARTBEAT_RANDOM_RANGE)
    ) < BEAT


def test_of_an_answer_that_broke_off_the_rest_is_sent(kits: Path) -> None:
    fleet, answer = Scripted(), reply()
    lacking = PushMessagesResponse(objects_to_push=[answer.object_id], session_id="s")
    fleet.script["push-messages"] = [said(lacking), said(lacking)]
    fleet.script["push-object"] = [said(PushObjectResponse(stored=False)), said(PushObjectResponse(stored=True))]
    with to(fleet, kits) as made:
        assert made.answer(answer)
    assert [name for name in fleet.asked if name.startswith("push")] == ["push-messages", "push-object"] * 2


@pytest.mark.parametrize("state", [1_000, 40_000_000])
def test_the_largest_answer_of_a_site_passes_the_gate_with_room_to_spare(kits: Path, state: int) -> None:
    """An update of float32 with control variates, which zstd does not make smaller."""
    fleet, block = Scripted(), np.random.default_rng(0).bytes(2 * state + 1_000_000)
    answer = reply(answer_to_records(block, "lyon", "1", None))
    with to(fleet, kits) as made:
        made.answer(answer)
    said = fleet.said[fleet.asked.index("push-messages")]
    largest = len(get_all_nested_objects(answer))
    assert is_answer(said, largest) and not is_answer(said, largest - 1)
    assert largest <= most_objects(state) <= 3 * largest and len(said) < LARGEST_MESSAGE / 10
    assert max(len(one.deflate()) for one in get_all_nested_objects(answer).values()) < LARGEST_OBJECT - 2**19


def test_an_answer_that_nobody_waits_for_is_said_to_be_so(kits: Path) -> None:
    fleet = Scripted()
    with to(fleet, kits) as made:
        assert not made.answer(reply())
    asked = PushMessagesRequest.FromString(fleet.said[fleet.asked.index("push-messages")])
    assert list(asked.clientapp_runtime_list) == [0.0], "how long a site trains tells of its images"
