"""The coordinator's side: the Grid of a run of SuperLink's, in the process of the rounds."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import httpx
from flwr.app import Message
from flwr.common.constant import SubStatus
from flwr.common.serde import run_from_proto
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from wardround.errors import UpdateError
from wardround.update import printable

log = logging.getLogger(__name__)


class CheckedGrid(HttpGrid):
    """Flower's Grid, but that a reply which it cannot read is an error of its own kind.

    SuperLink looks at the heads of a reply's objects alone. What is in them is first read here, by parsers that
    raise what they like, and a site has the choice.
    """

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to messages, as far as there are any; ask for one at a time, to know whose is wrong.

        Raises UpdateError where Flower cannot read them. SuperLink has forgotten them by then.
        """
        try:
            return super().pull_messages(message_ids)
        except (httpx.HTTPError, RunNotRunningException):  # of the way to SuperLink, which is no site's doing
            raise
        except Exception as error:
            log.info("Flower cannot read an answer: %s", printable(repr(error))[:500])
            raise UpdateError(f"Flower cannot read the answer ({type(error).__name__}); it was altered.") from error


@contextmanager
def coordinating(address: str, ca: bytes, secret: bytes, run: int) -> Iterator[Grid]:
    """Give the Grid of a submitted run of a SuperLink with `--isolation process`; leaving the block ends the run.

    address: host:port. secret: what SuperLink was started with. While SuperLink is down, calls wait and try again.
    """
    token = _claimed(address, ca, secret, run)
    grid = CheckedGrid(address, False, ca, token=token)
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
