"""Networks on images with holes: nothing from a hole reaches a feature, and statistics know only what is seen."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from conftest import tiny
from timm.layers import CecaModule, EcaModule, EffectiveSEModule, SEModule
from timm.layers.cbam import ChannelAttn
from timm.layers.grn import GlobalResponseNorm
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.senet import SEModule as LegacySEModule
from torch import Tensor, nn

from wardround.backbones import build
from wardround.backbones.maps import as_map, sparse_maps
from wardround.backbones.sparse import POOLING, Mask, channels_last, fills_holes, masked_maps, masked_norm, masking
from wardround.errors import ConfigError
from wardround.ssl.draws import generator
from wardround.ssl.spark import Decoder

NETS = [
    "resnet18",
    "resnet50",
    "seresnet18",
    "cbam_resnet18",
    "densenet121",
    "vgg16",
    "vgg11_bn",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "efficientnet_b0",
    "xception41",
    "convnext_atto",
    "convnextv2_tiny",
]


def network(name: str, size: int = 64) -> Any:
    torch.manual_seed(0)
    config = tiny(backbone={"name": name}, data={"image_size": size})
    net = build(config.backbone, config.data).net
    for layer in net.modules():  # a scale of zero in front of a shortcut would hide what its branch does
        if isinstance(layer, nn.GroupNorm | GlobalResponseNorm):
            nn.init.ones_(layer.weight)
    return net


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator("noise", *shape))


def halves(grid: int = 2) -> Tensor:
    """Return masks of two images of which other halves are visible: [2, 1, grid, grid]."""
    chessboard = torch.arange(grid)[:, None] + torch.arange(grid) + torch.arange(2)[:, None, None]
    return (chessboard % 2 == 0).unsqueeze(1)


@contextmanager
def filth(net: nn.Module, mask: Mask) -> Iterator[None]:
    """Put large numbers into the holes of what layers give, and of what goes into norms and pooling modules."""

    def spoil(x: Tensor, last: bool) -> Tensor:
        size = tuple(x.shape[1:-1] if last else x.shape[2:])
        if not mask.fits(size):
            return x
        holes = 1 - mask.at(size, x.dtype)
        return x + 1000 * torch.randn_like(x) * (holes.movedim(1, -1) if last else holes)

    handles = []
    for module in net.modules():
        if isinstance(module, (nn.GroupNorm, *POOLING)):
            handles.append(module.register_forward_pre_hook(lambda m, args: spoil(args[0], last=False)))
        elif fills_holes(module):
            handles.append(module.register_forward_hook(lambda m, args, out: spoil(out, channels_last(m))))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", NETS)
def test_nothing_in_a_hole_reaches_a_visible_feature_at_any_stage(name: str) -> None:
    net, images, visible = network(name), noise(2, 1, 64, 64), halves()
    mask = Mask(visible)
    holes = 1 - mask.of(images)
    with torch.no_grad():
        maps = masked_maps(net, images, visible)
        altered = masked_maps(net, images + 1000 * holes, visible)
        with filth(net, mask):
            spoilt = masked_maps(net, images, visible)
    assert len(maps) == 4 and [64 // x.shape[2] for x in maps] == [4, 8, 16, 32]
    for x, other, third in zip(maps, altered, spoilt, strict=True):
        assert torch.equal(x, other) and torch.equal(x, third)
        assert (x * mask.of(x)).abs().sum() > 0 and not (x * (1 - mask.of(x))).any()


def test_without_masks_zeroed_holes_fill_up_layer_by_layer() -> None:
    """The paper's vanishing mask pattern: why zeros at the input are not enough."""
    net, images, mask = network("resnet18", 128), noise(2, 1, 128, 128), Mask(halves(4))
    found: list[Tensor] = []
    for stage in ("act1", "layer1", "layer2", "layer3", "layer4"):
        net.get_submodule(stage).register_forward_hook(lambda m, args, out: found.append(out))
    with torch.no_grad():
        net.forward_features(images * mask.of(images))
        plain = list(found)
        found.clear()
        masked_maps(net, images, mask.visible)
    assert all((x * (1 - mask.of(x))).any() for x in plain)
    assert not any((x * (1 - mask.of(x))).any() for x in found)


def visible_values(x: Tensor, mask: Tensor, image: int, channels: range) -> list[float]:
    return [
        x[image, channel][place].item()
        for channel in channels
        for place in zip(*mask[image, 0].nonzero(as_tuple=True), strict=True)
    ]


