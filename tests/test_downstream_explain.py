"""Explanations are what their papers say, computed by hand."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image
from test_downstream_evaluate import striped
from torch import Tensor, nn

from wardround import ssl as methods
from wardround.backbones import released_model
from wardround.downstream.arms import Network
from wardround.downstream.explain import Probed, explain, grad_cam, rolled, rollout
from wardround.downstream.splits import split
from wardround.probe.explanation import Explanation
from wardround.probe.linear import Labelled, Linear, linear_probabilities, linear_probe
from wardround.report.explanation import draw_explanation


def arm(**changes: Any) -> Network:
    recipe = tiny(**changes)
    state = methods.get_state(methods.build(recipe))
    return Network(lambda images: released_model(recipe, state, images), recipe)


def test_roll_out_of_two_known_blocks() -> None:
    first = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]])  # two heads: mean [1 0; .5 .5]
    second = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]).expand(1, 2, 2, 2)
    # with the residual path: [1 0; .25 .75], then [.5 .5; 0 1]
    torch.testing.assert_close(rollout([first, second]), torch.tensor([[[0.625, 0.375], [0.25, 0.75]]]))


def test_the_attention_that_is_rolled_is_the_networks_own() -> None:
    vit: Any = arm().build(striped(4).images)
    images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    block = vit.blocks[0]
    with torch.no_grad():
        tokens = vit._pos_embed(vit.patch_embed(images))
        query, key, _ = block.attn.qkv(block.norm1(tokens)).double().view(2, 5, 3, 3, 64).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(2, 3) / 8).softmax(3).mean(1)  # [B, T, T]
    expected = (weights / 2 + torch.eye(5) / 2)[:, 1:, 1:].mean(1).view(2, 2, 2)
    torch.testing.assert_close(rolled(vit, images).double(), expected, atol=1e-6, rtol=0)


class OneLayer(nn.Module):
    """A convolution and the mean over its maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.conv(images)

    def forward_head(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))


def test_grad_cam_of_one_layer() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    probe = Linear(rng.normal(size=3), rng.random(3) + 0.5, rng.normal(size=(2, 3)), rng.normal(size=2))
    model, images = Probed(OneLayer(), probe), torch.randn(2, 1, 6, 6, requires_grad=True)
    found = grad_cam(model, images, torch.tensor([0, 1]))
    maps = model.encoder.conv(images).detach().double()  # [2, 3, 4, 4]
    for place, answer in enumerate((0, 1)):
        alpha = probe.weights[answer] / probe.scale / 16  # d score / d map, each pixel alike
        expected = torch.relu(sum(a * one for a, one in zip(alpha, maps[place], strict=True)))
        torch.testing.assert_close(found[place].double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["two classes", "three classes", "several labels"])
def test_the_probes_weights_are_those_behind_its_probabilities(kind: str) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 5)).astype(np.float32)
    labels = {"two classes": features[:, 0] > 0, "three classes": np.digitize(features[:, 0], (-0.5, 0.5))}
    truth = labels[kind].astype(np.int64) if kind in labels else (features[:, :3] > 0).astype(np.int64)
    sets = [Labelled(features[part], truth[part]) for part in (slice(0, 30), slice(30, 60))]
    probe = linear_probe(*sets)
    scores = torch.from_numpy((features - probe.mean) / probe.scale @ probe.weights.T + probe.bias)
    found = scores.sigmoid() if truth.ndim == 2 else scores.softmax(1)
    np.testing.assert_allclose(found.numpy(), linear_probabilities(*sets, features), atol=1e-6)


CONTRAST = {"name": "simclr", "hidden_dim": 16, "output_dim": 8}


def test_convolutions_and_transformers_are_explained_and_drawn_and_others_say_why(tmp_path: Path) -> None:
    images = striped(20)
    cnn = explain(arm(backbone={"name": "mobilenetv3_small_050"}, method=CONTRAST), images, split(images))
    vit = explain(arm(), images, split(images))
    for found, way in ((cnn, "Grad-CAM, of the answer"), (vit, "attention roll-out, of all classes")):
        assert isinstance(found, Explanation) and found.way == way
        assert found.maps.shape == (8, 16, 16) and set(images.splits[found.places]) == {"test"}
        assert found.maps.min() == 0.0 and found.maps.max() == 1.0
        assert ((found.probabilities >= 0.5) & (found.probabilities <= 1.0)).all()
    draw_explanation(cnn, images, tmp_path / "new/explanation.png")
    pixels = np.asarray(Image.open(tmp_path / "new/explanation.png").convert("L"))
    assert min(pixels.shape) > 300 and pixels.std() > 5
    xcit = arm(backbone={"name": "xcit_nano_12_p16_224"}, method=CONTRAST)
    assert explain(xcit, images, split(images)) == (
        "no explanation.png: this network has neither maps nor attention between patches"
    )


def test_without_captum_the_result_says_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    images = striped(10)
    found = explain(arm(backbone={"name": "mobilenetv3_small_050"}, method=CONTRAST), images, split(images))
    assert found == "no explanation.png: captum is not installed; pip install 'wardround[explain]'"
