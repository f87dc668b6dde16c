"""Runs and releases in a SQLite MLflow: what is kept, found again, refused and never sent anywhere."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from mlflow.tracking import MlflowClient
from PIL import Image
from timm.models import save_for_hf

from wardround.errors import CheckpointError, ConfigError, TrackingError
from wardround.registry import mlflow_store, release
from wardround.registry.mlflow_store import Store

# The tests ask MLflow itself what is there; the store keeps MLflow's warnings to itself.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
PROTOCOL = "c0ffee" * 10 + "c0ff"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One store for the module: MLflow takes seconds to create its tables."""
    return Store(str(tmp_path_factory.mktemp("with a space") / "mlflow.db"))


def write_release(folder: Path, seed: int) -> Path:
    """Write a small release as the backbones do it, without them."""
    torch.manual_seed(seed)
    arguments = {"img_size": 16, "patch_size": 8, "in_chans": 1, "depth": 1, "embed_dim": 24, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **arguments, num_classes=0)
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    hashes = release.file_hashes(folder)
    (folder / "provenance.json").write_text(json.dumps({"round": seed, "sha256": hashes}))
    return folder


def client_of(store: Store) -> MlflowClient:
    return MlflowClient(store.uri, store.uri)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def artifacts(store: Store, name: str, version: str) -> Path:
    """Return where a local store keeps a version's files."""
    return Path(
        client_of(store).get_model_version_download_uri(name, version).removeprefix("file://").replace("%20", " ")
    )


def test_the_run_of_a_run_folder_is_found_again(store: Store) -> None:
    first = store.open_run("lungs", PROTOCOL, {"seed": "1"}, {"config.toml": "format = 1"}, folder="a")
    store.close_run(first, "KILLED")
    assert client_of(store).get_run(first).info.status == "KILLED"
    again = store.open_run("lungs", PROTOCOL, {"seed": "2", "sites": "3"}, {"config.toml": "format = 1"}, folder="a")
    other = store.open_run("lungs", PROTOCOL, {"seed": "1"}, {}, folder="b")
    run = client_of(store).get_run(again)
    assert again == first != other
    assert run.info.status == "RUNNING"
    assert run.data.params == {"seed": "1", "sites": "3"}
    assert [file.path for file in client_of(store).list_artifacts(again)] == ["config.toml"]


def test_many_parameters_are_logged_in_several_requests(store: Store) -> None:
    run = store.open_run("lungs", PROTOCOL, {f"p{i}": str(i) for i in range(150)}, {}, folder="many")
    assert len(client_of(store).get_run(run).data.params) == 150


def test_a_round_logged_twice_leaves_the_same_record(store: Store, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "recon.png")
    run = store.open_run("lungs", PROTOCOL, {}, {}, folder="twice")
    for round in (1, 2, 2, 1):
        store.log_round(run, round, {"loss": 1.0 / round, "site/lyon/loss": 2.0}, {"recon": tmp_path / "recon.png"})
    history = client_of(store).get_metric_history(run, "loss")
    pictures = [file.path for file in client_of(store).list_artifacts(run, "images") if file.path.endswith(".png")]
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5)]
    assert [path.split("+")[:3] for path in sorted(pictures)] == [
        ["images/recon", "step", "1"],
        ["images/recon", "step", "2"],
    ]


def test_a_round_of_more_metrics_than_one_request_takes_is_logged_whole(store: Store) -> None:
    run = store.open_run("lungs", PROTOCOL, {}, {}, folder="wide")
    store.log_round(run, 1, {f"site/{i}/loss": float(i) for i in range(1100)}, {})
    metrics = client_of(store).get_run(run).data.metrics
    assert len(metrics) == 1101
    assert metrics["site/1099/loss"] == 1099.0


def test_a_metric_that_is_not_a_number_is_logged_as_such(store: Store) -> None:
    run = store.open_run("lungs", PROTOCOL, {}, {}, folder="nan")
    store.log_round(run, 1, {"loss": float("nan")}, {})
    value = client_of(store).get_run(run).data.metrics["loss"]
    assert value != value