@pytest.mark.parametrize("size", [(4, 4), (4, 4, 4)])
def test_group_statistics_are_those_of_the_visible_positions(size: tuple[int, ...]) -> None:
    x = 3 + noise(2, 6, *size)
    mask = (noise(2, 1, *size) > 0).float()
    normed, _, _ = masked_norm(x, mask, 3, 1e-5)
    for image in range(2):
        for group in range(3):
            channels = range(2 * group, 2 * group + 2)
            values = visible_values(x.double(), mask, image, channels)
            mean = sum(values) / len(values)
            variance = sum((v - mean) ** 2 for v in values) / len(values)
            expected = [(v - mean) / math.sqrt(variance + 1e-5) for v in values]
            assert visible_values(normed, mask, image, channels) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert not (normed * (1 - mask)).any()


def test_a_networks_group_norm_is_over_visible_positions_with_its_scale_and_shift() -> None:
    norm, x, mask = nn.GroupNorm(2, 4).double(), noise(2, 4, 8, 8).double(), Mask(halves())
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    with masking(nn.Sequential(norm), mask):
        out = norm(x)
    seen = mask.of(x)[:, 0].bool()
    for image in range(2):  # the visible positions of an image as a map of their own
        expected = norm(x[image, :, seen[image]][None])[0]
        torch.testing.assert_close(out[image, :, seen[image]], expected)
        assert not out[image, :, ~seen[image]].any()


def test_batch_statistics_and_their_running_means_are_over_visible_positions() -> None:
    norm, plain = nn.BatchNorm2d(4).double(), nn.BatchNorm2d(4).double()
    x, mask = noise(2, 4, 8, 8).double(), Mask(halves())
    with masking(nn.Sequential(norm), mask):
        out = norm(x)
    seen = mask.of(x)[:, 0].bool()
    expected = plain(x.movedim(1, -1)[seen].T[None, :, :, None])[0, :, :, 0].T  # [visible positions, 4]
    torch.testing.assert_close(out.movedim(1, -1)[seen], expected)
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(norm.running_var, plain.running_var)
    with masking(nn.Sequential(norm.eval()), mask):
        torch.testing.assert_close(norm(x).movedim(1, -1)[seen], plain.eval()(x).movedim(1, -1)[seen])


@pytest.mark.parametrize(
    "module",
    [
        SEModule(16),
        LegacySEModule(16, 4),
        SqueezeExcite(16),
        EffectiveSEModule(16),
        EcaModule(16),
        CecaModule(16),
        ChannelAttn(16),
        GlobalResponseNorm(16, channels_last=False),
    ],
    ids=lambda module: f"{type(module).__module__}.{type(module).__name__}",
)
def test_what_pools_globally_pools_over_visible_positions(module: nn.Module) -> None:
    module, x, mask = module.double(), noise(2, 16, 8, 8).double() - 2, Mask(halves())  # no visible value near zero
    for parameter in module.parameters():
        nn.init.normal_(parameter)  # some start as the identity
    with torch.no_grad(), masking(nn.Sequential(module), mask):
        out = module(x * mask.of(x))
    seen = mask.of(x)[:, 0].bool()
    for image in range(2):
        with torch.no_grad():
            expected = module(x[image, :, seen[image]][None, :, :, None])[0, :, :, 0]
        torch.testing.assert_close(out[image, :, seen[image]], expected)
        assert not out[image, :, ~seen[image]].any()


