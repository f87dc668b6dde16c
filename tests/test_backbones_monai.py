"""Volumes through MONAI's networks, and masked autoencoding on them, against loops in float64."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from conftest import tiny
from torch import Tensor, nn

from wardround import ssl as methods
from wardround.backbones import ViT, build, resampled, sincos_positions
from wardround.backbones.families import VOLUME_FAMILIES
from wardround.config import FederationConfig
from wardround.errors import ConfigError
from wardround.plan import resolve
from wardround.ssl.draws import generator
from wardround.ssl.mae import MAE, patchify, random_order, unpatchify
from wardround.ssl.optimiser import adamw
from wardround.ssl.spark import SparK

EXAMPLES = [name for family in VOLUME_FAMILIES.values() for name in family.examples]
VIT = {"name": "monai_vit_tiny", "patch_size": 8, "depth": 1}


def volumetric(backbone: dict[str, Any] = VIT, size: int = 16, **changes: Any) -> FederationConfig:
    data = {"dimensions": 3, "image_size": size, "spacing": [1.0, 1.0, 1.0], **changes.pop("data", {})}
    return tiny(backbone=backbone, data=data, **changes)


def built(**changes: Any) -> MAE:
    method = methods.build(volumetric(**changes))
    assert isinstance(method, MAE)
    return method


def volumes(count: int = 2, channels: int = 1, size: int = 16) -> Tensor:
    return torch.rand(count, channels, size, size, size, generator=generator("volumes", count))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_volume_becomes_a_vector(name: str) -> None:
    recipe = volumetric({"name": name}, 32)
    backbone = build(recipe.backbone, recipe.data)
    assert backbone.features(volumes(size=32)).shape == (2, backbone.dim)
    listed = [name for stage in backbone.stages() for name in stage]
    assert sorted(listed) == sorted(name for name, _ in backbone.named_parameters())


@pytest.mark.parametrize("name", ["monai_vit_tiny", "monai_swinunetr_small", "monai_resnet10"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    recipe = volumetric({"name": name}, 32)
    backbone = build(recipe.backbone, recipe.data)
    features = backbone.features(volumes(size=32))
    (features * torch.arange(features.shape[1]).sin()).sum().backward()
    for parameter_name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", EXAMPLES)
def test_parameters_stand_in_layers_with_a_rule_and_no_batch_is_normalised(name: str) -> None:
    """But for Swin's tables of relative positions, which no rule covers."""
    recipe = volumetric({"name": name}, 32)
    backbone = build(recipe.backbone, recipe.data)
    owners = {type(layer) for layer in backbone.modules() if list(layer.parameters(recurse=False))}
    known = {nn.Linear, nn.Conv3d, nn.LayerNorm, nn.GroupNorm}
    others = {owner.__name__ for owner in owners - known}
    assert others == ({"Token"} if "vit" in name else {"WindowAttention"} if "swin" in name else set())
    assert all(tensor.is_floating_point() for tensor in backbone.state_dict().values())


def test_batch_normalisation_stays_where_it_is_asked_for() -> None:
    recipe = volumetric({"name": "monai_resnet10", "norm": "batch"}, 32)
    backbone = build(recipe.backbone, recipe.data)
    assert sum(isinstance(layer, nn.BatchNorm3d) for layer in backbone.modules()) == 12  # 1 + 4 x 2 + 3 shortcuts


@pytest.mark.parametrize("name", EXAMPLES)
def test_shapes_are_known_without_memory(name: str) -> None:
    recipe = volumetric({"name": name}, 32)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in build(recipe.backbone, recipe.data).state_dict().items()}
    real = build(recipe.backbone, recipe.data).state_dict()
    assert shapes == {key: tensor.shape for key, tensor in real.items()}