def test_the_same_files_are_registered_once(store: Store, tmp_path: Path) -> None:
    folder = write_release(tmp_path / "r1", 1)
    run = store.open_run("lungs", PROTOCOL, {}, {}, folder="once")
    first = store.register(folder, "once", "champion", run, {"round": "1"}, {"auc": 0.75})
    again = store.register(folder, "once", "stable", run, {"round": "1"}, {"auc": 0.75})
    second = store.register(write_release(tmp_path / "r2", 2), "once", "champion", None, {"round": "2"}, {})
    assert (first, again, second) == ("1", "1", "2")
    rows = [row for row in store.models() if row.name == "once"]
    assert [(row.version, row.aliases, row.round, row.metrics) for row in rows] == [
        ("2", ("champion",), 2, {}),
        ("1", ("stable",), 1, {"auc": 0.75}),
    ]
    assert abs(rows[0].when.timestamp() - time.time()) < 60
    assert rows[1].digest == release.digest(release.check(folder))


def test_a_releases_metrics_do_not_bend_the_curves_of_its_run(store: Store, tmp_path: Path) -> None:
    run = store.open_run("lungs", PROTOCOL, {}, {}, folder="curves")
    store.log_round(run, 1, {"loss": 1.0}, {})
    store.register(write_release(tmp_path / "r", 12), "curves", "champion", run, {}, {"loss": 0.5})
    client = client_of(store)
    assert [(point.step, point.value) for point in client.get_metric_history(run, "loss")] == [(1, 1.0)]
    experiment = client.get_experiment_by_name("releases/curves")
    (model,) = client.search_logged_models([experiment.experiment_id])
    assert [(metric.key, metric.value) for metric in model.metrics] == [("release/loss", 0.5)]


def test_a_release_lies_in_an_experiment_of_its_own(store: Store, tmp_path: Path) -> None:
    run = store.open_run("lungs", PROTOCOL, {}, {}, folder="own")
    store.register(write_release(tmp_path / "r", 3), "own", "champion", run, {}, {})
    client = client_of(store)
    experiment = client.get_experiment_by_name("releases/own")
    assert len(client.search_logged_models([experiment.experiment_id])) == 1
    assert client.search_runs([experiment.experiment_id]) == []
    assert client.search_logged_models([client.get_experiment_by_name("lungs").experiment_id]) == []


def test_a_registration_cut_off_before_it_has_a_version_is_taken_up(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_release(tmp_path / "r", 4)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, "create_model_version", interrupted)
        store.register(folder, "cut", "champion", None, {}, {})
    assert store.register(folder, "cut", "champion", None, {}, {}) == "1"
    experiment = client_of(store).get_experiment_by_name("releases/cut")
    assert len(client_of(store).search_logged_models([experiment.experiment_id])) == 1


def test_what_is_pulled_is_what_was_registered(store: Store, tmp_path: Path) -> None:
    folder = write_release(tmp_path / "r", 5)
    store.register(folder, "pulled", "champion", None, {}, {})
    for number, reference in enumerate(("pulled@champion", "pulled/1", "models:/pulled@champion")):
        to = store.pull(reference, tmp_path / f"new folder {number}" / "model")
        assert files(to) == files(folder)
    assert store.pull("pulled@champion", to) == to  # once more, over itself


