"""MAE against loops in float64, and the promises that privacy engines and federations lean on."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny
from torch import Tensor

from wardround import ssl as methods
from wardround.backbones import sincos_positions
from wardround.errors import ConfigError
from wardround.ssl.draws import generator
from wardround.ssl.mae import MAE, patchify, random_order, take, unpatchify


def built(**changes: object) -> MAE:
    method = methods.build(tiny(**changes))
    assert isinstance(method, MAE)
    return method


def images(count: int = 5, channels: int = 1, size: int = 16) -> Tensor:
    return torch.rand(count, channels, size, size, generator=generator("images", count))


def reference_loss(method: MAE, view: Tensor, order: Tensor) -> float:
    """Return one image's loss as He et al. 2022 describe it: a loop over hidden patches, in float64."""
    patch, channels, size = method.backbone.patch, view.shape[0], view.shape[1]
    prediction = method.predict(view[None], order[None])[0]
    errors = []
    for place in order[method.num_visible :].tolist():
        row, column = divmod(place, size // patch)
        block = view[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        target = [block[c, y, x].item() for y in range(patch) for x in range(patch) for c in range(channels)]
        mean = sum(target) / len(target)
        variance = sum((t - mean) ** 2 for t in target) / (len(target) - 1)
        for value, predicted in zip(target, prediction[place].tolist(), strict=True):
            errors.append((predicted - (value - mean) / math.sqrt(variance + 1e-6)) ** 2)
    return sum(errors) / len(errors)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_is_the_papers_over_the_hidden_patches(channels: int) -> None:
    data = {"channels": channels, "mean": [0.5] * channels, "std": [0.2] * channels}
    method = built(data=data).double()
    views = images(channels=channels).double()
    order = random_order(5, 4, generator(1))
    with torch.no_grad():
        losses = method(views, order)
        expected = [reference_loss(method, view, row) for view, row in zip(views, order, strict=True)]
    # `errors` works in float32 on purpose, whatever the network's precision.
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_hidden_pixels_never_reach_the_prediction() -> None:
    method, views = built(), images()
    order = random_order(5, 4, generator(2))
    hidden = patchify(torch.ones_like(views), 8)
    hidden.scatter_(1, order[:, : method.num_visible, None].expand(-1, -1, 64), 0.0)
    altered = views + 100 * unpatchify(hidden, 8, 1)
    assert not torch.equal(altered, views)
    with torch.no_grad():
        assert torch.equal(method.predict(views, order), method.predict(altered, order))


def test_an_images_loss_depends_on_no_other_image() -> None:
    method, views = built(), images()
    order = random_order(5, 4, generator(3))
    altered = views.clone()
    altered[2] = 1 - altered[2]
    with torch.no_grad():
        same = method(views, order) == method(altered, order)
    assert same.tolist() == [True, True, False, True, True]


def test_every_parameter_gets_a_gradient_and_none_stands_outside_a_layer_with_a_rule() -> None:
    method = built()
    method(images(), random_order(5, 4, generator(4))).mean().backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    known = {"Linear", "Conv2d", "LayerNorm", "Token"}
    for layer in method.modules():
        if list(layer.parameters(recurse=False)):
            assert type(layer).__name__ in known
            assert type(layer) is not torch.nn.LayerNorm or type(layer).__module__ == "torch.nn.modules.normalization"


def test_masks_come_from_the_generator_alone() -> None:
    method = built()
    torch.manual_seed(0)
    first = method.prepare(images(), generator(5))
    torch.manual_seed(1)
    again = method.prepare(images(), generator(5))
    other = method.prepare(images(), generator(6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert sorted(first[1][0].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(("ratio", "visible"), [(0.75, 1), (0.5, 2), (0.99, 1), (0.01, 3)])
def test_at_least_one_patch_is_seen_and_one_hidden(ratio: float, visible: int) -> None:
    assert built(method={"mask_ratio": ratio}).num_visible == visible


def test_an_image_of_one_patch_is_refused_in_later_rounds_too() -> None:
    with pytest.raises(ConfigError, match="of views of 16 pixels that is one patch"):
        built(backbone={"patch_size": 16})
    with pytest.raises(ConfigError, match="of views of 8 pixels that is one patch"):
        built(training={"resolutions": [[1, 8], [2, 16]]})


def test_patches_are_rows_first_with_channels_last() -> None:
    image = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4)
    patches = patchify(image, 2)
    assert patches[0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]
    assert torch.equal(unpatchify(patches, 2, 2), image)


def test_positions_are_sines_and_cosines_of_column_and_row() -> None:
    table = sincos_positions(8, (2, 3))
    row, column = 1, 2
    expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
    assert table[row * 3 + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_decoder_puts_every_patch_back_in_its_place() -> None:
    order = random_order(3, 6, generator(7))
    patches = torch.arange(6.0).repeat(3, 1)[..., None]
    assert torch.equal(take(take(patches, order), order.argsort(dim=1)), patches)


def test_the_initial_state_is_a_function_of_the_seed() -> None:
    states = [methods.get_state(methods.build(tiny(seed=seed))) for seed in (1, 1, 2)]
    equal = [all(np.array_equal(states[0][name], other[name]) for name in states[0]) for other in states]
    assert equal == [True, True, False]
