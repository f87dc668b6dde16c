"""A real MLflow server on loopback: what SQLite in the same process cannot show."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import requests
import timm
import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image
from released import PIN, write_release
from timm.models import save_for_hf

from wardround.errors import ConfigError, TrackingError
from wardround.registry import release
from wardround.registry.mlflow_store import Store

pytestmark = pytest.mark.slow
ARGUMENTS = {"img_size": 16, "patch_size": 8, "in_chans": 1, "depth": 1, "embed_dim": 24, "num_heads": 2}
SMALL = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


class Server:
    """An `mlflow server` process that can be stopped and started again at the same address."""

    def __init__(self, folder: Path, options: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        self.options, self.environment = options, {**os.environ, **SMALL, **(environment or {})}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        self.address = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port)]
        stores = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination", "artifacts"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *stores, *self.options], cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=1):
                    return
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server"))
    yield started
    started.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A release as the backbones write it."""
    torch.manual_seed(0)
    folder = tmp_path / "release"
    model = timm.create_model("vit_tiny_patch16_224", **ARGUMENTS, num_classes=0)
    save_for_hf(model, str(folder), model_args=ARGUMENTS, safe_serialization=True)
    (folder / "provenance.json").write_text(json.dumps({"sha256": release.file_hashes(folder)}))
    return folder


TWO_LINES = """
import sys
sys.modules["wardround"] = None  # an import of it raises
import mlflow, timm, torch
p = mlflow.artifacts.download_artifacts("models:/NAME@alias")
model = timm.create_model(f"local-dir:{p}", pretrained=True, num_classes=3)
torch.save(model.state_dict(), sys.argv[1])
"""


def test_a_federation_is_tracked_and_its_release_pulled_over_http(server: Server, folder: Path, tmp_path: Path) -> None:
    """Only a server proxies artifacts, checks a version's source and answers over HTTP."""
    Image.new("L", (8, 8)).save(tmp_path / "recon.png")
    store = Store(server.address)
    run = store.open_run("lungs", "p" * 64, {"seed": "1"}, {"config.toml": "format = 1"})
    for _ in range(2):
        store.log_round(run, 1, {"loss": 1.0}, {"recon": tmp_path / "recon.png"})
        assert store.register(folder, "NAME", "alias", run, {"round": "1"}, {"auc": 0.75}) == "1"
    assert store.open_run("lungs", "p" * 64, {}, {}) == run
    store.close_run(run, "FINISHED")
    row = store.models()[0]
    assert (row.name, row.aliases, row.round, row.metrics) == ("NAME", ("alias",), 1, {"auc": 0.75})
    assert release.file_hashes(store.pull("NAME@alias", tmp_path / "pulled")) == release.file_hashes(folder)
    assert store.register(folder, "OTHER", "alias", None, {}, {}) == "1"  # the server looks for no run of it
    with pytest.raises(ConfigError, match="the nearest are: NAME"):
        store.pull("NAMES@alias", tmp_path / "none")
    (tmp_path / "cwd").mkdir()
    subprocess.run(
        [sys.executable, "-I", "-c", TWO_LINES, str(tmp_path / "weights.pt")],
        cwd=tmp_path / "cwd",
        env={**os.environ, **SMALL, "MLFLOW_TRACKING_URI": server.address},
        check=True,
    )
    expected = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).state_dict()
    found = torch.load(tmp_path / "weights.pt")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_round_that_the_server_missed_is_logged_when_it_is_back(server: Server) -> None:
    """Only a process that dies shows that the error comes in seconds and that the same call then succeeds."""
    store = Store(server.address)
    run = store.open_run("outage", "p" * 64, {}, {})
    store.log_round(run, 1, {"loss": 1.0}, {})
    server.stop()
    started = time.monotonic()
    with pytest.raises(TrackingError, match="does not answer"):
        store.log_round(run, 2, {"loss": 0.5}, {})
    assert time.monotonic() - started < 5
    server.start()
    store.log_round(run, 2, {"loss": 0.5}, {})
    store.close_run(run, "FINISHED")


AUTH = """
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///auth.db
admin_username = coordinator
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
"""
PASSWORDS = {"coordinator": "of-the-coordinator", "team": "of-a-downstream-team"}


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Server]:
    """A server that asks for a name and a password, and grants nothing by itself."""
    (tmp_path / "auth.ini").write_text(AUTH)
    environment = {
        "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORDS["coordinator"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the pages",
    }
    started = Server(tmp_path, ["--app-name", "basic-auth"], environment)
    yield started
    started.stop()


def test_a_downstream_team_reads_releases_and_none_of_the_hospitals_runs(
    guarded: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only MLflow's own basic auth shows what a grant opens; docs/releases.md has these grants."""

    def become(user: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS[user])

    def asked(way: str, path: str) -> int:
        return requests.request(
            way, f"{guarded.address}{path}", auth=("team", PASSWORDS["team"]), timeout=10
        ).status_code

    become("coordinator")
    store, client = Store(guarded.address), MlflowClient(guarded.address, guarded.address)
    run = store.open_run("lungs", "p" * 64, {"seed": "1"}, {"federation.json": "{}"})
    store.log_round(run, 1, {"loss": 1.0, "lyon/loss": 2.0}, {})
    store.register(write_release(tmp_path / "r", "lungs", 1), "lungs", "champion", run, {"round": "1"}, {"loss": 1.0})
    federation = client.get_experiment_by_name("lungs").experiment_id
    releases = client.get_experiment_by_name("releases/lungs").experiment_id

    def grant(path: str, **what: str) -> None:
        admin = ("coordinator", PASSWORDS["coordinator"])
        requests.post(f"{guarded.address}/api{path}", json=what, auth=admin, timeout=10).raise_for_status()

    grant("/2.0/mlflow/users/create", username="team", password=PASSWORDS["team"])
    become("team")
    with pytest.raises(ConfigError, match="there is no 'lungs'"):
        store.pull("lungs@champion", tmp_path / "none")
    grants = {"username": "team", "permission": "READ"}
    grant("/3.0/mlflow/users/permissions/grant", resource_type="registered_model", resource_id="lungs", **grants)
    with pytest.raises(TrackingError, match="403"):
        store.pull("lungs@champion", tmp_path / "none")
    grant("/3.0/mlflow/users/permissions/grant", resource_type="experiment", resource_id=releases, **grants)

    assert [row.metrics for row in store.models()] == [{"loss": 1.0}]
    assert release.signer(store.pull("lungs@champion", tmp_path / "pulled", PIN)) == PIN
    hidden: list[Callable[[], object]] = [
        lambda: client.get_run(run),
        lambda: client.get_experiment(federation),
        lambda: client.get_metric_history(run, "lyon/loss"),
        lambda: client.list_artifacts(run),
        lambda: client.set_registered_model_alias("lungs", "champion", "1"),
        lambda: client.set_model_version_tag("lungs", "1", "wardround.champion.0001", "{}"),
    ]
    for call in hidden:
        with pytest.raises(MlflowException, match="403"):
            call()
    assert client.search_runs([federation, releases]) == [] and client.search_logged_models([federation]) == []
    assert [one.name for one in client.search_experiments()] == ["releases/lungs"]
    artifacts = "/api/2.0/mlflow-artifacts/artifacts"
    assert asked("GET", f"{artifacts}/{federation}/{run}/artifacts/federation.json") == 403
    assert asked("GET", f"{artifacts}?path=") == 403
    assert asked("GET", f"/get-artifact?path=federation.json&run_uuid={run}") == 403
    assert asked("PUT", f"{artifacts}/{releases}/models/x/artifacts/model.safetensors") == 403
