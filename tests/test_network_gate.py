"""The door before SuperLink: what a site says passes unchanged, all else does not pass.

An echo over TLS stands in for SuperLink; tests/test_network_smoke.py knocks at the real one.
"""

import contextlib
import http.client
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from conftest import serving_in_a_thread, tiny
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from wardround.connection.answers import LARGEST_MESSAGE, LARGEST_OBJECT
from wardround.errors import ConfigError
from wardround.processes import free_port
from wardround.provision import provision
from wardround.server.gate import OPEN, gate

OBJECTS = 20  # that an answer may have
PUSH = "/v1/fleet/push-messages"


def pushed(objects: int = 6, messages: int = 1, **changes: Any) -> bytes:
    """Return a request to push an answer of so many objects, itself the first; or one that differs in some."""
    said: dict[str, Any] = {"src_node_id": 7, "dst_node_id": 1, "message_id": "a" * 64, "reply_to_message_id": "b" * 64}
    tree = ObjectTree(object_id="a" * 64, children=[ObjectTree(object_id=f"{n:064d}") for n in range(objects - 1)])
    if root := changes.pop("root", ""):
        tree.object_id = root
    message = Message(metadata=Metadata(**said | changes))
    asked = PushMessagesRequest(
        node=Node(node_id=7), messages_list=[message] * messages, message_object_trees=[tree] * messages
    )
    return asked.SerializeToString()


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits")
    provision(tiny(), folder, ["lyon"])
    return folder / "coordinator"


async def echo(request: Request) -> Response:
    """Answer with the body, and with the header that a SuperNode signs with."""
    answer = {"seen-path": request.url.path, "seen-signature": request.headers.get("flwr-signature", "")}
    return Response(await request.body(), status_code=int(request.headers.get("wanted", "200")), headers=answer)


@contextlib.contextmanager
def echoing(kit: Path) -> Iterator[int]:
    port = free_port()
    app = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])])
    files = {"ssl_certfile": kit / "server.crt", "ssl_keyfile": str(kit / "server.key")}
    with serving_in_a_thread(uvicorn.Config(app, port=port, ws="none", log_config=None, **files)):
        yield port


@pytest.fixture(scope="module")
def site(kit: Path) -> Iterator[httpx.Client]:
    """Give a client that reaches the echo through the gate."""
    port = free_port()
    trust = ssl.create_default_context(cafile=kit / "ca.crt")
    with (
        echoing(kit) as superlink,
        gate(kit, "127.0.0.1", port, superlink, kit / "gate.log", OBJECTS),
        httpx.Client(base_url=f"https://localhost:{port}", verify=trust) as client,
    ):
        yield client


@pytest.mark.parametrize("path", OPEN)
def test_what_a_site_says_passes_with_its_signature(site: httpx.Client, path: str) -> None:
    said = pushed() if path == PUSH else b"hello"
    answer = site.post(path, content=said, headers={"flwr-signature": "MEUCIQ=="})
    assert (answer.status_code, answer.content) == (200, said)
    assert (answer.headers["seen-path"], answer.headers["seen-signature"]) == (path, "MEUCIQ==")


def test_an_object_of_flowers_largest_size_passes_byte_for_byte(site: httpx.Client) -> None:
    block = bytes(range(256)) * (5 * 2**20 // 256) + b"and its header"
    assert site.post("/v1/fleet/push-object", content=block).content == block


def test_superlinks_refusals_reach_the_site_as_they_are(site: httpx.Client) -> None:
    assert site.post("/v1/fleet/pull-messages", content=b"x", headers={"wanted": "401"}).status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/health",
        "/docs",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/get-run/",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/get-run/../../control/start-run",
        "//v1/control/start-run",
    ],
)
def test_nothing_else_passes(site: httpx.Client, path: str) -> None:
    raw = site.base_url.copy_with(raw_path=path.encode())  # as it stands: httpx would tidy it
    assert site.post(raw, content=b"x").status_code == 404


def test_only_posts_of_a_declared_and_bearable_length_pass(site: httpx.Client, kit: Path) -> None:
    assert site.get("/v1/fleet/get-run").status_code == 405
    assert site.post("/v1/fleet/push-object", content=iter([b"of unknown length"])).status_code == 413
    trust = ssl.create_default_context(cafile=kit / "ca.crt")
    for path, most in (("/v1/fleet/push-object", LARGEST_OBJECT), (PUSH, LARGEST_MESSAGE)):
        with contextlib.closing(http.client.HTTPSConnection("localhost", site.base_url.port, context=trust)) as line:
            line.putrequest("POST", path)
            line.putheader("Content-Length", str(most + 1))
            line.endheaders()
            assert line.getresponse().status == 413


@pytest.mark.parametrize("objects", [1, OBJECTS])
def test_an_answer_passes_up_to_its_largest_size(site: httpx.Client, objects: int) -> None:
    assert site.post(PUSH, content=pushed(objects)).status_code == 200


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(pushed(OBJECTS + 1), id="more objects than an answer has"),
        pytest.param(pushed(root="c" * 64), id="objects that belong to no message"),
        pytest.param(pushed(src_node_id=8), id="in the name of another site"),
        pytest.param(pushed(src_node_id=1, dst_node_id=8, reply_to_message_id=""), id="in the name of the server"),
        pytest.param(pushed(reply_to_message_id=""), id="an answer to nothing"),
        pytest.param(pushed(messages=2), id="two at once"),
        pytest.param(pushed(messages=0), id="none"),
        pytest.param(b"hello", id="no protobuf"),
    ],
)
def test_what_is_no_answer_of_the_asking_site_is_not_kept(site: httpx.Client, said: bytes) -> None:
    """SuperLink would keep the first two, with all that is pushed after them, and hand on what is in another's name."""
    assert site.post(PUSH, content=said).status_code == 400


def test_a_site_is_told_to_try_again_while_superlink_is_away(kit: Path) -> None:
    port, nobody = free_port(), free_port()
    trust = ssl.create_default_context(cafile=kit / "ca.crt")
    with gate(kit, "127.0.0.1", port, nobody, kit / "gate.log", OBJECTS), httpx.Client(verify=trust) as client:
        assert client.post(f"https://localhost:{port}{OPEN[0]}", content=b"x").status_code == 502


def test_a_site_is_told_to_try_again_until_the_gate_is_opened(kit: Path) -> None:
    """So before SuperLink knows the sites' keys: it would refuse them, and they would name the wrong reason."""
    port = free_port()
    trust = ssl.create_default_context(cafile=kit / "ca.crt")
    with (
        echoing(kit) as superlink,
        gate(kit, "127.0.0.1", port, superlink, kit / "gate.log", OBJECTS) as door,
        httpx.Client(verify=trust) as client,
    ):
        door.opened.clear()
        assert client.post(f"https://localhost:{port}{OPEN[0]}", content=b"x").status_code == 503
        door.opened.set()
        assert client.post(f"https://localhost:{port}{OPEN[0]}", content=b"x").status_code == 200


def test_a_port_that_is_taken_is_said_and_not_shared(kit: Path) -> None:
    port, log = free_port(), kit / "gate.log"
    taken = pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be listened on: address already in use")
    with gate(kit, "127.0.0.1", port, 9, log, OBJECTS), taken, gate(kit, "127.0.0.1", port, 9, log, OBJECTS):
        pass