def test_a_pull_over_something_else_is_refused(store: Store, tmp_path: Path) -> None:
    store.register(write_release(tmp_path / "r", 6), "other", "champion", None, {}, {})
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds other files than 'other@champion'"):
        store.pull("other@champion", tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


@pytest.mark.parametrize("harm", ["cut", "removed", "added", "linked"])
def test_an_altered_release_is_refused_and_leaves_nothing(store: Store, tmp_path: Path, harm: str) -> None:
    store.register(write_release(tmp_path / "r", 7), f"harm-{harm}", "champion", None, {}, {})
    kept = artifacts(store, f"harm-{harm}", "1")
    weights = kept / "model.safetensors"
    if harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif harm == "removed":
        weights.unlink()
    elif harm == "added":
        (kept / "sitecustomize.py").write_text("import this")
    else:
        weights.rename(tmp_path / "elsewhere")
        weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises((CheckpointError, TrackingError)) as caught:
        store.pull(f"harm-{harm}@champion", tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_a_folder_that_is_no_whole_release_is_not_registered(store: Store, tmp_path: Path) -> None:
    folder = write_release(tmp_path / "r", 8)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"'config.json' differs from the hash recorded with it"):
        store.register(folder, "broken", "champion", None, {}, {})
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"'config.json' is missing"):
        store.register(folder, "broken", "champion", None, {}, {})
    assert "broken" not in [row.name for row in store.models()]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("retina-v1@champion", "there is no 'retina-v1'; the nearest are: retina-vit"),
        ("retina-vit@champoin", "'retina-vit' has no alias 'champoin'; the nearest are: champion"),
        ("retina-vit/7", "'retina-vit' has no version 7; known: 1"),
        ("retina-vit", "expected NAME@alias or NAME/version"),
        ("../../etc@champion", "expected NAME@alias or NAME/version"),
        ("retina-vit'@champion", "expected NAME@alias or NAME/version"),
    ],
)
def test_a_reference_that_names_nothing_is_answered_with_the_nearest(
    store: Store, tmp_path: Path, reference: str, message: str
) -> None:
    if "retina-vit" not in [row.name for row in store.models()]:
        store.register(write_release(tmp_path / "r", 9), "retina-vit", "champion", None, {}, {})
    with pytest.raises(ConfigError, match=message):
        store.pull(reference, tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "alias"), [("a/b", "champion"), ("..", "champion"), ("a", "latest"), ("a", "v2"), ("a", "1")]
)
def test_a_name_that_cannot_be_referred_to_is_refused(store: Store, tmp_path: Path, name: str, alias: str) -> None:
    with pytest.raises(ConfigError, match="expected letters, digits"):
        store.register(tmp_path, name, alias, None, {}, {})


def test_a_relative_path_and_a_uri_with_escapes_mean_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    expected = f"sqlite:///{tmp_path}/a b/mlflow.db"
    for uri in ("a b/mlflow.db", "a b", "sqlite:///a b/mlflow.db", "sqlite:///a%20b/mlflow.db", expected):
        assert Store(uri).uri == expected


@pytest.mark.parametrize("uri", ["postgresql://me:secret@host/db", "sqlite:///a?mode=memory", "100%.db"])
def test_another_kind_of_address_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="expected http") as caught:
        Store(uri)
    assert "secret" not in str(caught.value)


def test_a_store_that_is_not_there_is_not_made_by_reading_it(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="there is no such file"):
        Store(str(tmp_path / "none.db")).models()
    assert not any(tmp_path.iterdir())


