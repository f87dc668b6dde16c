"""A release gives the trained features, in stock timm or in ours, and says which; another run may start from it."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import tiny
from numpy.typing import NDArray
from torch import Tensor

from wardround import ssl as methods
from wardround.backbones import FAMILIES, build, family_of, load_into, released_model, save_release
from wardround.config import FederationConfig
from wardround.downstream.arms import three_arms
from wardround.downstream.load import load_backbone
from wardround.errors import CheckpointError, ConfigError
from wardround.plan import resolve
from wardround.update import State, state_hash


def config(name: str, size: int = 32, channels: int = 1, **backbone: object) -> FederationConfig:
    plain_vit = {"patch_size": 8, "depth": 1} if name.startswith("vit_") else {}
    data = {"image_size": max(size, family_of(name).least), "channels": channels}
    colours = {"mean": [0.5] * channels, "std": [0.25] * channels}
    return tiny(backbone={"name": name, **plain_vit, **backbone}, data={**data, **colours})


def trained(recipe: FederationConfig) -> State:
    """Return a state in which every scale, shift and bias is drawn, as in training they move from 0 and 1."""
    draw = np.random.default_rng(0)
    torch.manual_seed(0)
    state = {f"backbone.{n}": t.numpy() for n, t in build(recipe.backbone, recipe.data).state_dict().items()}
    if recipe.backbone.norm == "batch":
        staying = ("running_mean", "running_var", "num_batches_tracked")
        state = {name: array for name, array in state.items() if not name.endswith(staying)}
    return {n: draw.uniform(0.5, 1.5, a.shape).astype(np.float32) if a.ndim == 1 else a for n, a in state.items()}


def released(recipe: FederationConfig, state: State, folder: Path, images: NDArray[np.uint8] | None = None) -> Path:
    protocol = recipe.protocol(state_hash(state))
    save_release(protocol, state, folder, {"protocol": protocol.model_dump(mode="json")}, images)
    return folder


def pictures(count: int, size: int = 32) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (count, 1, size, size), dtype=np.uint8)


def batch(recipe: FederationConfig) -> Tensor:
    size = recipe.data.image_size
    return torch.randn(2, recipe.data.channels, size, size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_release_gives_the_features_that_were_trained_and_stock_timm_gives_them_or_raises(
    family: str, tmp_path: Path
) -> None:
    recipe = config(FAMILIES[family].examples[0])
    state = trained(recipe)
    backbone = build(recipe.backbone, recipe.data).eval()
    backbone.load_state_dict({n.removeprefix("backbone."): torch.from_numpy(a) for n, a in state.items()})
    released(recipe, state, tmp_path)
    stock = json.loads((tmp_path / "provenance.json").read_text())["stock_timm"]
    assert stock == FAMILIES[family].stock
    with torch.inference_mode():
        expected, loaded = backbone.features(batch(recipe)), load_backbone(tmp_path)(batch(recipe))
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    if stock:  # `load_backbone` was timm itself
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
        with torch.inference_mode():
            torch.testing.assert_close(again(batch(recipe)), loaded)
    else:
        with pytest.raises(RuntimeError, match=r"Unknown model .*load_backbone"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    found = load_into(recipe, tmp_path)
    assert found.keys() == state.keys()
    assert all(np.allclose(found[name], state[name], atol=1e-6) for name in state)


@pytest.mark.parametrize("name", ["vgg11", "mobilenetv3_small_050", "efficientvit_b0", "xcit_nano_12_p16_224"])
def test_what_stock_timm_cannot_load_is_adapted_all_the_same(name: str, tmp_path: Path) -> None:
    recipe = config(name)
    released(recipe, trained(recipe), tmp_path)
    grey = batch(recipe)
    with torch.inference_mode():
        vector = load_backbone(tmp_path).eval()(grey)
        in_colour = load_backbone(tmp_path, in_chans=3).eval()(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(in_colour, vector, rtol=1e-3, atol=1e-3 * float(vector.abs().max()))
        assert load_backbone(tmp_path, num_classes=5).eval()(grey).shape == (2, 5)
        maps = load_backbone(tmp_path, features_only=True).eval()(grey)
    assert len(maps) > 3 and all(len(one) == 2 for one in maps)
    assert load_backbone(tmp_path).pretrained_cfg["mean"] == [0.5]


def test_a_release_of_a_colour_network_sees_grey_images_as_it_saw_them_in_colour(tmp_path: Path) -> None:
    recipe = config("fastvit_t8", channels=3)  # its stem has two convolutions that see the image
    released(recipe, trained(recipe), tmp_path)
    grey = batch(config("fastvit_t8"))
    with torch.inference_mode():
        in_colour, in_grey = load_backbone(tmp_path).eval(), load_backbone(tmp_path, in_chans=1).eval()
        expected = in_colour(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(in_grey(grey), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_statistics_of_a_release_are_those_of_the_public_images(tmp_path: Path) -> None:
    recipe = config("resnet18", norm="batch")
    images = pictures(70)
    model = released_model(recipe, trained(recipe), images)
    seen = (torch.from_numpy(images).double() / 255 - 0.5) / 0.25
    with torch.no_grad():
        inner = model.double().conv1(seen)  # [70, 64, 16, 16]
    mean = torch.stack([part.mean((0, 2, 3)) for part in inner.split(35)]).mean(0)
    variance = torch.stack([part.var((0, 2, 3)) for part in inner.split(35)]).mean(0)
    torch.testing.assert_close(model.bn1.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.bn1.running_var, variance, rtol=1e-4, atol=1e-5)


def test_without_public_images_there_is_no_release_of_batch_normalisation(tmp_path: Path) -> None:
    recipe = config("resnet18", size=64, norm="batch")
    with pytest.raises(ConfigError, match=r"there are 0; name an \[evaluation_set\]"):
        released(recipe, trained(recipe), tmp_path / "release")
    assert not (tmp_path / "release").exists()
    with pytest.raises(ConfigError, match=r"name an \[evaluation_set\]"):
        resolve(recipe)
    with pytest.raises(ConfigError, match="there are 1;"):
        released_model(recipe, trained(recipe), pictures(1, size=64))


def test_fedbn_leaves_scale_and_shift_at_the_sites_so_that_a_release_has_one_and_zero(tmp_path: Path) -> None:
    recipe = config("resnet18", norm="batch", batch_norm="fedbn")
    state = {name: array for name, array in trained(recipe).items() if "bn" not in name and "downsample.1" not in name}
    released(recipe, state, tmp_path, pictures(9))
    model = load_backbone(tmp_path)
    assert model.layer1[0].bn2.weight.eq(1).all() and model.layer1[0].bn2.bias.eq(0).all()
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["stock_timm"] is True
    assert provenance["batch_norm"] == {
        "scale and shift": "1 and 0: they stay at the sites",
        "statistics": "of 9 public images",
    }


def test_the_random_arm_has_statistics_too(tmp_path: Path) -> None:
    recipe = config("resnet18", size=64, norm="batch")
    released(recipe, trained(recipe), tmp_path, pictures(9, size=64))
    arms = three_arms(tmp_path)
    found = arms["random"](pictures(9, size=64))
    assert np.isfinite(found).all() and not np.allclose(found, arms["backbone"](pictures(9, size=64)))
    start = methods.get_state(methods.build(recipe))
    with torch.inference_mode():
        seen = (torch.from_numpy(pictures(9, size=64)).float() / 255 - 0.5) / 0.25
        expected = released_model(recipe, start, pictures(9, size=64))(seen)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_a_run_starts_from_the_weights_that_it_names_and_the_protocol_covers_them(tmp_path: Path) -> None:
    recipe = config("vit_tiny_patch16_224")
    before = resolve(recipe)
    folder = released(recipe, trained(recipe), tmp_path / "release")
    after = resolve(recipe.model_copy(update={"initial_weights": folder}))
    assert after.state.keys() == before.state.keys()
    for name, array in trained(recipe).items():
        np.testing.assert_allclose(after.state[name], array, atol=1e-6)
    assert all(np.array_equal(after.state[n], before.state[n]) for n in before.state if n.startswith("head."))
    assert after.protocol.initial_state == state_hash(after.state) and after.digest != before.digest
    folder.rename(tmp_path / "elsewhere")
    moved = resolve(recipe.model_copy(update={"initial_weights": tmp_path / "elsewhere"}))
    assert moved.digest == after.digest


def test_what_stays_at_the_sites_is_not_taken_from_initial_weights(tmp_path: Path) -> None:
    recipe = config("resnet18", norm="batch")
    folder = released(recipe, trained(recipe), tmp_path / "release", pictures(9))
    assert "backbone.net.bn1.running_mean" in load_into(recipe, folder)
    named = recipe.model_copy(update={"initial_weights": folder})
    simclr = tiny(
        **named.model_dump(mode="json", include={"backbone", "data", "initial_weights"}),
        method={"name": "simclr"},
        evaluation_set={"kind": "procedural"},
    )
    assert "backbone.net.bn1.running_mean" not in resolve(simclr).state


def test_initial_weights_of_other_channels_are_adapted_as_timm_adapts(tmp_path: Path) -> None:
    colour = config("resnet18", channels=3)
    state = trained(colour)
    folder = released(colour, state, tmp_path)
    found = load_into(config("resnet18"), folder)["backbone.net.conv1.weight"]
    np.testing.assert_allclose(found, state["backbone.net.conv1.weight"].sum(1, keepdims=True), rtol=1e-5, atol=1e-6)


def test_initial_weights_of_another_size_of_image_keep_what_does_not_depend_on_it(tmp_path: Path) -> None:
    small = config("swin_tiny_patch4_window7_224", size=16)
    folder = released(small, trained(small), tmp_path)
    found, large = load_into(config("swin_tiny_patch4_window7_224"), folder), trained(config(small.backbone.name))
    assert {name: array.shape for name, array in found.items()} == {name: array.shape for name, array in large.items()}
    assert found["backbone.net.layers.0.blocks.0.attn.relative_position_bias_table"].shape == (169, 3)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"depth": 2}, "Missing key"),
        ({"patch_size": 4}, "size mismatch"),
        ({"name": "resnet18"}, "is no 'resnet18' with norm = 'group' as [backbone] has it"),
    ],
)
def test_weights_of_another_architecture_are_refused(other: dict[str, object], words: str, tmp_path: Path) -> None:
    recipe = config("vit_tiny_patch16_224")
    folder = released(recipe, trained(recipe), tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_into(config(**{"name": "vit_tiny_patch16_224", **other}), folder)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_weights_of_another_normalisation_are_refused(tmp_path: Path) -> None:
    folder = released(config("resnet18"), trained(config("resnet18")), tmp_path)
    with pytest.raises(ConfigError, match="running_mean"):
        load_into(config("resnet18", norm="batch"), folder)


def test_a_vit_with_learnt_positions_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, in_chans=1, num_classes=0)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    with pytest.raises(ConfigError, match="learnt positions"):
        load_into(config("vit_tiny_patch16_224"), tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="was cut or altered"):
        load_into(config("vit_tiny_patch16_224"), tmp_path)


@pytest.mark.parametrize("name", ["monai_vit_tiny", "monai_resnet10"])
def test_a_release_for_volumes_is_rebuilt_and_takes_a_classifier(name: str, tmp_path: Path) -> None:
    pytest.importorskip("monai")
    depth = {"depth": 1} if "vit" in name else {}
    volumes = {"image_size": 32, "dimensions": 3, "spacing": [1.0, 1.0, 1.0]}
    recipe = tiny(backbone={"name": name, **depth}, data=volumes)
    backbone = build(recipe.backbone, recipe.data).eval()
    state = {f"backbone.{n}": t.numpy() for n, t in backbone.state_dict().items()}
    released(recipe, state, tmp_path)
    seen = torch.randn(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        torch.testing.assert_close(load_backbone(tmp_path).eval()(seen), backbone.features(seen))
        assert load_backbone(tmp_path, num_classes=3)(seen).shape == (2, 3)
    assert all(np.array_equal(array, state[n]) for n, array in load_into(recipe, tmp_path).items())
    with pytest.raises(ConfigError, match="leave out in_chans"):
        load_backbone(tmp_path, in_chans=3)
