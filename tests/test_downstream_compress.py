"""A backbone made smaller: the numbers of each way, what is left of the features, and the release that comes of it."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import tiny, write_labelled
from rich.console import Console
from torch import Tensor, nn

from wardround import ssl
from wardround.backbones import save_release
from wardround.backbones.compressed import in_two
from wardround.cli import main
from wardround.downstream.arms import untrained_arm
from wardround.downstream.compress import Request, compress
from wardround.downstream.compressed_release import changed_shapes
from wardround.downstream.distil import Distillation, distil, standard
from wardround.downstream.export import export
from wardround.downstream.load import load_backbone, protocol_of
from wardround.downstream.low_rank import factors
from wardround.downstream.moments import Moments
from wardround.downstream.prune import cut, prune
from wardround.errors import ConfigError, WardroundError
from wardround.plan import resolve
from wardround.probe.features import features
from wardround.registry.release import check
from wardround.report.compressed import compressed_table

NETWORKS: dict[str, dict[str, Any]] = {
    "vit": {},
    "resnet": {
        "backbone": {"name": "resnet10t"},
        "method": {"name": "simclr", "hidden_dim": 16, "output_dim": 16},
        "data": {"image_size": 32},
    },
}
PRIVATE = {"unit": "patient", "epsilon": {"lyon": 3.0}, "delta": 1e-5, "statement": {"lyon": "Everything is private."}}


def write_whole_release(folder: Path, **changes: Any) -> Path:
    """Write a release with the lineage that a coordinator writes, of weights that the seed gives."""
    plan = resolve(tiny(**changes))
    said = {
        "federation": "tiny",
        "federation_digest": "f" * 64,
        "protocol": plan.protocol.model_dump(mode="json"),
        "protocol_digest": plan.digest,
        "method": plan.config.method.name,
        "backbone": plan.config.backbone.name,
        "modality": "generic",
        "round": 1,
        "rounds": 2,
        "sites": {"lyon": {"weight": 1.0, "rounds": 1}},
        "software": {"wardround": "0", "sources": "0", "lock": "0", "lock_of": "x"},
        "differential_privacy": PRIVATE,
        "evaluation": {"missing": "x"},
        "features": {"missing": "x"},
        "parent": None,
    }
    save_release(plan.protocol, plan.state, folder, said)
    return folder


@pytest.fixture(scope="module", params=NETWORKS)
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_release(tmp_path_factory.mktemp("release") / request.param, **NETWORKS[request.param])


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_release(tmp_path_factory.mktemp("vit") / "release")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("images"), {"lyon": 60})


def pixels(count: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (count, 1, size, size), dtype=np.uint8)


def rebuilt(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> nn.Module:
    """Return a network of these tensors, by the way that a release goes."""
    from safetensors.torch import save_file

    shapes = changed_shapes(model, tensors)
    config = json.loads((folder / "config.json").read_bytes()) | {"compressed": {"shapes": shapes}}
    aside = folder.with_name("aside")
    aside.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside / "model.safetensors")
    (aside / "config.json").write_text(json.dumps(config))
    said = json.loads((folder / "provenance.json").read_bytes()) | {"stock_timm": False, "sha256": {}}
    (aside / "provenance.json").write_text(json.dumps(said))
    return load_backbone(aside).eval()


def seen_by(layer: nn.Module, x: Tensor) -> Moments:
    """Return the moments of what comes out of a layer, in float64."""
    out = layer.double()(x.double()).movedim(1, -1).reshape(-1, len(layer.weight)).detach()
    return Moments(len(out), out.sum(0), out.T @ out)


@pytest.mark.parametrize("layer", [nn.Linear(6, 9), nn.Conv2d(3, 7, 3, stride=2, padding=1), nn.Conv2d(4, 5, 1)])
def test_two_layers_of_full_rank_are_the_layer_to_rounding(layer: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 6) if isinstance(layer, nn.Linear) else torch.randn(4, layer.in_channels, 8, 8)
    expected = layer(x).detach()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    inner, outer, shift = factors(weight, bias, seen_by(layer, x), len(weight))
    two = in_two(layer.float(), len(weight))
    two.load_state_dict({"0.weight": inner, "1.weight": outer, "1.bias": shift})
    torch.testing.assert_close(two(x), expected, atol=1e-5, rtol=1e-5)


def test_no_weights_of_a_rank_have_outputs_nearer_to_the_layers() -> None:
    """By Eckart and Young, the outputs themselves have no nearer matrix of that rank about their mean."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 9), torch.randn(50, 6) @ torch.randn(6, 6) + 3.0
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    found = seen_by(layer, x)
    inner, outer, shift = (one.double() for one in factors(weight, bias, found, 2))  # type: ignore[union-attr]
    outputs = x.double() @ weight.double().T + bias.double()
    left = (x.double() @ inner.T @ outer.T + shift - outputs).square().sum()
    least = torch.linalg.svdvals(outputs - outputs.mean(0))[2:].square().sum()
    torch.testing.assert_close(left, least, rtol=1e-4, atol=1e-6)


