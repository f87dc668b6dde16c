"""A backbone inside MONAI's networks, and as a MONAI bundle, computes what it does outside."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny, write_labelled
from monai import bundle
from monai.networks.nets import UNETR, FlexibleUNet
from torch import Tensor, nn

import wardround
from wardround.backbones import released_model, save_release
from wardround.backbones.vit import own_tensors
from wardround.config.federation import DataConfig
from wardround.data import read_labelled
from wardround.downstream.export import export
from wardround.downstream.load import load_backbone
from wardround.errors import ConfigError
from wardround.plan import resolve
from wardround.registry.release import file_hashes

CONTRAST = {"name": "simclr", "hidden_dim": 16, "output_dim": 8}
NETWORKS: dict[str, dict[str, Any]] = {
    "vit": {"backbone": {"depth": 4}},
    "resnet": {"backbone": {"name": "resnet18"}, "method": CONTRAST, "data": {"image_size": 32}},
    "mobilenet": {"backbone": {"name": "mobilenetv3_small_050"}, "method": CONTRAST, "data": {"image_size": 32}},
    "colour": {"data": {"channels": 3, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]}},
    "swin": {"backbone": {"name": "swin_tiny_patch4_window7_224"}, "method": CONTRAST, "data": {"image_size": 32}},
    "xcit": {"backbone": {"name": "xcit_nano_12_p16_224"}, "method": CONTRAST, "data": {"image_size": 32}},
    "volume": {
        "backbone": {"name": "monai_vit_tiny", "patch_size": 8, "depth": 1},
        "method": {"name": "mae", "decoder_dim": 24, "decoder_depth": 1, "decoder_heads": 2},
        "data": {"dimensions": 3, "spacing": [1.0, 1.0, 1.0], "image_size": 16},
    },
}


def release(folder: Path, kind: str) -> Path:
    plan = resolve(tiny(**NETWORKS[kind]))
    save_release(plan.protocol, plan.state, folder, {"protocol": plan.protocol.model_dump(mode="json")})
    return folder


def trained_vit(folder: Path) -> Path:
    """Write a release whose every weight, the class token's too, has moved far in some steps of training."""
    plan = resolve(tiny(**NETWORKS["vit"]))
    model = released_model(plan.protocol, plan.state)
    model.pos_embed.requires_grad_(False)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    draw = torch.Generator().manual_seed(0)
    images, targets = torch.randn(8, 1, 16, 16, generator=draw), torch.randn(8, 192, generator=draw)
    for _ in range(10):
        optimiser.zero_grad()
        (model(images) - targets).square().mean().backward()
        optimiser.step()
    tensors = own_tensors(model.state_dict(), folder).items()
    state = {f"backbone.{name}": tensor.detach().numpy() for name, tensor in tensors}
    save_release(plan.protocol, state, folder, {"protocol": plan.protocol.model_dump(mode="json")})
    return folder


def outputs_of(model: nn.Module, layers: list[str], images: Tensor) -> list[Tensor]:
    """Return what some layers of a network give."""
    found: list[Tensor] = []
    hooks = [model.get_submodule(name).register_forward_hook(lambda *given: found.append(given[2])) for name in layers]
    with torch.no_grad():
        model.eval()(images)
    for hook in hooks:
        hook.remove()
    return found


def test_flexible_unet_sees_the_maps_that_timms_network_has_inside(tmp_path: Path) -> None:
    net = wardround.load_segmenter(release(tmp_path / "release", "resnet"), 3).eval().net
    assert type(net) is FlexibleUNet
    images = torch.rand(2, 1, 32, 32)
    inside = outputs_of(load_backbone(tmp_path / "release"), ["act1", "layer1", "layer2", "layer3", "layer4"], images)
    maps = net.encoder(images)
    assert all(torch.equal(one, other) for one, other in zip(maps, inside, strict=True))


def test_unetr_sees_the_hidden_states_of_trained_weights_class_token_and_all(tmp_path: Path) -> None:
    net = wardround.load_segmenter(trained_vit(tmp_path / "release"), 2).eval().net
    assert type(net) is UNETR
    images = torch.rand(2, 1, 16, 16)
    vit: Any = load_backbone(tmp_path / "release")
    inside = outputs_of(vit, ["blocks.1", "blocks.2", "blocks.3", "norm"], images)
    last, hidden = net.vit(images)
    for found, expected in zip((*(hidden[place] for place in (3, 6, 9)), last), inside, strict=True):
        assert torch.equal(found, expected[:, 1:])
    tokens = vit._pos_embed(vit.patch_embed(images))[:, 1:]
    without = vit.norm(vit.blocks(tokens))  # what MONAI's own ViT has: no class token
    assert (without - last).abs().max() > 0.05 * last.abs().max(), "trained, the class token matters"