def test_the_encoder_is_monais_own_vit() -> None:
    from monai.networks.nets import ViT as MonaiViT

    recipe = volumetric({"name": "monai_vit_tiny", "patch_size": 8, "depth": 2})
    backbone = build(recipe.backbone, recipe.data).eval()
    assert isinstance(backbone, ViT)
    theirs = MonaiViT(1, 16, 8, 192, 768, 2, 3, classification=True, qkv_bias=True).eval()
    state = {name: tensor for name, tensor in backbone.state_dict().items() if name.startswith(("blocks", "norm"))}
    state["patch_embedding.patch_embeddings.weight"] = backbone.state_dict()["patch_embed.proj.weight"]
    state["patch_embedding.patch_embeddings.bias"] = backbone.state_dict()["patch_embed.proj.bias"]
    state["patch_embedding.position_embeddings"] = backbone.positions[None]
    state["cls_token"] = backbone.class_token.weight[None, None]
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("norm_cross_attn" in name or "classification_head" in name for name in missing)  # neither is called
    with torch.no_grad():
        _, hidden = theirs(volumes())
        expected = theirs.norm(hidden[-1])
        torch.testing.assert_close(backbone.encode(backbone.embed(volumes())), expected, rtol=1e-4, atol=1e-5)


def test_positions_are_sines_and_cosines_of_width_height_and_depth() -> None:
    table = sincos_positions(16, (2, 3, 4))
    depth, height, width = 1, 2, 3
    expected = [f(p * w) for p in (width, height, depth) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
    assert table.shape == (24, 16)
    assert table[(depth * 3 + height) * 4 + width].tolist() == pytest.approx([*expected, 0, 0, 0, 0], abs=1e-6)


def test_a_smaller_volume_takes_positions_between_those_of_the_table() -> None:
    recipe = volumetric({"name": "monai_vit_tiny", "patch_size": 4, "depth": 1})
    backbone = build(recipe.backbone, recipe.data)
    assert isinstance(backbone, ViT)
    table = backbone.positions.view(4, 4, 4, -1)
    # By hand: halving the grid puts a position in the middle of eight.
    middle = table[:2, :2, 2:].mean((0, 1, 2))
    torch.testing.assert_close(resampled(backbone.positions, backbone.grid, (2, 2, 2))[1], middle)
    assert backbone.features(volumes(size=8)).shape == (2, 192)


def test_patches_are_slices_first_with_channels_last() -> None:
    volume = torch.arange(2 * 4 * 4 * 4).reshape(1, 2, 4, 4, 4)
    patches = patchify(volume, 2)
    assert patches.shape == (1, 8, 16)
    # Patch 5 is the one behind, above, to the right: depth 2-3, height 0-1, width 2-3.
    expected = [volume[0, c, z, y, x].item() for z in (2, 3) for y in (0, 1) for x in (2, 3) for c in (0, 1)]
    assert patches[0, 5].tolist() == expected
    assert torch.equal(unpatchify(patches, 2, 2), volume)


def reference_loss(method: MAE, view: Tensor, order: Tensor) -> float:
    """Return one volume's loss as He et al. 2022 describe it: a loop over hidden patches, in float64."""
    patch, channels, side = method.backbone.patch, view.shape[0], view.shape[1] // method.backbone.patch
    prediction = method.predict(view[None], order[None])[0]
    errors = []
    for place in order[method.num_visible :].tolist():
        z0, y0, x0 = place // side**2 * patch, place // side % side * patch, place % side * patch
        target = [
            view[c, z0 + z, y0 + y, x0 + x].item()
            for z, y, x in product(range(patch), repeat=3)
            for c in range(channels)
        ]
        mean = sum(target) / len(target)
        variance = sum((t - mean) ** 2 for t in target) / (len(target) - 1)
        for value, predicted in zip(target, prediction[place].tolist(), strict=True):
            errors.append((predicted - (value - mean) / math.sqrt(variance + 1e-6)) ** 2)
    return sum(errors) / len(errors)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_is_the_papers_over_the_hidden_patches(channels: int) -> None:
    data = {"channels": channels, "mean": [0.5] * channels, "std": [0.2] * channels}
    method = built(data=data).double()
    views = volumes(channels=channels).double()
    order = random_order(2, 8, generator(1))
    with torch.no_grad():
        losses = method(views, order)
        expected = [reference_loss(method, view, row) for view, row in zip(views, order, strict=True)]
    # The errors are taken in float32 on purpose, whatever the network's precision.
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_hidden_voxels_never_reach_the_prediction() -> None:
    method, views = built(), volumes()
    order = random_order(2, 8, generator(2))
    hidden = patchify(torch.ones_like(views), 8)
    hidden.scatter_(1, order[:, : method.num_visible, None].expand(-1, -1, 512), 0.0)
    altered = views + 100 * unpatchify(hidden, 8, 1)
    assert not torch.equal(altered, views)
    with torch.no_grad():
        assert torch.equal(method.predict(views, order), method.predict(altered, order))


def test_hidden_voxels_never_reach_the_prediction_of_a_convolutional_network() -> None:
    """Sparse masking is tested on images; here it is only shown to hold on a third axis."""
    method = methods.build(volumetric({"name": "monai_resnet10"}, 64))
    assert isinstance(method, SparK)
    views, order = volumes(size=64), random_order(2, 8, generator(4))
    hidden = patchify(torch.ones_like(views), 32)
    hidden.scatter_(1, order[:, : method.num_visible, None].expand(-1, -1, 32**3), 0.0)
    altered = views + 100 * unpatchify(hidden, 32, 1)
    assert not torch.equal(altered, views)
    with torch.no_grad():
        assert torch.equal(method.predict(views, order), method.predict(altered, order))


def test_masked_autoencoding_reaches_every_parameter_and_learns() -> None:
    method = built()
    inputs = method.prepare(volumes(4), generator(3))
    assert inputs[0].shape == (4, 1, 16, 16, 16)
    optimiser = adamw(method, method.recipe.training)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = method(*inputs).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"backbone": {"name": "monai_vit_tiny"}}, "dimensions = 3"),
        ({"backbone": {"name": "vit_tiny_patch16_224"}, "data": {"dimensions": 3, "spacing": [1, 1, 1]}}, "for images"),
        ({"backbone": {"name": "monai_vit_huge"}}, "monai_vit_base"),
        (
            {"backbone": {"name": "monai_vit_tiny", "patch_size": 5}, "data": {"dimensions": 3, "spacing": [1, 1, 1]}},
            "does not divide",
        ),
        (
            {"backbone": {"name": "monai_resnet10"}, "data": {"dimensions": 3, "spacing": [1, 1, 1], "image_size": 48}},
            "multiple of 32",
        ),
        (
            {
                "backbone": {"name": "monai_swinunetr_small", "depth": 2},
                "data": {"dimensions": 3, "spacing": [1, 1, 1]},
            },
            "keys of ViTs",
        ),
    ],
)
def test_what_does_not_fit_volumes_is_refused_with_the_reason(config: dict[str, Any], words: str) -> None:
    recipe = tiny(**config)
    with pytest.raises(ConfigError, match=words):
        build(recipe.backbone, recipe.data)


@pytest.mark.parametrize("name", ["monai_resnet10", "monai_swinunetr_small"])
def test_checkpointing_that_a_volumes_network_cannot_is_refused(name: str) -> None:
    recipe = volumetric({"name": name}, 32)
    with (
        pytest.raises(ConfigError, match="checkpointing = true: this federation's backbone cannot"),
        torch.device("meta"),
    ):
        build(recipe.backbone, recipe.data).checkpoint_activations()


def test_a_view_that_is_no_whole_patches_is_refused() -> None:
    method = {"name": "simclr", "hidden_dim": 16, "output_dim": 8}
    with pytest.raises(ConfigError, match="does not take views of 12 pixels"):
        resolve(volumetric(method=method, training={"resolutions": [[1, 12], [2, 16]]}))
