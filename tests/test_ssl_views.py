"""Views: geometry against hand-turned pictures, intensities against torchvision and written-out float64 loops."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample
from torchvision.transforms.v2 import functional as tv

from wardround.config import FederationConfig
from wardround.config.views import PRESETS, ViewsConfig
from wardround.report.views import draw_views
from wardround.ssl import views as module
from wardround.ssl.draws import generator
from wardround.ssl.intensities import blurred, colours, draw, mixing, recoloured, vary
from wardround.ssl.views import flat_maps, rotation, sampling_grid, solid_maps, view, warp

EVERYTHING = {
    "rotation": 30.0,
    "vertical_flip": True,
    "window_jitter": 0.3,
    "brightness": 0.8,
    "contrast": 0.8,
    "gamma": 1.0,
    "blur": 0.1,
    "noise": 0.2,
}
COLOUR = {"channels": 3, "mean": [0.2, 0.5, 0.7], "std": [0.25, 0.2, 0.3]}
OFF = {"brightness": 0.0, "contrast": 0.0}


def recipe(channels: int = 1, **views: Any) -> FederationConfig:
    data = COLOUR if channels == 3 else {}
    return tiny(method={"name": "simclr"}, views=views, data=data)


def pictures(*shape: int) -> Tensor:
    return torch.rand(shape, generator=generator("pictures"))


def unnormalised(views: Tensor, config: FederationConfig) -> Tensor:
    shape = (1, -1, *[1] * (views.ndim - 2))
    return views * torch.tensor(config.data.std).view(shape) + torch.tensor(config.data.mean).view(shape)


def drawn(**places: float) -> Tensor:
    """Return one image's draws, in the middle (where nothing changes) but for those named."""
    names = ["width", "centre", "brightness", "contrast", "saturation", "hue", "gamma", "blur", "sigma", "noise"]
    return torch.tensor([[places.get(name, 0.5) for name in names]])


# Geometry


@pytest.mark.parametrize("size", [16, 8, 12])
def test_a_view_has_the_size_that_was_asked_for_of_pictures_and_of_volumes(size: int) -> None:
    assert view(pictures(3, 1, 16, 16), recipe(), generator("a"), size).shape == (3, 1, size, size)
    assert view(pictures(3, 3, 16, 16), recipe(3), generator("a"), size).shape == (3, 3, size, size)
    assert view(pictures(3, 1, 16, 16, 16), recipe(), generator("a"), size).shape == (3, 1, size, size, size)


@pytest.mark.parametrize("size", [16, 48, 63, 224])
def test_the_sampling_grid_is_torchs_to_the_bit_without_rotation_and_to_rounding_with_it(size: int) -> None:
    upright = flat_maps(8, ViewsConfig(vertical_flip=True), generator("a"), (0.3, 1.0))
    assert torch.equal(sampling_grid(upright, size), affine_grid(upright, [8, 1, size, size], align_corners=False))
    turned = flat_maps(8, ViewsConfig(rotation=90.0), generator("a"), (0.3, 1.0))
    expected = affine_grid(turned, [8, 1, size, size], align_corners=False)
    assert torch.allclose(sampling_grid(turned, size), expected, atol=1e-6)
    solid = solid_maps(2, ViewsConfig(rotation=90.0), generator("a"), (0.3, 1.0))
    expected = affine_grid(solid, [2, 1, 16, 16, 16], align_corners=False)
    assert torch.allclose(sampling_grid(solid, 16), expected, atol=1e-6)


def test_a_warp_is_torchs_own_sampling_mirrored_or_not() -> None:
    images = pictures(16, 3, 24, 24)
    maps = flat_maps(16, ViewsConfig(vertical_flip=True), generator("a"), (0.3, 1.0))
    grid = affine_grid(maps, list(images.shape), align_corners=False)
    assert torch.equal(warp(images, maps, 24), grid_sample(images, grid, padding_mode="border", align_corners=False))


@pytest.mark.parametrize(
    ("turns", "axes"),
    [(rotation(torch.tensor([math.pi / 2]), axis), axes) for axis, axes in enumerate([(2, 3), (4, 2), (3, 4)])],
)
def test_a_quarter_turn_of_a_volume_about_each_axis_is_a_turn_by_hand(turns: Tensor, axes: tuple[int, int]) -> None:
    volume = pictures(1, 1, 6, 6, 6)
    turned = warp(volume, torch.cat([turns, torch.zeros(1, 3, 1)], dim=2), 6)
    assert torch.allclose(turned, torch.rot90(volume, 1, axes), atol=1e-5)
    assert not torch.allclose(turned, volume, atol=0.1)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flip_of_a_volume_is_a_flip_by_hand_columns_first(axis: int) -> None:
    volume = pictures(1, 1, 6, 6, 6)
    maps = torch.eye(3, 4).unsqueeze(0)
    maps[0, axis, axis] = -1.0
    assert torch.allclose(warp(volume, maps, 6), volume.flip(4 - axis), atol=1e-6)


