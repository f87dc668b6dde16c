"""What connection.py leans on inside Flower: where a new release moves it, this says so before a hospital does."""

import inspect
from importlib.metadata import version

import pytest
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.fleet_http_client import FleetHttpClient

from wardround import connection


def test_flower_is_the_release_that_this_was_written_for() -> None:
    assert version("flwr").startswith("1.41."), "read connection.py against the new release, then move the pin"


def test_a_sites_connection_takes_and_gives_what_it_did() -> None:
    asked = list(inspect.signature(fleet_http_connection.http_request_response).parameters)
    assert asked[:4] == ["server_address", "insecure", "root_certificates", "authentication_keys"]
    given = inspect.getsource(fleet_http_connection.http_request_response).rpartition("yield (")[2]
    names = [line.strip().rstrip(",") for line in given.splitlines()[1:9]]
    assert names == ["node.node_id", "receive", "send", "get_run", "get_fab", "pull_object", "push_object",
                     "confirm_message_received"]  # fmt: skip


def test_stock_supernodes_use_the_same_connection() -> None:
    assert start_client_internal.http_request_response is fleet_http_connection.http_request_response


@pytest.mark.parametrize(
    ("client", "calls"),
    [
        (FleetHttpClient, {"ActivateNode", "SendNodeHeartbeat", "PullMessages", "PushMessages", "PullObject"}),
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
    source = inspect.getsource(connection)
    assert "get_fab" not in source and "install_from_fab" not in source