def test_what_is_cut_is_made_up_for_by_what_says_the_same() -> None:
    weight = torch.tensor([[2.0, 1.0, 4.0]])
    second = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    kept, smaller = cut(weight, second, 1, 0.6)  # the energies are 4, 1 and 16; the second unit is the first
    assert kept.tolist() == [0, 2]
    torch.testing.assert_close(smaller, torch.tensor([[2.0 + 1.0 / 1.001, 4.0]]))


def test_units_that_send_nothing_are_cut_and_nothing_changes(release: Path) -> None:
    model = load_backbone(release).eval()
    recipe = protocol_of(release)
    with torch.no_grad():
        if release.name == "vit":
            block = model.blocks[0]
            block.mlp.fc1.weight[::2] = 0
            block.mlp.fc1.bias[::2] = 0
            block.attn.qkv.weight.view(3, 3, -1)[2, 1] = 0  # the values of one head of three
            block.attn.qkv.bias.view(3, 3, -1)[2, 1] = 0
            keep, reading = 0.5, ("blocks.0.mlp.fc2", slice(1, None, 2))
        else:
            for name, norm in model.named_modules():
                if name.endswith("bn1") and "layer" in name:
                    norm.weight.view(norm.num_groups, -1)[::2] = 0
                    norm.bias.view(norm.num_groups, -1)[::2] = 0
            width = model.layer4[0].bn1.num_channels // model.layer4[0].bn1.num_groups
            kept = torch.arange(512).view(-1, width)[1::2].flatten()
            keep, reading = 0.5, ("layer4.0.conv2", kept)
    given = pixels(8, recipe.data.image_size)
    tensors = prune(model, given, recipe.data, keep, "cpu")
    assert tensors is not None
    before = dict(model.named_modules())[reading[0]].weight
    assert torch.equal(tensors[f"{reading[0]}.weight"], before[:, reading[1]]), "no other weight moves"
    smaller = rebuilt(model, tensors, release)
    assert sum(one.numel() for one in smaller.parameters()) < sum(one.numel() for one in model.parameters())
    old, new = (features(net, given, recipe.data.mean, recipe.data.std) for net in (model, smaller))
    np.testing.assert_allclose(new, old, atol=2e-6)


def test_batch_normalised_channels_are_cut_one_by_one(tmp_path: Path) -> None:
    public = {"kind": "procedural", "count": 64}
    config = tiny(
        **{**NETWORKS["resnet"], "backbone": {"name": "resnet10t", "norm": "batch"}, "evaluation_set": public}
    )
    plan, given = resolve(config), pixels(8, 32)
    save_release(
        plan.protocol, plan.state, tmp_path / "release", {"protocol": plan.protocol.model_dump(mode="json")}, given
    )
    model = load_backbone(tmp_path / "release").eval()
    tensors = prune(model, given, config.data, 0.3, "cpu")
    assert tensors is not None
    assert len(tensors["layer1.0.bn1.running_var"]) == len(tensors["layer1.0.bn1.weight"]) == 20  # of 64, rounded up
    assert rebuilt(model, tensors, tmp_path / "release")(torch.zeros(1, 1, 32, 32)).shape == (1, 512)