def test_a_quarter_turn_of_a_picture_is_a_turn_by_hand() -> None:
    picture = pictures(1, 1, 7, 7)
    maps = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]])
    assert torch.allclose(warp(picture, maps, 7), torch.rot90(picture, 1, (2, 3)), atol=1e-5)


def test_half_of_the_edge_at_half_the_size_is_the_middle_of_the_image() -> None:
    picture, volume = pictures(1, 2, 16, 16), pictures(1, 2, 16, 16, 16)
    assert torch.allclose(warp(picture, 0.5 * torch.eye(2, 3)[None], 8), picture[..., 4:12, 4:12], atol=1e-6)
    assert torch.allclose(warp(volume, 0.5 * torch.eye(3, 4)[None], 8), volume[..., 4:12, 4:12, 4:12], atol=1e-6)


def test_crops_of_pictures_keep_the_drawn_share_of_area_and_torchvisions_aspect_ratios() -> None:
    maps = flat_maps(4000, ViewsConfig(), generator("a"), (0.2, 0.6)).double()
    area = maps[:, 0, 0].abs() * maps[:, 1, 1]
    assert 0.2 <= area.min() < 0.21
    assert 0.59 < area.max() <= 0.6001
    assert area.mean().item() == pytest.approx(0.4, abs=0.01)
    assert area.var().item() == pytest.approx(0.4**2 / 12, rel=0.05)  # of a uniform distribution
    aspect = (maps[:, 0, 0].abs() / maps[:, 1, 1]).log() / math.log(4 / 3)
    assert aspect.abs().max() <= 1.0001
    assert aspect.mean().item() == pytest.approx(0.0, abs=0.04)
    assert (maps[:, :, 2].abs() + maps[:, :, :2].norm(dim=2) <= 1.0001).all()  # no crop leaves the image


def test_crops_of_volumes_keep_the_drawn_share_of_volume_and_near_equal_edges() -> None:
    maps = solid_maps(4000, ViewsConfig(rotation=20.0), generator("a"), (0.2, 0.6)).double()
    share = torch.linalg.det(maps[:, :, :3]).abs()
    assert 0.199 <= share.min() < 0.21
    assert 0.59 < share.max() <= 0.601
    assert share.mean().item() == pytest.approx(0.4, abs=0.01)
    edges = maps[:, :, :3].norm(dim=2)
    assert (edges.amax(1) / edges.amin(1)).max() <= 4 / 3 + 1e-3
    assert (edges + maps[:, :, 3].abs()).max() <= 1.0001


def test_half_of_the_views_are_mirrored_and_only_along_the_axes_that_are_allowed() -> None:
    for views, expected in (
        (ViewsConfig(horizontal_flip=False), [0.0, 0.0, 0.0]),
        (ViewsConfig(), [0.5, 0.0, 0.0]),
        (ViewsConfig(horizontal_flip=False, vertical_flip=True), [0.0, 0.5, 0.5]),
    ):
        flat = flat_maps(2000, views, generator("a"), (0.5, 1.0))[:, :, :2].diagonal(dim1=1, dim2=2)
        solid = solid_maps(2000, views, generator("a"), (0.5, 1.0))[:, :, :3].diagonal(dim1=1, dim2=2)
        assert (flat < 0).float().mean(0).tolist() == pytest.approx(expected[:2], abs=0.04)
        assert (solid < 0).float().mean(0).tolist() == pytest.approx(expected, abs=0.04)


def test_rotations_stay_within_the_largest_angle_and_reach_it() -> None:
    maps = flat_maps(2000, ViewsConfig(rotation=30.0, horizontal_flip=False), generator("a"), (1.0, 1.0))
    angles = torch.atan2(
        maps[:, 1, 0] / maps[:, 1, :2].norm(dim=1), maps[:, 0, 0] / maps[:, 0, :2].norm(dim=1)
    ).rad2deg()
    assert 29.0 < angles.abs().max() <= 30.001
    assert angles.mean().item() == pytest.approx(0.0, abs=1.5)


