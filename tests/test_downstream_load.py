"""A release is loaded from a folder, a run folder or MLflow, and adapted as timm adapts."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import tiny
from PIL import Image
from torch import nn

from wardround.backbones import released_model, save_release
from wardround.data.labelled import read_images
from wardround.data.labels import Row
from wardround.downstream.load import load_backbone, release_folder
from wardround.errors import CheckpointError, ConfigError
from wardround.plan import Plan, resolve
from wardround.registry.mlflow_store import Store


@pytest.fixture(scope="module")
def plan() -> Plan:
    return resolve(tiny())


@pytest.fixture
def folder(plan: Plan, tmp_path: Path) -> Path:
    """A release of an untrained backbone: 16 pixels, one channel, patches of 8."""
    protocol = plan.protocol.model_dump(mode="json")
    save_release(plan.protocol, plan.state, tmp_path / "a release", {"protocol": protocol})
    return tmp_path / "a release"


def outputs(model: nn.Module, size: int = 16, channels: int = 1) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(torch.linspace(-1, 1, 2 * channels * size * size).reshape(2, channels, size, size))


def test_a_folder_gives_the_trained_features(folder: Path, plan: Plan) -> None:
    model = load_backbone(folder)
    assert torch.equal(outputs(model), outputs(released_model(plan.protocol, plan.state)))
    assert tuple(model.pretrained_cfg["mean"]) == plan.config.data.mean
    assert tuple(model.pretrained_cfg["std"]) == plan.config.data.std


@pytest.mark.parametrize("channels", [1, 3])
def test_timms_own_transform_shows_the_network_what_it_was_trained_on(channels: int, tmp_path: Path) -> None:
    """The whole picture, squeezed by a triangle filter; timm's default would cut its longer sides off."""
    plan = resolve(tiny(data={"channels": channels, "mean": [0.5] * channels, "std": [0.25] * channels}))
    save_release(plan.protocol, plan.state, tmp_path / "release", {"protocol": plan.protocol.model_dump(mode="json")})
    model = timm.create_model(f"local-dir:{tmp_path / 'release'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, channels), dtype=np.uint8)
    Image.fromarray(pixels.squeeze()).save(tmp_path / "image.png")
    (row,) = [Row("image.png", tmp_path / "image.png", "p", "s", "test", "a")]
    trained_on = read_images(tmp_path, [row], plan.config.data)[0].astype(np.float32) / 255
    with Image.open(tmp_path / "image.png") as image:
        shown = transform(image).numpy() * 0.25 + 0.5
    assert np.abs(shown - trained_on).max() <= 1.01 / 255, "Pillow rounds bytes after each direction"


def test_a_new_classifier_sits_on_the_trained_features(folder: Path) -> None:
    model = load_backbone(folder, num_classes=3)
    assert outputs(model).shape == (2, 3)
    assert torch.equal(model.blocks[0].attn.qkv.weight, load_backbone(folder).blocks[0].attn.qkv.weight)


def test_a_grey_backbone_sees_a_grey_image_in_colour_as_it_saw_it_in_grey(folder: Path) -> None:
    grey = torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16)
    with torch.inference_mode():
        in_colour = load_backbone(folder, in_chans=3).eval()(grey.expand(1, 3, 16, 16))
        torch.testing.assert_close(in_colour, load_backbone(folder).eval()(grey), rtol=1e-4, atol=1e-5)


def test_another_image_size_resamples_the_positions(folder: Path) -> None:
    assert outputs(load_backbone(folder, img_size=32), size=32).shape == outputs(load_backbone(folder)).shape


def test_maps_instead_of_a_vector(tmp_path: Path) -> None:
    deep = resolve(tiny(backbone={"depth": 3}))
    save_release(deep.protocol, deep.state, tmp_path / "deep", {})
    maps = outputs(load_backbone(tmp_path / "deep", features_only=True))
    assert [tuple(one.shape) for one in maps] == [(2, 192, 2, 2)] * 3


def test_what_the_backbone_cannot_be_is_refused_in_one_line(folder: Path) -> None:
    with pytest.raises(ConfigError, match="timm cannot build it with in_chans = -1") as caught:
        load_backbone(folder, in_chans=-1)
    assert "\n" not in str(caught.value)


def test_an_image_that_its_patches_do_not_cover_is_refused(folder: Path) -> None:
    """timm builds it, and leaves the last pixels out without a word."""
    with pytest.raises(ConfigError, match=r"img_size = 20.*patches of 8 pixels do not cover an image of 20"):
        load_backbone(folder, img_size=20)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_release_is_refused(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"'{name}' differs from the hash recorded with it"):
        load_backbone(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"'{name}' is missing"):
        load_backbone(folder)


def test_a_release_whose_provenance_is_cut_is_refused(folder: Path) -> None:
    (folder / "provenance.json").write_text(json.dumps({"sha256": {}})[:-3])
    with pytest.raises(CheckpointError, match=r"'provenance.json' cannot be read"):
        load_backbone(folder)


def test_a_run_folder_gives_its_release_once_there_is_one(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "protocol.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has released nothing yet"):
        load_backbone(tmp_path / "run")
    folder.rename(tmp_path / "run" / "release")
    assert torch.isfinite(outputs(load_backbone(tmp_path / "run"))).all()


def test_a_registered_backbone_is_fetched_by_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "mlflow.db"))
    store.register(folder, "tiny", "candidate", None, {}, {})
    expected = outputs(load_backbone(folder))
    assert torch.equal(outputs(load_backbone("tiny@candidate", uri=store.uri)), expected)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert torch.equal(outputs(load_backbone("tiny/1")), expected)
    with release_folder("tiny@candidate") as pulled:
        assert (pulled / "provenance.json").exists()
    assert not pulled.exists()


def test_a_source_that_is_nothing_is_said_to_be_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="is neither a folder nor NAME@alias"):
        load_backbone("retina")
    with pytest.raises(ConfigError, match="'releases/retina': is neither a folder nor NAME@alias nor NAME/version"):
        load_backbone("releases/retina")
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI"):
        load_backbone("retina@champion")


def test_the_documented_line_is_timms_own(folder: Path) -> None:
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3).head.out_features == 3