def test_the_loss_of_distillation_falls_and_a_seed_gives_its_bits(vit: Path) -> None:
    recipe, given = protocol_of(vit), pixels(32, 16)
    ends = []
    for _ in range(2):
        original, smaller = load_backbone(vit), load_backbone(vit)
        with torch.no_grad():
            smaller.blocks[0].mlp.fc2.weight.mul_(3.0)
        told = standard(original, given, recipe.data)
        losses = distil(original, smaller, told, given, recipe, Distillation(30, 1e-3, batch_size=16), seed=1)
        assert losses[-1] < 0.5 * losses[0]
        ends.append((losses, features(smaller, given, recipe.data.mean, recipe.data.std)))
    assert ends[0][0] == ends[1][0]
    np.testing.assert_array_equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("by", ["prune", "low-rank"])
def test_a_smaller_network_is_a_release_that_loads_adapts_and_exports(
    by: str, release: Path, images: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    found = compress(Request(str(release), by, made, images, keep=0.4, steps=2))
    assert found.compressed.parameters < 0.8 * found.original.parameters
    assert found.compressed.gflops < found.original.gflops
    assert found.compressed.megabytes < found.original.megabytes
    assert json.loads((made / "compressed.json").read_text())["least_cosine"] == found.least_cosine > 0.5
    assert {path.name for path in made.iterdir()} == {
        *("model.safetensors", "config.json", "provenance.json", "README.md", "sbom.cdx.json", "compressed.json")
    }
    check(made)
    size = protocol_of(release).data.image_size
    assert load_backbone(made, num_classes=3, in_chans=3)(torch.zeros(2, 3, size, size)).shape == (2, 3)
    assert len(load_backbone(made, features_only=True)(torch.zeros(1, 1, size, size))) >= 1
    if release.name == "vit":
        assert load_backbone(made, img_size=32)(torch.zeros(1, 1, 32, 32)).shape == (1, 192)
        assert export(made, "pt2", tmp_path / "pt2", images).largest_error == 0.0
    assert export(made, "monai", tmp_path / "monai", images).largest_error == 0.0
    with pytest.raises(RuntimeError, match=r"compressed, to be loaded by wardround.load_backbone"):
        timm.create_model(f"local-dir:{made}", pretrained=True)


def test_a_student_is_a_whole_release_of_its_own_architecture(vit: Path, images: Path, tmp_path: Path) -> None:
    made, again = tmp_path / "made", tmp_path / "again"
    found = compress(Request(str(vit), "distil", made, images, into="mobilenetv3_small_050", steps=3, data=images))
    compress(Request(str(vit), "distil", again, images, into="mobilenetv3_small_050", steps=3))
    assert (made / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert found.probe is not None and found.losses is not None
    assert found.probe.compressed.low is not None and found.probe.metrics == ("balanced accuracy", "AUC")
    said = json.loads((made / "provenance.json").read_text())
    assert said["backbone"] == said["protocol"]["backbone"]["name"] == "mobilenetv3_small_050"
    assert said["protocol_digest"] == resolve(tiny()).digest, "what the sites approved"
    assert said["differential_privacy"] == PRIVATE
    (step,) = said["compressed"]
    parent = json.loads((vit / "provenance.json").read_text())["sha256"]["model.safetensors"]
    assert said["parent"]["weights"] == step["parent"]["weights"] == found.original.weights == parent
    assert step["by"] == "distil" and step["images"] == found.images == 34, "of 36, one patient's are held"
    card = (made / "README.md").read_text()
    assert "nothing is promised to the people on these" in card and "Everything is private." in card
    assert "as long as none of them is on these images" in card
    assert load_backbone(made)(torch.zeros(2, 1, 16, 16)).shape == (2, 288)


def test_every_number_of_the_table_is_whole_in_a_terminal_of_80() -> None:
    sizes = {"megabytes": 343.22, "parameters": 85_798_656, "gflops": 35.127, "milliseconds": 118.35}
    scores = {"balanced_accuracy": 0.6, "auc": 0.75, "average_precision": 0.8}
    probed = {"mean": scores, "low": scores, "high": scores}
    probe = {"metrics": ("balanced accuracy", "AUC"), "original": probed, "compressed": probed}
    found = {
        "by": "prune",
        "original": sizes,
        "compressed": sizes,
        "compared_on": 2,
        "least_cosine": 1.0,
        "explained": 0.5,
        "losses": None,
        "probe": {**probe, "labelled": 36, "tested": 12},
    }
    console = Console(width=80, file=io.StringIO())
    console.print(compressed_table(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for number in ("343.22", "85,798,656", "35.127", "118.35", "0.600 / 0.750"):
        assert text.count(number) == 2
    assert "balanced accuracy" in text and "…" not in text


def test_a_vit_takes_the_patches_of_the_vit_that_it_learns_from(images: Path, tmp_path: Path) -> None:
    deep = write_whole_release(tmp_path / "deep", backbone={"depth": 2})
    compress(Request(str(deep), "distil", tmp_path / "made", images, into="test_vit", steps=1))
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert (config["architecture"], config["model_args"]["patch_size"]) == ("test_vit", 8)
    assert timm.create_model(f"local-dir:{tmp_path / 'made'}", pretrained=True)(torch.zeros(1, 1, 16, 16)).shape == (
        1,
        64,
    )


@pytest.mark.parametrize("method", ["mae", "simclr", "dino"])
def test_the_random_arm_is_where_the_method_began(method: str) -> None:
    recipe = tiny(method={"name": method})
    begun = ssl.build(recipe).backbone
    given = pixels(4, 16)
    expected = begun.eval().features((torch.from_numpy(given).float() / 255.0 - 0.5) / 0.25).detach().numpy()
    np.testing.assert_allclose(untrained_arm(recipe)(given), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by": "quantise"}, "--by quantise: expected one of prune, low-rank, distil"),
        ({"keep": 1.0}, r"--keep 1.0: expected a share between 0 and 1"),
        ({"keep": 0.0}, r"--keep 0.0: expected"),
        ({"steps": -1}, "--steps -1: expected 0 or more"),
        ({"by": "distil"}, "takes --into NAME"),
        ({"by": "distil", "into": "resnet10t", "steps": 0}, "--steps 0: expected 1 or more"),
        ({"into": "resnet10t"}, "--into resnet10t: is for --by distil"),
        ({"by": "distil", "into": "resnet100"}, "--into resnet100: is no architecture of timm; did you mean 'resnet10"),
        ({"by": "distil", "into": "resnet50"}, "--into resnet50: has 23,.* parameters, and the original"),
        ({"by": "distil", "into": "inception_v3"}, "--into inception_v3: .* needs at least 75"),
        ({"by": "distil", "into": "vit_base_patch16_224"}, "has 8"),
        ({"source": "bare"}, "'provenance.json' does not say its backbone; without lineage"),
        ({"images": "nothing"}, "nothing: is no folder"),
        ({"images": "empty"}, "empty: the images folder .* is empty. Name another folder by --images"),
        ({"images": "words"}, "words: no image among 1 files.* Name another folder by --images, or mend these"),
        ({"to": "full"}, "full: is not empty; name a new folder"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(
    changes: dict[str, Any], message: str, vit: Path, images: Path, tmp_path: Path
) -> None:
    plan = resolve(tiny())
    save_release(plan.protocol, plan.state, tmp_path / "bare", {"protocol": plan.protocol.model_dump(mode="json")})
    for name in ("empty", "words", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "words" / "a.txt").write_text("x")
    (tmp_path / "full" / "thesis.tex").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    given = {"source": vit, "by": "prune", "to": tmp_path / "made", "images": images}
    given |= {
        name: tmp_path / value if name in ("source", "images", "to") else value for name, value in changes.items()
    }
    with pytest.raises(WardroundError, match=message):
        compress(Request(**{**given, "source": str(given["source"])}))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_network_is_not_cut_twice_and_one_without_blocks_not_at_all(vit: Path, images: Path, tmp_path: Path) -> None:
    compress(Request(str(vit), "prune", tmp_path / "made", images))
    with pytest.raises(ConfigError, match="is pruned or factorised already; compress its original"):
        compress(Request(str(tmp_path / "made"), "low-rank", tmp_path / "again", images))
    write_whole_release(tmp_path / "other", **{**NETWORKS["resnet"], "backbone": {"name": "mobilenetv3_small_050"}})
    with pytest.raises(ConfigError, match="has no layer that could be made smaller; take low-rank or distil"):
        compress(Request(str(tmp_path / "other"), "prune", tmp_path / "again", images))
    assert not (tmp_path / "again").exists()


def test_an_error_is_one_line_and_exit_2(
    vit: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["wardround", "compress", str(vit), "--by", "x", "--images", str(images), "--to", str(tmp_path / "made")]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --by x: expected one of prune, low-rank, distil.\n"