def test_a_view_that_skips_pixels_averages_them() -> None:
    stripes = ((torch.arange(64) + 1) // 2).remainder(2).float().expand(1, 1, 64, 64)
    whole = torch.eye(2, 3)[None]
    assert grid_sample(stripes, sampling_grid(whole, 8), align_corners=False).max() == 0.0  # meets no white stripe
    assert torch.allclose(warp(stripes, whole, 8), torch.full((1, 1, 8, 8), 0.5), atol=1e-6)


def test_a_small_crop_is_taken_from_the_full_image() -> None:
    image = pictures(1, 1, 64, 64)
    both = torch.stack([0.125 * torch.eye(2, 3), torch.eye(2, 3)])
    small, whole = warp(image.expand(2, -1, -1, -1), both, 8)
    assert torch.allclose(small, image[0, :, 28:36, 28:36], atol=1e-6)
    assert torch.allclose(whole, avg_pool2d(image, 8)[0], atol=0.1)
    assert not torch.allclose(whole, image[0, :, 4::8, 4::8], atol=0.3)


# Intensities


@pytest.mark.parametrize(
    ("key", "channels", "adjusted"),
    [
        ("brightness", 1, tv.adjust_brightness),
        ("brightness", 3, tv.adjust_brightness),
        ("contrast", 1, tv.adjust_contrast),
        ("contrast", 3, tv.adjust_contrast),
        ("saturation", 3, tv.adjust_saturation),
        ("gamma", 1, tv.adjust_gamma),
        ("gamma", 3, tv.adjust_gamma),
    ],
)
@pytest.mark.parametrize("place", [0.0, 0.25, 1.0])
def test_each_change_by_itself_is_torchvisions(key: str, channels: int, adjusted: Any, place: float) -> None:
    images = pictures(1, channels, 12, 12)
    factor = 1.6 ** (2 * place - 1) if key == "gamma" else 1 + 0.6 * (2 * place - 1)
    got = vary(images.clone(), ViewsConfig(**(OFF | {key: 0.6})), drawn(**{key: place}), None)
    # torchvision's weights of red, green and blue sum to 0.9999.
    assert torch.allclose(got, adjusted(images, factor), atol=3e-4)
    assert not torch.allclose(got, images, atol=0.01)


def test_nothing_changes_where_every_strength_is_nought() -> None:
    images = pictures(4, 3, 8, 8)
    numbers, noise = draw(images.shape, ViewsConfig(**OFF), generator("a"))
    assert noise is None
    assert torch.allclose(vary(images.clone(), ViewsConfig(**OFF), numbers, None), images, atol=1e-6)


def test_affine_changes_together_are_the_written_out_formulas_clamped_once() -> None:
    views = ViewsConfig(window_jitter=0.3, brightness=0.5, contrast=0.5, saturation=0.8, hue=0.2)
    images, numbers = pictures(5, 3, 6, 6), torch.rand(5, 10, generator=generator("b"))
    got = vary(images.clone(), views, numbers, None)
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    for image, row, out in zip(images.double().numpy(), numbers.double().numpy(), got.numpy(), strict=True):
        width, centre = 1 + 0.3 * (2 * row[0] - 1), 0.5 + 0.15 * (2 * row[1] - 1)
        bright, contrast, saturation = (1 + s * (2 * u - 1) for s, u in zip((0.5, 0.5, 0.8), row[2:5], strict=True))
        x = bright * (image - (centre - width / 2)) / width
        grey = np.mean([to_yiq[0] @ x[:, i, j] for i in range(6) for j in range(6)])
        x = contrast * x + (1 - contrast) * grey
        turn = 2 * math.pi * 0.2 * (2 * row[5] - 1)
        for i in range(6):
            for j in range(6):
                luminance, a, b = to_yiq @ x[:, i, j]
                a, b = a * math.cos(turn) - b * math.sin(turn), a * math.sin(turn) + b * math.cos(turn)
                pixel = np.linalg.solve(to_yiq, [luminance, saturation * a, saturation * b])
                assert out[:, i, j] == pytest.approx(pixel.clip(0, 1), abs=1e-4)


def test_a_window_of_half_the_width_about_the_middle_doubles_the_distance_from_grey() -> None:
    image = torch.tensor([0.1, 0.3, 0.5, 0.6, 0.9]).view(1, 1, 1, 5)
    views = ViewsConfig(**OFF, window_jitter=0.5)
    got = vary(image.clone(), views, drawn(width=0.0), None).flatten().tolist()
    assert got == pytest.approx([0.0, 0.1, 0.5, 0.7, 1.0])
    shifted = vary(image.clone(), views, drawn(centre=1.0), None).flatten().tolist()
    assert shifted == pytest.approx([0.0, 0.05, 0.25, 0.35, 0.65])


def test_hue_keeps_luminance_and_grey_and_a_full_circle_is_nothing() -> None:
    turn = mixing(torch.ones(1), torch.tensor([0.3]))[0]
    weights = torch.tensor([0.299, 0.587, 0.114])
    assert torch.allclose(weights @ turn, weights, atol=1e-5)
    assert torch.allclose(turn @ torch.ones(3), torch.ones(3), atol=1e-5)
    assert torch.allclose(mixing(torch.ones(1), torch.ones(1))[0], torch.eye(3), atol=1e-5)
    red = turn @ torch.tensor([1.0, 0.0, 0.0])
    assert red.argmax() != 0


@pytest.mark.parametrize("channels", [1, 3])
def test_a_blur_is_torchvisions_with_a_kernel_of_three_deviations(channels: int) -> None:
    images, sigma = pictures(3, channels, 20, 20), torch.tensor([0.5, 2.0, 1.0])
    got = blurred(images.clone(), sigma)
    for image, deviation, out in zip(images, sigma.tolist(), got, strict=True):
        taps = 2 * math.ceil(3 * deviation) + 1
        assert torch.allclose(out, tv.gaussian_blur(image, [taps, taps], [deviation, deviation]), atol=1e-5)


def test_a_volume_is_blurred_along_all_three_axes() -> None:
    point = torch.zeros(1, 1, 9, 9, 9)
    point[0, 0, 4, 4, 4] = 1.0
    got = blurred(point, torch.tensor([1.0]))[0, 0]
    taps = [math.exp(-0.5 * t * t) for t in range(-3, 4)]
    line = torch.tensor([0.0, *(t / sum(taps) for t in taps), 0.0])
    assert torch.allclose(got, line[:, None, None] * line[:, None] * line, atol=1e-6)


def test_half_of_the_views_are_blurred_and_a_deviation_of_nought_is_no_blur() -> None:
    images = pictures(200, 1, 48, 48)
    numbers, _ = draw(images.shape, ViewsConfig(**OFF, blur=0.1), generator("a"))
    got = vary(images.clone(), ViewsConfig(**OFF, blur=0.1), numbers, None)
    sharp = (got - images).abs().amax((1, 2, 3)) < 1e-6
    assert sharp.float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert sharp.tolist() == (numbers[:, 7] >= 0.5).tolist()


def test_noise_has_the_drawn_deviation() -> None:
    grey, views = torch.full((2, 1, 64, 64), 0.5), ViewsConfig(**OFF, noise=0.1)
    _, noise = draw(grey.shape, views, generator("a"))
    got = vary(grey.clone(), views, torch.cat([drawn(noise=1.0), drawn(noise=0.25)]), noise)
    assert got.std((1, 2, 3)).tolist() == pytest.approx([0.1, 0.025], rel=0.05)
    assert got.mean((1, 2, 3)).tolist() == pytest.approx([0.5, 0.5], abs=0.005)


def test_strengths_are_drawn_image_by_image_over_their_whole_range() -> None:
    flat = torch.full((2000, 1, 2, 2), 0.4)
    views = ViewsConfig(brightness=0.5, contrast=0.0)
    numbers, _ = draw(flat.shape, views, generator("a"))
    factors = vary(flat, views, numbers, None)[:, 0, 0, 0] / 0.4
    assert 0.5 <= factors.min() < 0.51
    assert 1.49 < factors.max() <= 1.5001
    assert factors.mean().item() == pytest.approx(1.0, abs=0.02)


def test_recolouring_of_colour_without_mixing_is_that_of_each_channel() -> None:
    images = pictures(2, 3, 4, 4)
    gain, bias = torch.tensor([0.5, 2.0]), torch.tensor([0.1, -0.2])
    plain = recoloured(images.clone(), gain, bias, None)
    assert torch.allclose(plain, recoloured(images.clone(), gain, bias, torch.eye(3).repeat(2, 1, 1)), atol=1e-6)
    assert colours(ViewsConfig(), torch.full((6, 2), 0.5), images)[2] is None


# The door


@pytest.mark.parametrize(("channels", "shape"), [(1, (16, 16)), (3, (16, 16)), (1, (8, 8, 8))])
@pytest.mark.parametrize("chunk", [300, 2**21])
def test_a_view_depends_on_no_other_image_of_its_batch(
    channels: int, shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    config = recipe(channels, **EVERYTHING, **({"hue": 0.2, "saturation": 0.5} if channels == 3 else {}))
    images = pictures(6, channels, *shape)
    altered = images.clone()
    altered[2] = 1.0 - altered[2] ** 3
    before, after = (view(batch, config, generator("a"), 8) for batch in (images, altered))
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [True, True, False, True, True, True]


def test_pieces_of_a_batch_are_only_a_matter_of_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    config, images = recipe(**EVERYTHING), pictures(7, 1, 16, 16)
    whole = view(images, config, generator("a"), 16)
    monkeypatch.setattr(module, "CHUNK", 2 * 16 * 16)
    assert torch.allclose(view(images, config, generator("a"), 16), whole, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16), (8, 8, 8)])
