"""The architecture's promises: doors to frameworks, and a training core that runs without flwr and mlflow."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

DOORS = {
    "flwr": {"wire.py", "simulate.py", "server/app.py", "client/app.py", "client/node.py", "connection/"},
    "mlflow": {"registry/mlflow_connection.py", "registry/mlflow_store.py"},
    "lightly": {"ssl/"},
    "opacus": {"privacy/"},
    "dp_accounting": {"privacy/accounting.py"},
    "pydicom": {"data/"},
    "nibabel": {"data/"},
    "timm": {"backbones/", "downstream/"},
    "monai": {"backbones/", "data/", "downstream/monai_"},
    "einops": {"backbones/"},
    "lightning_fabric": {"ssl/devices.py", "ssl/engine.py", "client/local_round.py", "privacy/engine.py"},
    "sklearn": {"probe/"},
    "torchmetrics": {"probe/"},
    "peft": {"downstream/lora.py"},
    "captum": {"downstream/explain.py"},
    "onnx": {"downstream/onnx_graph.py"},
    "onnxruntime": {"downstream/onnx_graph.py"},
    "prometheus_client": {"server/metrics.py"},
    "requests": {"registry/mlflow_connection.py", "data/dicomweb_server.py"},
    "matplotlib": {"report/"},
    "jinja2": {"report/page.py"},
    "cyclonedx": {"registry/sbom.py"},
}


def imported(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("framework", DOORS)
def test_each_framework_stands_behind_one_door(framework: str) -> None:
    package = ROOT / "wardround"
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if framework in imported(path.read_text())
    }
    assert all(any(user.startswith(door) for door in DOORS[framework]) for user in users), users


def test_the_training_core_imports_neither_flwr_nor_mlflow() -> None:
    code = """
import sys
for name in ("flwr", "mlflow", "monai", "opacus", "dp_accounting"):
    sys.modules[name] = None
import wardround.data, wardround.backbones, wardround.ssl, wardround.plan, wardround.client.local_round
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_sites_process_loads_nothing_that_only_measuring_needs() -> None:
    """It would start a tenth later, and each command with it."""
    code = """
import sys
import wardround.client.app, wardround.client.node
assert not sys.modules.keys() & {"sklearn", "torchmetrics", "peft", "mlflow", "matplotlib"}
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_coordinators_processes_load_no_torch() -> None:
    """They would take half a gigabyte each."""
    code = """
import sys
import wardround.server.rounds_process, wardround.server.superlink, wardround.cli
assert "torch" not in sys.modules, "torch is loaded"
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