def test_squeeze_and_excite_by_hand() -> None:
    module, x, mask = SEModule(16).double(), noise(1, 16, 4, 4).double(), Mask(halves()[:1])
    with torch.no_grad(), masking(nn.Sequential(module), mask):
        out = module(x)
    places = [(row, column) for row in range(4) for column in range(4) if (row // 2 + column // 2) % 2 == 0]
    means = [sum(x[0, c, r, k].item() for r, k in places) / len(places) for c in range(16)]
    w1, w2 = module.fc1.weight[:, :, 0, 0].tolist(), module.fc2.weight[:, :, 0, 0].tolist()
    inner = [
        max(0.0, sum(w * m for w, m in zip(row, means, strict=True)) + b)
        for row, b in zip(w1, module.fc1.bias.tolist(), strict=True)
    ]
    for channel, (row, bias) in enumerate(zip(w2, module.fc2.bias.tolist(), strict=True)):
        gate = 1 / (1 + math.exp(-sum(w * i for w, i in zip(row, inner, strict=True)) - bias))
        for r, k in places:
            assert out[0, channel, r, k].item() == pytest.approx(x[0, channel, r, k].item() * gate, rel=1e-12)


def test_a_mask_repeats_each_position_of_its_grid_along_every_axis() -> None:
    mask = Mask(torch.tensor([[[[True, False], [False, True]]]]))
    rows = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert mask.at((4, 4), torch.float32)[0, 0].tolist() == rows
    assert mask.fits((6, 6)) and not mask.fits((5, 5)) and not mask.fits((1, 1)) and not mask.fits((4, 6))
    volume = Mask(torch.tensor([True, False, False, True, False, True, True, False]).view(1, 1, 2, 2, 2))
    assert volume.at((4, 4, 4), torch.float32).sum() == 4 * 8
    assert volume.at((4, 4, 4), torch.float32)[0, 0, 3, 0].tolist() == [0, 0, 1, 1]


def test_a_call_leaves_the_network_as_it_was() -> None:
    net, images = network("resnet18"), noise(2, 1, 64, 64)
    before = net(images)
    masked_maps(net, images, halves())
    with pytest.raises(RuntimeError):
        masked_maps(net, noise(2, 3, 64, 64), halves())  # three channels, where the network takes one
    assert torch.equal(net(images), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in net.modules())


def test_activations_computed_again_without_the_mask_are_refused() -> None:
    net = network("resnet18")
    net.set_grad_checkpointing(True)
    with pytest.raises(ConfigError, match="checkpointing = true"):
        masked_maps(net, noise(2, 1, 64, 64), halves())


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("legacy_xception", 64, "'conv1' gives a map of 31 x 31"),
        ("inception_v3", 96, "gives a map of 47 x 47"),
        ("inception_v4", 96, "gives a map of 47 x 47"),
        ("inception_resnet_v2", 96, "gives a map of 47 x 47"),
        ("resnet18", 72, "gives a map of 5 x 5: it, the last map's 3 x 3 and the image's 72 pixels do not divide"),
        ("resnet18", 32, "is 1 x 1; masked autoencoding needs at least two positions an edge"),
        ("skresnet18", 64, "works on the whole map at once"),
        ("gcresnext26ts", 64, "works on the whole map at once"),
    ],
)
def test_networks_off_the_grid_are_refused_by_their_shapes(name: str, size: int, reason: str) -> None:
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0, in_chans=1)
    with pytest.raises(ConfigError, match=reason):
        sparse_maps(net, name, 1, size)


def test_a_layer_that_no_rule_masks_is_found_by_running_the_network() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
            self.num_features = 4

        def forward_features(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x).exp()  # zero becomes one, outside any layer
            return out

    with pytest.raises(ConfigError, match="hidden pixels would reach its map of 8 x 8"):
        sparse_maps(Shifted(), "shifted", 1, 16)


class Solid(nn.Module):
    """A network of volumes with two stages."""

    num_features = 8
    feature_info = ({"reduction": 4, "module": "fine"}, {"reduction": 8, "module": "coarse"})

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv3d(1, 4, 7, 4, 3), nn.GroupNorm(2, 4), nn.ReLU())
        self.coarse = nn.Sequential(nn.MaxPool3d(3, 2, 1), nn.Conv3d(4, 8, 3, 1, 1), nn.GroupNorm(2, 8), nn.ReLU())

    def forward_features(self, x: Tensor) -> Tensor:
        out: Tensor = self.coarse(self.fine(x))
        return out


def test_volumes_have_holes_too() -> None:
    net, volumes = Solid(), noise(2, 1, 16, 16, 16)
    maps = sparse_maps(net, "solid", 1, 16)
    assert (maps.widths, maps.strides, maps.axes) == ((4, 8), (4, 8), 3)
    mask = Mask(noise(2, 1, 2, 2, 2) > 0)
    with torch.no_grad(), filth(net, mask):
        spoilt = masked_maps(net, volumes + 1000 * (1 - mask.of(volumes)), mask.visible)
    with torch.no_grad():
        for x, other in zip(masked_maps(net, volumes, mask.visible), spoilt, strict=True):
            assert torch.equal(x, other) and x.any() and not (x * (1 - mask.of(x))).any()
    image = Decoder(maps, 16, 1, sparse=True)(masked_maps(net, volumes, mask.visible), None, mask)
    assert image.shape == volumes.shape


def test_all_of_timms_layouts_become_maps() -> None:
    x = noise(2, 5, 3, 3)
    tokens = torch.cat([noise(2, 2, 5), x.flatten(2).transpose(1, 2)], dim=1)  # two tokens of no place before
    for layout in (x, x.movedim(1, -1), tokens):
        assert torch.equal(as_map(layout, 5, 2), x)
    volume = noise(2, 5, 2, 2, 2)
    assert torch.equal(as_map(volume.flatten(2).transpose(1, 2), 5, 3), volume)