def test_the_same_draws_give_the_same_views_and_their_number_depends_on_no_pixel(shape: tuple[int, ...]) -> None:
    config, images = recipe(**EVERYTHING), pictures(4, 1, *shape)
    first, second = generator("a"), generator("a")
    views = view(images, config, first, 8)
    assert torch.equal(views, view(images, config, second, 8))
    view(torch.zeros_like(images), config, first, 8)
    view(images, config, second, 8)
    assert torch.equal(first.get_state(), second.get_state())
    assert not torch.equal(views, view(images, config, first, 8))


@pytest.mark.parametrize("modality", PRESETS)
@pytest.mark.parametrize("shape", [(16, 16), (8, 8, 8)])
def test_no_view_leaves_the_range_of_an_image(modality: str, shape: tuple[int, ...]) -> None:
    colour = modality == "dermoscopy"
    strongest = {"window_jitter": 0.5, "brightness": 1.0, "contrast": 1.0, "gamma": 4.0, "blur": 0.1, "noise": 0.5}
    extremes = torch.stack([torch.zeros(shape), torch.ones(shape), pictures(*shape), pictures(*shape).round()])
    images = extremes.unsqueeze(1).repeat(8, 3 if colour else 1, *[1] * len(shape))
    for changes in ({}, strongest):
        config = recipe(3 if colour else 1, modality=modality, **changes)
        views = unnormalised(view(images, config, generator("a"), 8), config)
        assert views.isfinite().all()
        assert views.min() >= -1e-5
        assert views.max() <= 1 + 1e-5


