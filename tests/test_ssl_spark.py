"""Masked autoencoding on maps: the loss by a float64 loop, holes that stay holes, and the promises of every method."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from torch import Tensor, nn

from wardround import ssl as methods
from wardround.errors import ConfigError
from wardround.plan import architecture
from wardround.report.reconstruction import draw_reconstructions
from wardround.ssl.draws import generator
from wardround.ssl.mae import random_order
from wardround.ssl.spark import SparK
from wardround.update import layout

SPARSE = [
    "resnet18",
    "seresnet18",
    "cbam_resnet18",
    "densenet121",
    "vgg11_bn",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "efficientnet_b0",
    "convnext_atto",
    "convnextv2_atto",
]
DENSE = ["swin_tiny_patch4_window7_224", "mobilevit_xxs", "efficientvit_b0", "fastvit_t8", "xcit_nano_12_p16_224"]


def built(name: str, size: int = 64, **changes: dict[str, object]) -> SparK:
    backbone = {"name": name, **changes.pop("backbone", {})}
    method = methods.build(tiny(backbone=backbone, data={"image_size": size}, **changes))
    assert isinstance(method, SparK)
    return method


def images(count: int = 4, size: int = 64) -> Tensor:
    return torch.rand(count, 1, size, size, generator=generator("images", count))


def order_of(method: SparK, count: int = 4) -> Tensor:
    return random_order(count, method.num_patches, generator("order", count))


def pixels_of(method: SparK, view: Tensor, place: int) -> list[float]:
    """Return a patch's pixels, row by row."""
    patch = method.patch
    row, column = divmod(place, view.shape[1] // patch)
    block = view[0, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
    return block.flatten().tolist()


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("name", ["resnet18", "mobilevit_xxs"])
def test_the_loss_is_the_mean_squared_error_over_the_hidden_patches(name: str, normalised: bool) -> None:
    method = built(name, method={"normalised_pixels": normalised}).double()
    views, order = images(2).double(), order_of(method, 2)
    with torch.no_grad():
        losses, predictions = method(views, order), method.predict(views, order)
    for view, row, prediction, loss in zip(views, order.tolist(), predictions, losses.tolist(), strict=True):
        errors = []
        for place in row[method.num_visible :]:
            target = pixels_of(method, view, place)
            mean, deviation = 0.0, 1.0
            if normalised:
                mean = sum(target) / len(target)
                deviation = math.sqrt(sum((t - mean) ** 2 for t in target) / (len(target) - 1) + 1e-6)
            errors += [
                (p - (t - mean) / deviation) ** 2 for t, p in zip(target, prediction[place].tolist(), strict=True)
            ]
        assert loss == pytest.approx(sum(errors) / len(errors), rel=1e-5)  # errors are float32 on purpose


@pytest.mark.parametrize("name", SPARSE + DENSE)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    method = built(name, method={"mask_ratio": 0.5})  # CBAM's norm of one channel needs two visible positions
    for layer in method.modules():  # a scale of zero in front of a shortcut holds gradients back for the first step
        if isinstance(layer, nn.GroupNorm):
            nn.init.ones_(layer.weight)
    method(images(), order_of(method)).mean().backward()
    for parameter, tensor in method.named_parameters():
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0, parameter


@pytest.mark.parametrize("name", ["resnet18", "seresnet18", "convnext_atto", "mobilevit_xxs"])
def test_hidden_pixels_never_reach_the_prediction(name: str) -> None:
    method, views = built(name), images()
    order = order_of(method)
    altered = views + 100 * (1 - method.visible(views, order).of(views))
    assert not torch.equal(altered, views)
    with torch.no_grad():
        assert torch.equal(method.predict(views, order), method.predict(altered, order))


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilevit_xxs", "swin_tiny_patch4_window7_224"])
def test_an_images_loss_depends_on_no_other_image(name: str) -> None:
    method, views = built(name), images()
    order = order_of(method)
    altered = views.clone()
    altered[2] = 1 - altered[2].flip(-1)
    with torch.no_grad():
        same = method(views, order) == method(altered, order)
    assert same.tolist() == [True, True, False, True]
    assert method.coupling is None


def test_the_loss_falls_over_thirty_steps_on_a_fixed_batch() -> None:
    method = built("resnet18").train()
    optimiser = torch.optim.AdamW(method.parameters(), lr=1e-3)
    smooth = nn.functional.interpolate(images(4, 8), size=64, mode="bilinear")  # noise could only be learnt by heart
    order, losses = order_of(method), []
    for _ in range(30):
        optimiser.zero_grad()
        loss = method(smooth, order).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 0.9 and sum(losses[-5:]) / 5 < 0.6 * losses[0], losses


def test_a_state_carries_everything_to_another_site() -> None:
    method, other = built("seresnet18"), built("seresnet18", seed=4)
    views, order = images(), order_of(method)
    with torch.no_grad():
        assert not torch.equal(method(views, order), other(views, order))
        methods.set_state(other, methods.get_state(method))
        assert torch.equal(method(views, order), other(views, order))


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_the_architecture_is_known_without_weights(name: str) -> None:
    recipe = tiny(backbone={"name": name}, data={"image_size": 64})
    assert architecture(recipe) == layout(methods.get_state(methods.build(recipe)))


def test_masks_are_drawn_on_the_grid_of_the_view_that_is_trained_on() -> None:
    method = built("resnet18", 128, training={"resolutions": [[1, 64], [2, 128]]})
    for size, patches in ((64, 4), (128, 16)):
        method.view_size = size
        views, order = method.prepare(images(3, 128), generator(1))
        assert views.shape == (3, 1, size, size)
        assert [sorted(row) for row in order.tolist()] == [list(range(patches))] * 3
        assert method.num_visible == patches // 4
        assert method.visible(views, order).visible.flatten(1).sum(1).tolist() == [patches // 4] * 3
        with torch.no_grad():
            assert torch.isfinite(method(views, order)).all()


def test_early_resolutions_must_keep_to_the_grid() -> None:
    with pytest.raises(ConfigError, match="80 pixels make no grid of at least two of the 32-pixel patches"):
        built("resnet18", 128, training={"resolutions": [[1, 80], [2, 128]]})


def test_batch_normalisation_couples_images_and_keeps_statistics_of_the_visible() -> None:
    method = built("resnet18", backbone={"norm": "batch"}).train()
    before = method.backbone.net.bn1.running_mean.clone()
    assert method.coupling is not None and torch.isfinite(method(images(), order_of(method))).all()
    assert not torch.equal(before, method.backbone.net.bn1.running_mean)


def test_bfloat16_gives_nearly_the_loss_of_float32() -> None:
    method, views = built("resnet18"), images()
    order = order_of(method)
    with torch.no_grad():
        exact = method(views, order)
        with torch.autocast("cpu", torch.bfloat16):
            loss = method(views, order)
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx(exact.tolist(), rel=0.02)


@pytest.mark.parametrize("name", ["resnet18", "mobilevit_xxs"])
def test_a_round_has_its_picture(name: str, tmp_path: Path) -> None:
    recipe = tiny(backbone={"name": name}, data={"image_size": 64})
    shown = (images(3) * 255).to(torch.uint8).numpy()
    state = methods.get_state(methods.build(recipe))
    assert draw_reconstructions(recipe, state, shown, tmp_path / "round.png", "round 1")
    picture = (tmp_path / "round.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    state = {key: np.zeros_like(array) for key, array in state.items()}
    draw_reconstructions(recipe, state, shown, tmp_path / "zero.png", "round 1")
    assert (tmp_path / "zero.png").read_bytes() != picture  # it shows what this state makes of them
