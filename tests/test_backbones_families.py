"""Every family is what its line in the table says."""

from functools import partial
from itertools import pairwise

import pytest
import timm
import torch
from conftest import ROOT, tiny
from timm.layers import BatchNormAct2d, GroupNormAct
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wardround.backbones import FAMILIES, Backbone, build, family_of
from wardround.backbones.normalisation import group_normalise
from wardround.backbones.stock import stock_arguments
from wardround.config import FederationConfig
from wardround.errors import ConfigError

EVERY = pytest.mark.parametrize("family", FAMILIES)
TIMM = pytest.mark.parametrize("family", [family for family in FAMILIES if family != "vit"])


def config(name: str, norm: str = "group", size: int | None = None, channels: int = 1) -> FederationConfig:
    """Return a federation of a backbone, on the smallest images of 32 pixels and more that it takes."""
    plain_vit = {"patch_size": 8, "depth": 1} if name.startswith("vit_") else {}
    colours = {"channels": channels, "mean": [0.5] * channels, "std": [0.25] * channels}
    data = {"image_size": size or max(32, family_of(name).least), **colours}
    return tiny(backbone={"name": name, "norm": norm, **plain_vit}, data=data)


def smallest(family: str, norm: str = "group", size: int | None = None) -> Backbone:
    """Return the smallest backbone of a family, as a site begins to train it."""
    recipe = config(FAMILIES[family].examples[0], norm, size)
    torch.manual_seed(0)
    return build(recipe.backbone, recipe.data).train()


def images(family: str, size: int | None = None) -> Tensor:
    edge = size or max(32, FAMILIES[family].least)
    return torch.randn(2, 1, edge, edge, generator=torch.Generator().manual_seed(1))


@EVERY
def test_an_image_in_training_never_sees_another_and_nothing_is_drawn(family: str) -> None:
    backbone, batch = smallest(family), images(family)
    altered = batch.clone()
    altered[1] = -2 * altered[1]
    with torch.no_grad():
        found, other = backbone.features(batch), backbone.features(altered)
    assert found.shape == (2, backbone.dim) and found.isfinite().all()
    assert torch.equal(found[0], other[0])
    assert not torch.equal(found[1], other[1])
    assert not any(isinstance(layer, _BatchNorm) for layer in backbone.modules())


@EVERY
def test_every_parameter_has_a_part_in_the_features(family: str) -> None:
    backbone = smallest(family, size=max(32, FAMILIES[family].least))
    found = torch.autograd.grad(backbone.features(images(family)).sum(), list(backbone.parameters()), allow_unused=True)
    unused = [name for (name, _), gradient in zip(backbone.named_parameters(), found, strict=True) if gradient is None]
    assert unused == []


@EVERY
def test_stages_hold_every_parameter_once_in_the_order_in_which_images_meet_them(family: str) -> None:
    with torch.device("cpu" if family == "vit" else "meta"):  # a ViT's positions are computed by NumPy
        backbone = smallest(family)
        met: dict[str, int] = {}

        def note(name: str, *_: object) -> None:
            met.setdefault(name, len(met))

        for name, layer in backbone.named_modules():
            layer.register_forward_pre_hook(partial(note, name))
        backbone.features(torch.zeros(2, 1, *images(family).shape[2:]))
    stages = backbone.stages()
    assert sorted(name for stage in stages for name in stage) == sorted(name for name, _ in backbone.named_parameters())
    order = [{met[name.rpartition(".")[0]] for name in stage} for stage in stages]
    assert all(max(before) < min(after) for before, after in pairwise(order))


@pytest.mark.parametrize(
    "name", [example for family in FAMILIES.values() for example in family.examples[1:] if "vit_" not in example]
)
def test_every_size_class_gives_vectors(name: str) -> None:
    recipe = config(name, channels=3)
    with torch.device("meta"):  # no memory and no time for weights; `build` runs it for its shapes
        backbone = build(recipe.backbone, recipe.data)
    assert backbone.dim == backbone.net.num_features


@TIMM
def test_the_least_image_is_the_least(family: str) -> None:
    least, name = FAMILIES[family].least, FAMILIES[family].examples[0]
    with torch.device("meta"):
        recipe = config(name, size=least)
        build(recipe.backbone, recipe.data)
        if least > 16:  # what a config can say at all
            with pytest.raises(RuntimeError):
                timm.create_model(name, in_chans=1, num_classes=0)(torch.zeros(2, 1, least - 1, least - 1))