@pytest.mark.parametrize(
    ("kind", "decoder"),
    [("vit", "unetr"), ("vit", "transunet"), ("mobilenet", "flexible_unet"), ("swin", "flexible_unet")],
)
def test_a_segmenter_answers_at_the_images_size_and_every_weight_learns(
    kind: str, decoder: str, tmp_path: Path
) -> None:
    model = wardround.load_segmenter(release(tmp_path / "release", kind), 3, decoder=decoder)
    shape = model.pretrained_cfg["input_size"]
    out = model(torch.rand(2, *shape))
    assert out.shape == (2, 3, *shape[1:])
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kind", "decoder", "said"),
    [
        ("vit", "flexible_unet", "--decoder flexible_unet: on this backbone expected unetr or transunet"),
        ("resnet", "unetr", "--decoder unetr: on this backbone expected flexible_unet"),
        ("xcit", None, "cannot be an encoder: its maps have strides"),
        ("volume", None, "is a network for volumes"),
    ],
)
def test_a_backbone_that_a_decoder_cannot_take(kind: str, decoder: str | None, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        wardround.load_segmenter(release(tmp_path / "release", kind), 2, decoder=decoder)


@pytest.mark.filterwarnings("ignore:parsing config_file")  # MONAI says of every bundle that it may run code
@pytest.mark.parametrize("kind", ["vit", "resnet", "mobilenet", "volume"])
def test_monai_builds_the_same_network_from_a_bundle(kind: str, tmp_path: Path) -> None:
    found = export(release(tmp_path / "release", kind), "monai", tmp_path / "out")
    assert (found.largest_error, found.file) == (0.0, "models/model.pt")
    configs = {f"{name}_file": str(tmp_path / "out/configs" / file) for name, file in CONFIGS.items()}
    bundle.verify_net_in_out("network", device="cpu", **configs)
    expected = load_backbone(tmp_path / "release").eval()
    net: Any = bundle.load("out", bundle_dir=str(tmp_path), workflow_type="inference", device="cpu")
    images = torch.rand(3, *json.loads((tmp_path / "release/config.json").read_text())["pretrained_cfg"]["input_size"])
    with torch.inference_mode():
        assert torch.equal(net.eval()(images), expected(images))


CONFIGS = {"meta": "metadata.json", "config": "inference.json"}


@pytest.mark.filterwarnings("ignore:parsing config_file", "ignore:.*nvImageCodec")
@pytest.mark.parametrize(("kind", "size"), [("vit", 16), ("vit", 37), ("colour", 16)])
def test_a_bundle_turns_files_into_the_features_that_wardround_has(kind: str, size: int, tmp_path: Path) -> None:
    """MONAI's reader would turn pictures on their side, and its resizing is another."""
    export(release(tmp_path / "release", kind), "monai", tmp_path / "out")
    data = DataConfig.model_validate(resolve(tiny(**NETWORKS[kind])).protocol.data)
    images = write_labelled(tmp_path / "images", {"lyon": 6}, size=size, channels=data.channels)
    bundle.run(
        config_file=str(tmp_path / "out/configs/inference.json"),
        workflow_type="inference",
        bundle_root=str(tmp_path / "out"),
        dataset_dir=str(images / "images"),
    )
    found = torch.load(tmp_path / "out/features.pt", weights_only=True)
    assert [Path(file).name for file in found["files"]] == [f"lyon-{number}.png" for number in range(6)]
    pixels = torch.from_numpy(read_labelled(images, data).images).float() / 255.0
    mean, std = (torch.tensor(of).view(1, -1, 1, 1) for of in (data.mean, data.std))
    with torch.inference_mode():
        expected = load_backbone(tmp_path / "release").eval()((pixels - mean) / std)
    assert torch.equal(found["features"], expected)


def test_a_bundle_carries_the_lineage_and_the_model_card(tmp_path: Path) -> None:
    source = release(tmp_path / "release", "vit")
    (source / "README.md").write_text("# the card\n")
    export(source, "monai", tmp_path / "out")
    expected = {"configs/inference.json", "configs/metadata.json", "docs/README.md", "models/model.pt"}
    assert set(file_hashes(tmp_path / "out")) == expected | {
        "config.json",
        "provenance.json",
        "parity.json",
        "README.md",
    }
    assert (tmp_path / "out/docs/README.md").read_text() == "# the card\n"
    weights = torch.load(tmp_path / "out/models/model.pt", weights_only=True)
    assert weights.keys() == load_backbone(source).state_dict().keys()
    formats = json.loads((tmp_path / "out/configs/metadata.json").read_text())["network_data_format"]
    assert formats["inputs"]["image"]["spatial_shape"] == [16, 16] and formats["outputs"]["pred"]["num_channels"] == 192


def test_a_release_that_would_have_monai_run_code_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = release(tmp_path / "release", "vit")
    said = json.loads((source / "config.json").read_text())
    said["model_args"]["depth"] = "$__import__('os').system('true')"
    (source / "config.json").write_text(json.dumps(said))
    provenance = json.loads((source / "provenance.json").read_text())
    provenance["sha256"] = {}
    (source / "provenance.json").write_text(json.dumps(provenance))
    whole = load_backbone(release(tmp_path / "whole", "vit"))
    monkeypatch.setattr("wardround.downstream.export.load_backbone", lambda _: whole)  # timm itself refuses it before
    with pytest.raises(ConfigError, match="holds an expression that MONAI would run"):
        export(source, "monai", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_measuring_a_bundle_leaves_the_images_as_they_are(tmp_path: Path) -> None:
    """MONAI 1.6's NormalizeIntensityd writes into its input; the second run would see what the first one left."""
    from wardround.downstream import monai_bundle

    plan = resolve(tiny())
    source = release(tmp_path / "release", "vit")
    (tmp_path / "out").mkdir()
    run = monai_bundle.write(source, plan.protocol, load_backbone(source), tmp_path / "out/models/model.pt")
    images = np.random.default_rng(0).random((2, 1, 16, 16), np.float32)
    np.testing.assert_array_equal(run(images), run(images))
