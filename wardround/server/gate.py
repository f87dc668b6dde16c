"""The one door to SuperLink: a TLS reverse proxy that lets through only what a SuperNode says.

SuperLink 1.41 serves sites, the Flower CLI and its own processes on one port, and asks only sites
for a credential: whoever reaches that port can list runs, register keys and run code at every site.
So SuperLink listens on loopback, and this door, which knows ten paths, listens for sites. Of what they push it
lets through only answers, of a size that answers have: SuperLink would keep anything.
"""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from wardround.connection.answers import LARGEST_MESSAGE, LARGEST_OBJECT, is_answer
from wardround.errors import ConfigError, WardroundError
from wardround.logs import JsonFormatter, as_json
from wardround.processes import open_log

# All that a SuperNode with a registered key asks for; SuperLink checks the key on each of them.
# Left out: register-node and unregister-node, with which a node could let itself in.
OPEN = tuple(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "pull-object",
        "push-object",
        "confirm-message-received",
    )
)
_PUSH = "/v1/fleet/push-messages"
_HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host"}  # RFC 9110, 7.6.1
_PATIENCE = 10.0  # seconds


@dataclass(frozen=True)
class Gate:
    """A gate that listens."""

    kit: Path
    server: uvicorn.Server
    opened: threading.Event  # not set: sites are told to try again

    def renew(self) -> None:
        """Take the kit's certificate anew, for every connection from now on; none is cut."""
        assert self.server.config.ssl is not None, "it has started"
        try:
            self.server.config.ssl.load_cert_chain(self.kit / "server.crt", self.kit / "server.key")
        except OSError as error:
            raise ConfigError(
                f"{self.kit}: server.crt and server.key do not fit each other; put the right ones back."
            ) from error


@contextlib.contextmanager
def gate(kit: Path, host: str, port: int, superlink: int, log: Path, objects: int) -> Iterator[Gate]:
    """Serve sites on host:port, in a thread, and pass them on to SuperLink's loopback port.

    objects: how many of Flower's a site's answer may have (see `most_objects`).
    Raises ConfigError where the address cannot be listened on.
    """
    try:
        door = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"{host}:{port} cannot be listened on: {reason}; free it, or give another one.") from error
    open_log(log).close()  # for its mode
    opened = threading.Event()
    opened.set()
    server = uvicorn.Server(
        uvicorn.Config(
            _app(f"https://127.0.0.1:{superlink}", opened, ssl.create_default_context(cafile=kit / "ca.crt"), objects),
            ssl_certfile=kit / "server.crt",
            ssl_keyfile=str(kit / "server.key"),
            timeout_keep_alive=60,  # a SuperNode that has nothing to do asks every three seconds
            timeout_graceful_shutdown=1,
            ws="none",
            server_header=False,
            log_config=_log_config(log),
            access_log=False,
        )
    )

    thread = threading.Thread(target=server.run, args=([door],), name="gate", daemon=True)
    with door:
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise WardroundError(f"the gate on {host}:{port} did not open; see {log}.")
                time.sleep(0.02)
            yield Gate(kit, server, opened)
        finally:
            server.should_exit = True
            thread.join(_PATIENCE)


def _app(superlink: str, opened: threading.Event, trust: ssl.SSLContext, objects: int) -> Starlette:
    client = httpx.AsyncClient(base_url=superlink, verify=trust, timeout=60.0, trust_env=False)

    async def forward(request: Request) -> Response:
        """Pass a request on and its answer back, chunk by chunk: no body but a message's short one is held whole."""
        if not opened.is_set():
            return Response(status_code=503)  # SuperNodes try again
        path, length = request.url.path, request.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > (LARGEST_MESSAGE if path == _PUSH else LARGEST_OBJECT):
            return Response(status_code=413)
        headers = [(name, value) for name, value in request.headers.items() if name not in _HOP_BY_HOP]
        try:
            if path == _PUSH and not is_answer(await request.body(), objects):
                return Response(status_code=400)
            outgoing = client.build_request("POST", path, headers=headers, content=request.stream())
            answer = await client.send(outgoing, stream=True)
        except (httpx.TransportError, ClientDisconnect):
            return Response(status_code=502)  # SuperNodes try again
        kept = {name: value for name, value in answer.headers.items() if name not in _HOP_BY_HOP}
        return StreamingResponse(answer.aiter_raw(), answer.status_code, kept, background=BackgroundTask(answer.aclose))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    app = Starlette(routes=[Route(path, forward, methods=["POST"]) for path in OPEN], lifespan=lifespan)
    app.router.redirect_slashes = False
    return app


def _log_config(log: Path) -> dict[str, Any]:
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "line": {"()": JsonFormatter} if as_json() else {"format": "%(asctime)s %(levelname)s %(message)s"}
        },
        "handlers": {"file": {"class": "logging.FileHandler", "filename": str(log), "formatter": "line"}},
        "loggers": {"uvicorn": {"handlers": ["file"], "level": "INFO", "propagate": False}},
    }
