"""Flower's own connections, held by our own processes: the one file that leans on Flower's internals.

Flower starts a new Python, which imports torch, for every message of a site, and runs whatever code
the coordinator's bundle holds. Here a site keeps one process, and asks for no bundle: no code from the
coordinator is ever fetched. The coordinator's rounds run in a process of ours, too, no child of SuperLink's.
The protocol on the wire, its keys and its TLS are Flower's, so that a stock `flower-supernode` still joins.
`tests/test_connection.py` names what is leant on; flwr is pinned.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Message
from flwr.common.constant import SubStatus
from flwr.common.serde import run_from_proto
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.supernode.fleet_http_connection import http_request_response

log = logging.getLogger(__name__)


@dataclass
class SiteConnection:
    """A site's side of one connection to the coordinator."""

    node: int  # Flower's number of this site
    _calls: tuple[Any, ...]

    def receive(self) -> Message | None:
        """Return the next message whole, or None where there is none, its run is over, or it broke off on the way."""
        _, receive, _, _, _, pull_object, _, confirm = self._calls
        try:
            found = receive()  # what ails the connection itself ends it, and a supervisor opens another
        except RunNotRunningException:
            return None
        if found is None:
            return None
        message, tree = found
        run = message.metadata.run_id
        try:
            parts = pull_objects(
                [one.object_id for one in iterate_object_tree(tree)], lambda key: pull_object(run, key)
            )
            confirm(run, tree.object_id)
        except Exception as error:  # its run is over, or the coordinator was started anew in the middle of this
            log.warning("a message could not be taken: %s", error)
            return None
        whole = inflate_object_from_contents(tree.object_id, parts)
        assert isinstance(whole, Message)
        whole.metadata.__dict__["_message_id"] = tree.object_id
        # Flower's Message asks for the identity of the task that it is made in.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, self.node, 1
        return whole

    def answer(self, reply: Message, seconds: float) -> bool:
        """Send a reply; return whether it was taken. What is not, as its run is over, the next asking replays."""
        _, _, send, _, _, _, push_object, _ = self._calls
        run = reply.metadata.run_id
        reply.metadata.__dict__["_message_id"] = reply.object_id
        try:
            with no_object_id_recompute():
                wanted, session = send(reply, get_object_tree(reply), seconds)
                push_objects(
                    get_all_nested_objects(reply),
                    lambda key, content: push_object(run, session, key, content),
                    object_ids_to_push=wanted,
                )
        except Exception as error:  # the run is over, or its coordinator was started anew in the middle of this
            log.warning("an answer was not taken: %s", error)
            return False
        return True


@contextmanager
def connected(address: str, ca: bytes, key: EllipticCurvePrivateKey) -> Iterator[SiteConnection]:
    """Give a site's connection; it keeps itself alive, and tries again for ever where the network is down.

    address: host:port. ca: the federation's CA certificate (PEM). Where the coordinator does not know the
    key, or a restarted one no longer knows this node, Flower ends the process: run this under a supervisor.
    """
    with http_request_response(address, False, ca, (key, key.public_key())) as calls:
        yield SiteConnection(calls[0], calls)


@contextmanager
def coordinating(address: str, ca: bytes, secret: bytes, run: int) -> Iterator[Grid]:
    """Give the Grid of a submitted run of a SuperLink with `--isolation process`; leaving the block ends the run.

    address: host:port. secret: what SuperLink was started with. While SuperLink is down, calls wait and try again.
    """
    token = _claimed(address, ca, secret, run)
    grid = HttpGrid(address, False, ca, token=token)
    client = grid._runtime_client
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    output = PushTaskOutputRequest(sub_status=SubStatus.FAILED, details="the rounds stopped")
    try:
        task = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        grid.set_run(run_from_proto(task.run))
        yield grid
        output = PushTaskOutputRequest(context=task.context, sub_status=SubStatus.COMPLETED)
    finally:
        grid._retry_invoker.max_tries = 1  # on leaving, a SuperLink that is down is not waited for
        with suppress(httpx.HTTPError):
            client.PushTaskOutput(output)
        heartbeat.stop()
        grid.close()


def _claimed(address: str, ca: bytes, secret: bytes, run: int) -> str:
    """Return the token of a run's task; those of runs that a dead process left are claimed on the way, and dropped."""
    method = "/flwr.proto.Runtime/AcquireTask"
    client = RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=False,
        root_certificates=ca,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={method}),
        ],
        retry_invoker=make_simple_http_retry_invoker(),
    )
    try:
        while True:
            found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if found.token and found.task.run_id == run:
                return str(found.token)
            time.sleep(0.1)
    finally:
        client.close()


def polite_pause(since_message: float, now: float | None = None) -> float:
    """Return how long to wait before asking again, in seconds: briefly while rounds go on, longer in between.

    >>> polite_pause(100.0, now=105.0), polite_pause(100.0, now=4000.0)
    (0.2, 3.0)
    """
    idle = (time.monotonic() if now is None else now) - since_message
    return min(3.0, max(0.2, idle / 100))
