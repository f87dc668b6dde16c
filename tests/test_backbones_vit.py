"""Backbones: ours and stock timm's are the same numbers, and a release is true about itself."""

import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import tiny

from wardround import ssl as methods
from wardround.backbones import build, released_model, save_release
from wardround.config import FederationConfig
from wardround.errors import ConfigError

GREY = {"data": {"image_size": 24, "mean": [0.41], "std": [0.23]}, "backbone": {"patch_size": 6}}
COLOUR = {"data": {"image_size": 32, "channels": 3, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}}


def config(changes: dict[str, object]) -> FederationConfig:
    return tiny(**changes)


@pytest.mark.parametrize("changes", [GREY, COLOUR], ids=["grey", "colour"])
def test_stock_timm_gives_the_features_of_the_trained_encoder(changes: dict[str, object], tmp_path: Path) -> None:
    recipe = config(changes)
    method = methods.build(recipe).eval()
    state = methods.get_state(method)
    size = recipe.data.image_size
    images = torch.randn(2, recipe.data.channels, size, size)
    with torch.no_grad():
        ours = method.backbone.encode(method.backbone.embed(images))[:, 1:].mean(1)
        assert released_model(recipe, state)(images) == pytest.approx(ours, abs=1e-5)
        save_release(recipe, state, tmp_path, {"round": 3})
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
        assert loaded(images) == pytest.approx(ours, abs=1e-5)
        assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5)(images).shape == (2, 5)


def test_a_release_states_its_own_normalisation_and_hashes(tmp_path: Path) -> None:
    recipe = config(GREY)
    save_release(recipe, methods.get_state(methods.build(recipe)), tmp_path, {"round": 3})
    declared = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert (declared["mean"], declared["std"], declared["input_size"]) == ([0.41], [0.23], [1, 24, 24])
    assert "url" not in declared and "hf_hub_id" not in declared
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["round"] == 3
    assert provenance["sha256"].keys() == {"model.safetensors", "config.json"}


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        ({"patch_size": 7}, "patch_size = 7 does not divide [data] image_size = 16"),
        ({"name": "vit_tiny_patch16_223"}, "'vit_tiny_patch16_223': is no architecture of timm"),
        ({"name": "resnet18", "patch_size": 4}, "patch_size and depth are keys of ViTs; 'resnet18' is none"),
        ({"name": "vit_small_patch14_reg4_dinov2", "patch_size": 8}, "is no plain ViT"),
        ({"name": "vit_intern300m_patch14_448", "patch_size": 8}, "and a last norm"),
    ],
)
def test_what_is_no_plain_vit_is_refused_with_the_reason(backbone: dict[str, object], words: str) -> None:
    recipe = tiny(backbone=backbone)
    with pytest.raises(ConfigError) as caught:
        build(recipe.backbone, recipe.data)
    assert words in str(caught.value)
