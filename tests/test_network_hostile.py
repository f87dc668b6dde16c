"""A coordinator that plants code: Flower's bundle with a module that leaves a mark where it is imported.

Only a real SuperLink hands bundles out as Flower does, and only Flower's own supernode shows that this one would run.
"""

from collections.abc import Iterator

import pytest
from conftest import write_labelled
from test_network_smoke import CHANGES, Deployment, deployment

from wardround.server.run_folder import open_run

pytestmark = [pytest.mark.slow, pytest.mark.network]

# `wardround coordinate`, but that the bundle names a module of its own, which marks whoever imports it.
HOSTILE = """
import sys
from pathlib import Path
from wardround.server import fab, superlink
marks, sys.argv = sys.argv[1], sys.argv[1:]
def write_hostile(folder, honest=fab.write_stub):
    honest(folder)
    config = folder / "pyproject.toml"
    config.write_text(config.read_text().replace("wardround.client.app:app", "planted.client:app"))
    (folder / "planted").mkdir(exist_ok=True)
    (folder / "planted" / "__init__.py").write_text("")
    (folder / "planted" / "client.py").write_text(
        "import os, pathlib\\n"
        f"(pathlib.Path({marks!r}) / pathlib.Path(os.environ['FLWR_HOME']).name).touch()\\n"
        "from wardround.client import app as real\\n"
        "app = real.app\\n"
    )
    return folder
superlink.write_stub = write_hostile
from wardround.cli import main
main()
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Give a federation whose bundle is hostile, after its end: two sites run our node, 'pisa' Flower's."""
    data = write_labelled(tmp_path_factory.mktemp("labelled"), {"lyon": 20, "oslo": 30, "pisa": 20})
    folder = tmp_path_factory.mktemp("network")
    with deployment(folder, data) as deployed:
        (folder / "marks").mkdir()
        kit, tracking = folder / "kits" / "coordinator", f"sqlite:///{folder / 'mlflow.db'}"
        options = ["--kit", kit, "--out", deployed.run, "--port", deployed.port, "--tracking", tracking]
        deployed.start_python("coordinator", HOSTILE, folder / "marks", "coordinate", deployed.config, *options)
        deployed.wait_until("coordinator", "sites connect to")
        deployed.join("lyon")
        deployed.join("oslo")
        deployed.join_by_stock_supernode("pisa")
        assert deployed.running["coordinator"].wait(240) == 0, deployed.said("coordinator")
        yield deployed


def test_our_sites_train_and_run_nothing_of_a_planted_bundle_which_a_stock_supernode_does(finished: Deployment) -> None:
    run = open_run(finished.run)
    assert run.committed() == [0, 1, 2]
    assert sorted(run.record(2)["sites"]) == sorted(CHANGES["membership"]["sites"])
    assert [mark.name for mark in (finished.folder / "marks").iterdir()] == ["pisa-flower"]


def test_nothing_of_a_planted_bundle_lies_at_our_sites(finished: Deployment) -> None:
    for site in ("lyon", "oslo"):
        work = finished.folder / "kits" / site / "work"
        held = [path for path in work.rglob("*") if path.is_file() and b"planted" in path.read_bytes()]
        assert not held and any(work.rglob("update.safetensors"))
