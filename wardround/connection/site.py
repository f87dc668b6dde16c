"""A site's side: messages received, answers sent, for ever tried again where the network is down."""

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient

from wardround.config.site import CoordinatorConfig
from wardround.connection.clock import CoordinatorsClock
from wardround.connection.meter import Meter
from wardround.connection.way import way

log = logging.getLogger(__name__)
Asked = TypeVar("Asked")
Answered = TypeVar("Answered")

_LONGEST_PAUSE = 20.0  # seconds between two tries
_SENDINGS = 7  # of one answer, each of what then still lacks; a minute or two
_AWAY = 3.0  # seconds; the rounds' process looks five times a second
_BEAT = 24.0  # seconds; Flower's hearts beat every 17.5 to 22.5
_DOUBT = 30.0  # seconds without a message, after one may have been lost
_SOON, _SELDOM = 0.2, 3.0  # seconds between two questions for a message
_UNKNOWN = "does not know its key"
_PROXY_REMEDIES = {
    "403": "; have the coordinator's address allowed there",
    "407": "; [coordinator] proxy_credentials names the file with its USER:PASSWORD",
}
_MOST_OBJECTS = 800  # of a message, 5 MiB each: a state of four gigabytes


class SiteConnection:
    """A site's side of one connection to the coordinator; `connected` makes it."""

    def __init__(self, client: FleetHttpClient, clock: CoordinatorsClock, pulse: Path | None) -> None:
        self.node = 0  # Flower's number of this site
        self._client, self._clock, self._pulse = client, clock, pulse
        self._doubt, self._lost_at = _DOUBT, float("inf")
        self.way = ""  # how the coordinator is reached, for what is said of it

    def receive(self) -> Message | None:
        """Return the next message whole, or None where there is none, its run is over, or it broke off on the way.

        Raises ConnectionRefusedError where the coordinator does not know this site.
        """
        found = self._patiently(self._client.PullMessages, PullMessagesRequest(node=self._me), self._suspect)
        if not found.messages_list:
            if time.monotonic() > self._lost_at:
                self._hang_up(_AWAY)
                self.beat()
            return None
        run, tree = found.messages_list[0].metadata.run_id, found.message_object_trees[0]
        objects = [one.object_id for one in iterate_object_tree(tree)]
        if len(objects) > _MOST_OBJECTS:
            log.warning("a message of %d objects is not taken: no state is so large", len(objects))
            return None
        pull = partial(self._patiently, self._client.PullObject)
        confirm = partial(self._patiently, self._client.ConfirmMessageReceived)
        try:
            parts = pull_objects(objects, make_pull_object_fn_protobuf(pull, self._me, run))
            make_confirm_message_received_fn_protobuf(confirm, self._me, run)(tree.object_id)
        except RunNotRunningException:
            return None
        except (ObjectPullError, httpx.HTTPStatusError) as error:
            log.warning("a message could not be taken: %s", error)
            self._suspect()
            return None
        self._doubt, self._lost_at = _DOUBT, float("inf")
        whole = inflate_object_from_contents(tree.object_id, parts)
        assert isinstance(whole, Message)
        whole.metadata.__dict__["_message_id"] = tree.object_id
        # Flower's Message asks for the identity of the task that it is made in.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, self.node, 1
        return whole

    def answer(self, reply: Message) -> bool:
        """Send a reply; return whether it was taken. What is not, as its run is over, the next asking replays.

        Raises ConnectionRefusedError where the coordinator does not know this site.
        """
        run = reply.metadata.run_id
        self._clock.date(reply)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            asked = PushMessagesRequest(
                node=self._me,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[0.0],  # how long it trained tells of its images; see `Declared`
            )
            push = partial(self._patiently, self._client.PushObject)
            try:
                for sending in range(_SENDINGS):
                    told = self._patiently(self._client.PushMessages, asked)
                    lacking, session = set(told.objects_to_push), told.session_id
                    if not lacking:  # at first: nobody waits for this any more; later: it is there whole
                        return sending > 0
                    # Refused is also what is sent twice, as word of the first was lost on the way.
                    with suppress(ObjectPushError):
                        send = make_push_object_fn_protobuf(push, self._me, run, session)
                        push_objects(get_all_nested_objects(reply), send, object_ids_to_push=lacking)
                        return True
                    time.sleep(2.0**sending)  # the coordinator's disk may be full
                self._suspect()
            except (RunNotRunningException, httpx.HTTPStatusError) as error:
                log.warning("an answer was not taken: %s", str(error) or "its run is over")
        return False

    def activate(self, key: EllipticCurvePrivateKey, last: int | None) -> None:
        """Be counted as connected by the coordinator; in the place of a process of this site's that was killed.

        last: the number that this site had before. Raises ConnectionRefusedError where the key is not known.
        """
        asked = ActivateNodeRequest(
            public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        activate = partial(self._patiently, self._client.ActivateNode, asked)
        for before in (last, None):
            try:
                self.node = activate().node_id
                return
            except httpx.HTTPStatusError as error:
                if before is None:
                    raise ConnectionRefusedError(
                        f"the coordinator {_UNKNOWN}, or another container of this site uses it: stop that one"
                    ) from error
            # Who is killed counts as online for another minute, and may have taken a message with it. Who lives
            # beats in between, is online again, and keeps its place.
            self.node = before
            self._hang_up(_BEAT)

    def beat(self) -> bool:
        """Say that this site is there; return whether it was heard."""
        asked = SendNodeHeartbeatRequest(node=self._me, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        try:
            heard = bool(self._client.SendNodeHeartbeat(asked).success)
            if heard and self._pulse is not None:
                self._pulse.touch()
            return heard
        # Raised, they would end the thread, and a site that does not beat is never asked again.
        except (httpx.HTTPError, OSError):
            return False

    @property
    def _me(self) -> Node:
        return Node(node_id=self.node)

    def _suspect(self) -> None:
        """Note that a message may have been lost on the way: the coordinator sends none twice."""
        self._lost_at = time.monotonic() + self._doubt

    def _hang_up(self, seconds: float) -> None:
        """Be gone for a while, which tells the coordinator that this site does not have what it was sent.

        Until a message comes this is done again, ever more seldom, for the coordinator may not have been looking.
        """
        with suppress(httpx.HTTPStatusError):  # it is gone already
            self._patiently(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self.node))
        time.sleep(seconds)
        self._doubt *= 2
        self._lost_at = time.monotonic() + self._doubt

    def _patiently(
        self, call: Callable[[Asked], Answered], asked: Asked, failed: Callable[[], None] = lambda: None
    ) -> Answered:
        """Return a call's answer, tried again while the network or the coordinator is away; `failed` hears of each try.

        Raises RunNotRunningException where the run is over, ConnectionRefusedError where this site is not known.
        """
        pause = 1.0
        while True:
            try:
                answer = call(asked)
            except httpx.HTTPError as error:
                why = f"{self.way}{_passing(error)}"
            else:
                if pause > 1.0:
                    log.warning("the coordinator is reached again")
                return answer
            log.warning("the coordinator cannot be reached (%s)", why)
            failed()
            time.sleep(random.uniform(0.5, 1.0) * pause)  # noqa: S311  # not all sites at once
            pause = min(_LONGEST_PAUSE, 2 * pause)


def _passing(error: httpx.HTTPError) -> str:
    """Return the reason of an error that time may cure; raise what it will not."""
    if isinstance(error, httpx.HTTPStatusError):
        status = error.response.status_code
        if status == httpx.codes.FORBIDDEN:
            raise RunNotRunningException from error
        if status == httpx.codes.UNAUTHORIZED:
            raise ConnectionRefusedError(f"the coordinator {_UNKNOWN}, or was started anew") from error
        if status < 500:
            raise error
        return f"it answers {status}"  # its disk may be full, or its database be locked for a moment
    if "certificate" in str(error):
        raise error
    if isinstance(error, httpx.ProxyError):
        return f"it answers {error}{_PROXY_REMEDIES.get(str(error)[:3], '')}"
    return str(error) or type(error).__name__


@contextmanager
def connected(
    found: CoordinatorConfig,
    key: EllipticCurvePrivateKey,
    last: int | None = None,
    megabits: float | None = None,
    pulse: Path | None = None,
) -> Iterator[SiteConnection]:
    """Give a site's connection; it keeps itself alive, and tries again for ever where the network is down.

    last: the number that this site had before. pulse: a file whose time is that of the last beat that was heard; a
    container's health check reads it. megabits: the most a second, each way; below 0.5, SuperLink tires of an object
    of 5 MiB, after three minutes.
    Raises ConnectionRefusedError where the coordinator does not know the key, as may any call on the connection
    after the coordinator began anew: run this under a supervisor.
    """
    clock = CoordinatorsClock(key)
    version = RuntimeVersionHttpInterceptor(component_name="SuperNode")
    ca = found.ca_certificate.read_bytes()
    with FleetHttpClient.from_server_address(found.address, False, ca, [version, clock]) as client:
        before = client._client  # asks the environment for a proxy, which anybody may have set
        client._client = way(found, before.timeout)
        before.close()
        meter = Meter(megabits)
        client._client.event_hooks = {"request": [meter.on_request], "response": [meter.on_response]}
        connection = SiteConnection(client, clock, pulse)
        connection.way = f"by the proxy {found.proxy}: " if found.proxy else ""
        connection.activate(key, last)
        heart = HeartbeatSender(connection.beat)
        heart.start()
        try:
            yield connection
        finally:
            heart.stop()
            with suppress(httpx.HTTPError):
                client.DeactivateNode(DeactivateNodeRequest(node_id=connection.node))


def polite_pause(idle: float, before: float = 0.0) -> float:
    """Return how long to wait before asking again, in seconds, after so many without a message.

    `before` is how long the last message let wait: this one, of a round like it, is looked for in earnest from
    four fifths of that on, and until then after a twentieth of it, at most a second, so that a long round costs few
    requests and a short one is not late.

    >>> polite_pause(5.0), polite_pause(4000.0)
    (0.2, 3.0)
    >>> polite_pause(5.0, before=20.0), round(polite_pause(15.5, before=20.0), 1), polite_pause(1.0, before=3.0)
    (1.0, 0.5, 0.2)
    """
    return max(_SOON, min(1.0, before / 20, 0.8 * before - idle), min(_SELDOM, idle / 100))
