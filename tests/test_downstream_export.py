"""A backbone as a file for other runtimes gives the features that torch gives."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, tiny, write_labelled

from wardround.backbones import save_release
from wardround.data import read_labelled
from wardround.downstream.export import FORMATS, export
from wardround.downstream.load import load_backbone
from wardround.errors import ConfigError
from wardround.plan import resolve
from wardround.registry.release import file_hashes

NETWORKS: dict[str, dict[str, Any]] = {
    "vit": {},
    "resnet": {
        "backbone": {"name": "resnet18"},
        "method": {"name": "simclr", "hidden_dim": 16, "output_dim": 16},
        "data": {"image_size": 32},
    },
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = resolve(tiny(**NETWORKS[request.param]))
    folder = tmp_path_factory.mktemp("export") / request.param
    save_release(plan.protocol, plan.state, folder, {"protocol": plan.protocol.model_dump(mode="json")})
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("images"), {"lyon": 40})


def expected(folder: Path, images: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return images in [0, 1], and what timm's own model makes of them once they are normalised by hand."""
    model = load_backbone(folder).eval()
    config = json.loads((folder / "provenance.json").read_text())["protocol"]["data"]
    found = read_labelled(images, resolve(tiny(data={"image_size": config["image_size"]})).config.data)
    pixels = found.images.astype(np.float32) / 255.0
    normal = (pixels - np.float32(config["mean"][0])) / np.float32(config["std"][0])
    with torch.inference_mode():
        return pixels, model(torch.from_numpy(normal)).numpy()


def test_onnx_gives_the_features_of_any_number_of_images(network: Path, images: Path, tmp_path: Path) -> None:
    found = export(network, "onnx", tmp_path / "out", images)
    pixels, features = expected(network, images)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 2, 7):
        (made,) = session.run(None, {"images": pixels[:count]})
        np.testing.assert_allclose(made, features[:count], atol=1e-4)
    assert found.largest_error < 1e-4 and found.least_cosine > 0.99999
    assert (found.images, found.of) == (40, "images of --data")


def test_torchs_own_program_gives_the_same_bits(network: Path, images: Path, tmp_path: Path) -> None:
    found = export(network, "pt2", tmp_path / "out", images)
    assert found.largest_error == 0.0
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    pixels, features = expected(network, images)
    np.testing.assert_allclose(program(torch.from_numpy(pixels[:5])).detach().numpy(), features[:5], atol=1e-5)


def test_int8_is_of_the_kind_that_the_network_bears(network: Path, images: Path, tmp_path: Path) -> None:
    found = export(network, "onnx-int8", tmp_path / "out", images)
    kinds = {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    if network.name == "vit":
        assert "DynamicQuantizeLinear" in kinds and "MatMulInteger" in kinds
    else:
        assert "QuantizeLinear" in kinds and "DynamicQuantizeLinear" not in kinds
    assert 0.98 < found.least_cosine < 1.0, "it is int8, and near"
    assert found.megabytes < found.torch_megabytes


@pytest.mark.parametrize("format", FORMATS)
def test_the_lineage_and_the_parity_go_with_it_and_no_image(format: str, images: Path, tmp_path: Path) -> None:
    plan = resolve(tiny())
    folder = tmp_path / "release"
    save_release(plan.protocol, plan.state, folder, {"protocol": plan.protocol.model_dump(mode="json")})
    found = export(folder, format, tmp_path / "out")
    names = {"config.json", "provenance.json", "parity.json", found.file}
    if format == "monai":
        names |= {"configs/inference.json", "configs/metadata.json", "docs/README.md"}
    assert set(file_hashes(tmp_path / "out")) == names
    said = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert said == found.__dict__ and said["of"] == "procedural images"
    assert said["weights"] == json.loads((folder / "provenance.json").read_text())["sha256"]["model.safetensors"]


@pytest.mark.parametrize("column", ["label", "diagnosis"])
def test_what_it_is_compared_on_needs_no_labels(column: str, network: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    table = tmp_path / "images" / "labels.csv"
    header, first, *rest = table.read_text().splitlines()
    name, _, others = first.split(",", 2)
    table.write_text("\n".join([header.replace("label", column), f"{name},a;b,{others}", *rest]))
    assert export(network, "pt2", tmp_path / "out", tmp_path / "images").images == 40


def test_a_format_that_there_is_not(network: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--format tflite: expected one of onnx, onnx-int8, pt2"):
        export(network, "tflite", tmp_path / "out")


def test_a_folder_that_is_not_empty_is_left_alone(network: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is not empty; name a new folder"):
        export(network, "onnx", tmp_path / "out")


def test_convolutions_are_not_calibrated_on_made_up_images(tmp_path: Path) -> None:
    plan = resolve(tiny(**NETWORKS["resnet"]))
    folder = tmp_path / "release"
    save_release(plan.protocol, plan.state, folder, {"protocol": plan.protocol.model_dump(mode="json")})
    with pytest.raises(ConfigError, match="calibrated on real images; give a folder by --data"):
        export(folder, "onnx-int8", tmp_path / "out")
    assert not (tmp_path / "out").exists()


QUIET = """
import os, socket, sys, threading, time
listening = socket.create_server(("127.0.0.1", 0))
asked = []
def listen():
    while True:
        asked.append(listening.accept()[0].recv(100))
threading.Thread(target=listen, daemon=True).start()
for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
    os.environ[name] = f"http://127.0.0.1:{listening.getsockname()[1]}"
import wardround, onnxruntime
onnxruntime.InferenceSession(sys.argv[1])
time.sleep(15)  # without wardround it takes five to ten
assert not asked, asked
"""


@pytest.mark.slow
def test_who_imports_wardround_has_an_onnxruntime_that_sends_nothing(tmp_path: Path) -> None:
    """Only waiting shows it: onnxruntime sends usage data some seconds after it began."""
    folder = tmp_path / "release"
    plan = resolve(tiny())
    save_release(plan.protocol, plan.state, folder, {"protocol": plan.protocol.model_dump(mode="json")})
    export(folder, "onnx", tmp_path / "out")
    environment = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LD_LIBRARY_PATH")}
    command = [sys.executable, "-c", QUIET, str(tmp_path / "out" / "model.onnx")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