def test_a_file_that_is_no_database_is_said_to_be_none_at_once(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no database at all, but long enough to have a header of its own" * 9)
    started = time.monotonic()
    with pytest.raises(TrackingError, match=r"notes.txt: cannot be opened: file is not a database"):
        Store(str(tmp_path / "notes.txt")).open_run("lungs", PROTOCOL, {}, {})
    assert time.monotonic() - started < 2


def test_a_file_that_a_kill_left_in_mid_write_is_opened_again(tmp_path: Path) -> None:
    """SQLite takes back what was half written when it is opened next, for which it must be let write."""
    store = Store(str(tmp_path / "mlflow.db"))
    run = store.open_run("lungs", PROTOCOL, {}, {})
    program = (
        "import os, signal, sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1])\n"
        "db.execute('PRAGMA cache_size = 1')\n"  # pages reach the file before the commit
        "db.execute('UPDATE runs SET name = ?', ('half' * 9999,))\n"
        "db.execute('CREATE TABLE half AS SELECT hex(randomblob(99999)) AS half')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(store.database)], check=False).returncode == -9
    assert (tmp_path / "mlflow.db-journal").stat().st_size > 0
    assert store.open_run("lungs", PROTOCOL, {}, {}) == run
    assert client_of(store).get_run(run).info.run_name != "half" * 9999


def test_a_server_that_is_down_is_reported_in_seconds_and_without_its_password() -> None:
    with socket.socket() as held:  # bound and not listening: connections are refused
        held.bind(("127.0.0.1", 0))
        address = f"http://me:secret@127.0.0.1:{held.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(TrackingError, match=r"does not answer. Start it") as caught:
            Store(address).log_round("0" * 32, 1, {"loss": 1.0}, {})
    assert time.monotonic() - started < 5
    assert "secret" not in str(caught.value)


def test_a_server_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_store, "QUICK", (1, 0))
    with socket.socket() as hangs:
        hangs.bind(("127.0.0.1", 0))
        hangs.listen()
        started = time.monotonic()
        store = Store(f"http://127.0.0.1:{hangs.getsockname()[1]}")
        with pytest.raises(TrackingError, match="does not answer"):
            store.open_run("lungs", PROTOCOL, {}, {})
        with pytest.raises(TrackingError, match="does not answer"):
            store.register(write_release(tmp_path / "r", 0), "lungs", "champion", None, {}, {})
        with pytest.raises(TrackingError, match="does not answer"):
            store.pull("lungs@champion", tmp_path / "pulled")
    assert time.monotonic() - started < 10
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


QUIET = """
import os, sys
reached = []
net = ("socket.connect", "socket.getaddrinfo")
sys.addaudithook(lambda event, args: reached.append(args) if event in net else None)
from pathlib import Path
from wardround.registry.mlflow_store import Store
store = Store(sys.argv[1])
run = store.open_run("lungs", "p", {"a": "1"}, {"config.toml": "x"})
store.log_round(run, 1, {"loss": 1.0}, {})
store.register(Path(sys.argv[2]), "quiet", "champion", run, {"round": "1"}, {"auc": 0.5})
store.pull("quiet@champion", Path(sys.argv[3]))
store.close_run(run, "FINISHED")
import mlflow.telemetry
assert mlflow.telemetry.get_telemetry_client() is None
assert not reached, reached
assert os.listdir() == [], os.listdir()
"""


def test_a_new_store_prints_nothing_sends_nothing_and_leaves_the_working_directory_alone(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "r", 10)
    (tmp_path / "cwd").mkdir()
    # A variable such as CI would switch telemetry off by itself.
    environment = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LD_LIBRARY_PATH")}
    arguments = [str(tmp_path / "new" / "mlflow.db"), str(folder), str(tmp_path / "pulled")]
    done = subprocess.run(
        [sys.executable, "-c", QUIET, *arguments], cwd=tmp_path / "cwd", env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


WITHOUT_WARDROUND = """
import sys
sys.modules["wardround"] = None  # an import of it raises
import mlflow, timm, torch
p = mlflow.artifacts.download_artifacts("models:/NAME@alias")
model = timm.create_model(f"local-dir:{p}", pretrained=True, num_classes=3)
assert model.head.out_features == 3
images = torch.linspace(-1, 1, 512).reshape(2, 1, 16, 16)
with torch.inference_mode():
    torch.save(model.eval().forward_features(images), sys.argv[1])
"""


def test_mlflow_and_timm_alone_load_what_was_registered(store: Store, tmp_path: Path) -> None:
    folder = write_release(tmp_path / "r", 11)
    store.register(folder, "NAME", "alias", None, {}, {})
    (tmp_path / "cwd").mkdir()
    subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_WARDROUND, str(tmp_path / "features.pt")],
        cwd=tmp_path / "cwd",
        env={**os.environ, "MLFLOW_TRACKING_URI": store.uri, "MLFLOW_DISABLE_TELEMETRY": "true"},
        check=True,
    )
    expected = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    with torch.inference_mode():
        features = expected.forward_features(torch.linspace(-1, 1, 512).reshape(2, 1, 16, 16))
    # Not bit by bit: the other process may use another number of threads.
    torch.testing.assert_close(torch.load(tmp_path / "features.pt"), features)
    assert release.file_hashes(artifacts(store, "NAME", "1")) == release.file_hashes(folder)  # nothing written into it