@TIMM
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_table_says_what_normalises(family: str, norm: str) -> None:
    with torch.device("meta"):
        kinds = {type(layer) for layer in smallest(family, norm).modules()}
    batched = any(issubclass(kind, _BatchNorm) for kind in kinds)
    assert batched == (norm == "batch" and "batch" in FAMILIES[family].norm)
    normalised = any("Norm" in kind.__name__ and kind.__name__ not in ("ConvNormAct",) for kind in kinds)
    assert normalised == (FAMILIES[family].norm != "none")


@TIMM
def test_the_table_says_whether_stock_timm_reloads(family: str) -> None:
    recipe = config(FAMILIES[family].examples[0])
    assert (stock_arguments(recipe.backbone, recipe.data) is not None) == FAMILIES[family].stock


def test_groups_other_than_timms_32_are_not_taken_for_its_own() -> None:
    recipe = config("densenet161")  # grows by 48 channels
    assert family_of("densenet161").stock and stock_arguments(recipe.backbone, recipe.data) is None


def test_a_group_norm_has_the_scale_eps_and_activation_of_what_it_replaces_and_32_groups_at_most() -> None:
    net = nn.Sequential(nn.BatchNorm1d(48, eps=1e-3), BatchNormAct2d(10, act_layer=nn.Sigmoid), nn.BatchNorm2d(64))
    nn.init.zeros_(net[2].weight)
    group_normalise(net)
    assert [layer.num_groups for layer in net] == [16, 2, 32]
    assert net[0].eps == 1e-3 and not net[2].weight.any()
    x = torch.randn(2, 10, 3, 3, dtype=torch.float64)
    mean = x.view(2, 2, -1).mean(-1).repeat_interleave(5, dim=1)[..., None, None]
    variance = x.view(2, 2, -1).var(-1, unbiased=False).repeat_interleave(5, dim=1)[..., None, None]
    assert isinstance(net[1], GroupNormAct)
    torch.testing.assert_close(net[1].double()(x), 1 / (1 + torch.exp(-(x - mean) / (variance + 1e-5).sqrt())))


def test_resnets_last_scale_of_a_branch_stays_zero() -> None:
    backbone = smallest("resnet")
    assert not backbone.net.layer1[0].bn2.weight.any() and backbone.net.layer1[0].bn1.weight.all()


def test_cbam_attends_over_channels_and_places() -> None:
    kinds = {type(layer).__name__ for layer in smallest("cbam_resnet").modules()}
    assert {"ChannelAttn", "SpatialAttn"} <= kinds


def test_vgg_is_its_convolutions_alone() -> None:
    with torch.device("meta"):
        recipe = config("vgg16", channels=3)
        count = sum(p.numel() for p in build(recipe.backbone, recipe.data).parameters())
    widths = [3, 64, 64, 128, 128, 256, 256, 256, *[512] * 6]
    assert count == sum(9 * a * b + b for a, b in pairwise(widths)) == 14_714_688


@pytest.mark.parametrize("size", [16, 48])
def test_swin_takes_crops_of_another_size_than_its_own(size: int) -> None:
    with torch.no_grad():
        assert smallest("swin").features(images("swin", size=size)).isfinite().all()


@pytest.mark.parametrize(
    ("backbone", "size", "words"),
    [
        ("inception_v3", 64, "[data] image_size = 64: 'inception_v3' needs at least 75"),
        ("vgg16", 16, "[data] image_size = 16: 'vgg16' needs at least 32"),
        ("swin_tiny_patch4_window7_224", 30, "timm refuses: "),
        ("beit_base_patch16_224", 32, "its family is none of vit, seresnet,"),
        ("efficientformer_l1", 32, "its family is none of vit, seresnet,"),
        ("mobilenetv4_hybrid_medium", 32, "its family is none of vit, seresnet,"),
        ("resnet19", 32, "is no architecture of timm; did you mean 'resnet"),
        ("cbam_vgg11", 32, "is no architecture of timm"),
    ],
)
def test_what_a_family_cannot_be_is_refused_with_the_reason(backbone: str, size: int, words: str) -> None:
    recipe = tiny(backbone={"name": backbone}, data={"image_size": size})
    with pytest.raises(ConfigError) as caught:
        build(recipe.backbone, recipe.data)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_page_on_backbones_has_the_table() -> None:
    page = (ROOT / "docs" / "backbones.md").read_text()
    for name, family in FAMILIES.items():
        reloads = "yes" if family.stock else "no"
        row = (
            f"| {name} | {', '.join(family.examples)} | {family.norm} | {family.masking} | {family.least} | {reloads} |"
        )
        assert row in page, row
    assert page.count("\n| ") == len(FAMILIES) + 1  # and a header