def test_without_intensities_a_view_only_moves_pixels() -> None:
    config = recipe(3, **EVERYTHING)
    flat = torch.full((4, 3, 16, 16), 0.3)
    moved = view(flat, config, generator("a"), 16, intensities=False)
    expected = (0.3 - torch.tensor([0.2, 0.5, 0.7])) / torch.tensor([0.25, 0.2, 0.3])
    assert torch.allclose(moved, expected.view(1, 3, 1, 1).expand_as(moved), atol=1e-5)
    assert not torch.allclose(view(flat, config, generator("a"), 16), moved, atol=0.1)


def test_a_crop_scale_that_is_passed_stands_in_for_the_configs() -> None:
    config = recipe(crop_scale=[1.0, 1.0], horizontal_flip=False)
    ramp = torch.linspace(0, 1, 64).expand(8, 1, 64, 64)
    whole, small = (
        unnormalised(view(ramp, config, generator("a"), 64, intensities=False, crop_scale=scale), config)
        for scale in (None, (0.05, 0.1))
    )
    reach = [(views.amax((1, 2, 3)) - views.amin((1, 2, 3))) for views in (whole, small)]
    assert (reach[0] > 0.85).all()  # the longer edge is cut at the border
    assert (reach[1] < 0.4).all()


def test_volumes_and_pictures_are_drawn_as_a_sheet_of_an_image_and_four_views(tmp_path: Any) -> None:
    for name, shape in {"picture": (3, 1, 16, 16), "volume": (3, 1, 16, 16, 16)}.items():
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        draw_views(recipe(modality="mr"), images, tmp_path / "sheets" / f"{name}.png")
        with Image.open(tmp_path / "sheets" / f"{name}.png") as sheet:
            width, height = sheet.size
            assert height / width == pytest.approx((1.35 * 5 + 0.4) / (1.3 * 3), rel=0.02)
            assert np.asarray(sheet.convert("L")).std() > 10
