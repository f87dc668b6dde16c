"""I-JEPA against loops in float64, its blocks, and that nothing of a target reaches its prediction."""

import math
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from torch import Tensor

from wardround import ssl as methods
from wardround.backbones import resampled
from wardround.config import FederationConfig
from wardround.config.method import IJEPAConfig
from wardround.errors import ConfigError
from wardround.ssl.blocks import block_shapes, draw_blocks
from wardround.ssl.draws import generator
from wardround.ssl.engine import Plain
from wardround.ssl.ijepa import IJEPA
from wardround.ssl.mae import patchify, unpatchify
from wardround.ssl.pretrain import pretrain
from wardround.update import state_hash

METHOD = {"name": "ijepa", "predictor_dim": 16, "predictor_depth": 1, "predictor_heads": 2}
SETTINGS = IJEPAConfig(name="ijepa")


def recipe(**changes: Any) -> FederationConfig:
    method = METHOD | changes.pop("method", {})
    return tiny(**({"backbone": {"patch_size": 4, "depth": 1}, "data": {"image_size": 32}} | changes), method=method)


def built(**changes: Any) -> IJEPA:
    made = methods.build(recipe(**changes))
    assert isinstance(made, IJEPA)
    return made


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 1, 32, 32, generator=generator("images", count))


def reference_loss(method: IJEPA, view: Tensor, context: Tensor, targets: Tensor) -> float:
    """Return one image's loss, target by target, patch by patch and channel by channel, in float64."""
    prediction = method.predict(view[None], context[None], targets[None])[0].tolist()
    teacher = method.teacher.parts["backbone"]
    features = teacher.encode(teacher.embed(view[None]))[0, 1:].tolist()  # type: ignore[operator]
    errors = []
    for block, places in enumerate(targets.tolist()):
        for number, place in enumerate(places):
            mean = sum(features[place]) / len(features[place])
            variance = sum((value - mean) ** 2 for value in features[place]) / len(features[place])
            for value, predicted in zip(features[place], prediction[block][number], strict=True):
                distance = abs(predicted - (value - mean) / math.sqrt(variance + 1e-5))
                errors.append(distance**2 / 2 if distance < 1 else distance - 0.5)
    return sum(errors) / len(errors)


def moved(method: IJEPA) -> IJEPA:
    """Return a method whose student has left its teacher."""
    with torch.no_grad():
        for parameter in method.backbone.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator("move")).to(parameter.dtype))
    return method


def test_the_loss_is_the_smooth_distance_to_the_teachers_normalised_features() -> None:
    method = moved(built()).double()
    views, context, targets = method.prepare(images(3), generator(1))
    views = 3 * views.double()
    with torch.no_grad():
        losses = method(views, context, targets).tolist()
        expected = [reference_loss(method, *row) for row in zip(views, context, targets, strict=True)]
    # `errors` works in float32 on purpose, whatever the network's precision.
    assert losses == pytest.approx(expected, rel=1e-5)


def test_pixels_outside_the_context_never_reach_the_prediction() -> None:
    method = moved(built())
    views, context, targets = method.prepare(images(), generator(2))
    hidden = patchify(torch.ones_like(views), 4)
    hidden.scatter_(1, context[..., None].expand(-1, -1, 16), 0.0)
    assert all(hidden[row][places.flatten()].all() for row, places in enumerate(targets))
    altered = views + 100 * unpatchify(hidden, 4, 1)
    with torch.no_grad():
        assert torch.equal(method.predict(views, context, targets), method.predict(altered, context, targets))
        before, after = method.target_features(views, targets), method.target_features(altered, targets)
    assert not torch.allclose(before, after, atol=0.1)


def test_the_teacher_sees_the_whole_image_and_no_gradient_reaches_it() -> None:
    method = built()
    views, _, targets = method.prepare(images(), generator(3))
    altered = views.clone()
    places = targets[0].flatten().tolist()
    outside = next(place for place in range(64) if place not in places)
    row, column = divmod(outside, 8)
    altered[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 5.0
    before, after = method.target_features(views, targets), method.target_features(altered, targets)
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1:], after[1:])
    assert not before.requires_grad and not any(p.requires_grad for p in method.teacher.parameters())


def test_each_target_is_predicted_by_itself() -> None:
    method = moved(built())
    views, context, targets = method.prepare(images(), generator(4))
    with torch.no_grad():
        whole = method.predict(views, context, targets)
        for block in range(4):
            alone = method.predict(views, context, targets[:, block : block + 1])
            assert torch.allclose(whole[:, block], alone[:, 0], atol=1e-6)
    assert not torch.allclose(whole[:, 0], whole[:, 1], atol=1e-3)


def test_an_images_loss_depends_on_no_other_image() -> None:
    method = moved(built())
    views, context, targets = method.prepare(images(), generator(5))
    altered = views.clone()
    altered[2] = 1 - altered[2]
    with torch.no_grad():
        same = method(views, context, targets) == method(altered, context, targets)
    assert same.tolist() == [True, True, False, True, True] and method.coupling is None


def covered(places: Tensor, grid: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the box that places fill; fails where they are no box."""
    corners = np.stack(np.unravel_index(places.numpy(), grid))
    low, high = corners.min(axis=1), corners.max(axis=1)
    box = set(product(*(range(a, b + 1) for a, b in zip(low, high, strict=True))))
    assert {tuple(corner) for corner in corners.T.tolist()} == box and corners.shape[1] == len(box)
    return tuple((high - low + 1).tolist())


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (6, 6, 6)])
def test_targets_are_boxes_of_the_declared_share_and_aspect_and_the_context_holds_none_of_them(
    grid: tuple[int, ...],
) -> None:
    patches = math.prod(grid)
    for draw in range(20):
        context, targets = draw_blocks(6, 6, grid, SETTINGS, generator("blocks", draw))
        assert targets.shape[:2] == (6, 4) and context.shape[0] == 6 and context.shape[1] >= 1
        shapes = {covered(block, grid) for image in targets for block in image}
        assert len(shapes) == 1  # drawn once a batch
        shape = shapes.pop()
        assert 0.15 <= math.prod(shape) / patches <= 0.2
        assert all(0.75 <= a / b <= 1.5 for a, b in pairwise(shape))
        for seen, hidden in zip(context.tolist(), targets.flatten(1).tolist(), strict=True):
            assert len(set(seen)) == len(seen) and not set(seen) & set(hidden)


def test_a_block_may_be_anywhere_on_the_grid() -> None:
    context, targets = draw_blocks(400, 4, (14, 14), SETTINGS, generator("anywhere"))
    height, width = covered(targets[0, 0], (14, 14))
    corners = {divmod(place, 14) for place in targets.flatten(0, 1).min(dim=1).values.tolist()}
    assert corners == set(product(range(15 - height), range(15 - width)))
    assert set(context.flatten().tolist()) == set(range(196))


def test_a_context_block_smaller_than_the_grid_lies_within_a_square() -> None:
    settings = IJEPAConfig(name="ijepa", context_scale=(0.3, 0.4), targets=1)  # 5 x 5 of 64 patches
    for draw in range(10):
        context, _ = draw_blocks(8, 8, (8, 8), settings, generator("context", draw))
        for places in context:
            rows, columns = np.unravel_index(places.numpy(), (8, 8))
            assert max(np.ptp(rows), np.ptp(columns)) <= 4


def test_the_size_of_a_context_does_not_depend_on_how_many_images_there_are() -> None:
    for draw in range(10):
        sizes = {
            draw_blocks(count, 16, (8, 8), SETTINGS, generator("size", draw))[0].shape[1] for count in (0, 1, 7, 90)
        }
        assert len(sizes) == 1


def test_shapes_are_those_within_the_ranges() -> None:
    targets, contexts = block_shapes((8, 8), SETTINGS)  # 9.6 to 12.8 patches, and 54.4 to 64
    assert targets == [(3, 4), (4, 3)] and contexts == [(8, 8)]
    targets, contexts = block_shapes((14, 14), SETTINGS)
    assert targets == [(5, 6), (6, 5), (6, 6), (7, 5)] and contexts == [(13, 13), (14, 14)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": {"name": "resnet18"}}, r"'resnet18': predicting features of hidden blocks needs an encoder"),
        ({"backbone": {"patch_size": 16}}, r"target_scale = \[0.15, 0.2\]: no block .* on a 2 x 2 grid"),
        ({"method": {"targets": 6}}, r"targets = 6: on a 8 x 8 grid they may hide 72 patches of a context of 64"),
        ({"method": {"context_scale": [0.9, 0.95]}}, r"context_scale = \[0.9, 0.95\]: no block of whole patches"),
        ({"method": {"target_aspect": [1.5, 0.5]}}, r"target_aspect = \[1.5, 0.5\]: expected 0 < smallest"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(**changes)


def test_every_trainable_parameter_gets_a_gradient_and_stands_in_a_layer_with_a_rule() -> None:
    method = built()
    method(*method.prepare(images(), generator(6))).mean().backward()
    for name, parameter in method.named_parameters():
        if name.startswith("teacher."):
            assert not parameter.requires_grad and parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    layers = {type(layer).__name__ for layer in method.modules() if list(layer.parameters(recurse=False))}
    assert layers <= {"Linear", "Conv2d", "LayerNorm", "Token"}


def test_the_loss_falls_on_a_fixed_batch_while_the_teacher_follows() -> None:
    method = built(training={"rounds": 10, "local_steps": 3})
    batch = method.prepare(images(), generator(7))
    optimiser = torch.optim.AdamW(method.parameters(), lr=2e-3)
    losses = []
    for step in range(30):
        optimiser.zero_grad()
        loss = method(*batch).mean()
        loss.backward()
        optimiser.step()
        method.after_step(step)
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]), losses


def test_the_teachers_momentum_rises_linearly_to_one() -> None:
    method = built(method={"momentum": 0.9}, training={"rounds": 2, "local_steps": 5})
    name, _ = next(method.backbone.named_parameters())
    student, teacher = (
        dict(part.named_parameters())[name] for part in (method.backbone, method.teacher.parts["backbone"])
    )
    expected = teacher.detach().double().clone()
    for step, momentum in ((0, 0.90), (1, 0.91), (5, 0.95), (9, 0.99)):
        with torch.no_grad():
            student.add_(1.0)
        method.after_step(step)
        expected = momentum * expected + (1 - momentum) * student.detach().double()
        assert torch.allclose(teacher.double(), expected, atol=1e-6)


def test_a_run_that_is_cut_and_carried_over_ends_in_the_same_bits() -> None:
    config = recipe()
    pixels = (images(6) * 255).byte().numpy()

    def train(method: methods.Method, first: int, steps: int, moments: dict[str, Any]) -> dict[str, Any]:
        engine = Plain(method, pixels, config, "lyon")
        return pretrain(method, engine, first, steps, moments, "x").moments

    whole, first, second = (methods.build(config) for _ in range(3))
    train(whole, 0, 4, {})
    moments = train(first, 0, 2, {})
    methods.set_state(second, methods.get_state(first))
    methods.set_site_tensors(second, methods.get_site_tensors(first))
    train(second, 2, 2, moments)
    assert state_hash(methods.get_state(whole)) == state_hash(methods.get_state(second))
    assert state_hash(methods.get_site_tensors(whole)) == state_hash(methods.get_site_tensors(second))
    assert state_hash(methods.get_state(first)) != state_hash(methods.get_state(second))


def test_the_teacher_stays_at_the_site_and_a_new_state_makes_it_the_student() -> None:
    source, target = moved(built()), built()
    state, stays = methods.get_state(source), methods.get_site_tensors(source)
    assert all(name.startswith(("backbone.", "head.")) for name in state)
    assert set(stays) == {f"teacher.parts.{name}" for name in state if name.startswith("backbone.")}
    methods.set_state(target, state)
    mine, theirs = target.backbone.state_dict(), target.teacher.parts["backbone"].state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    methods.set_site_tensors(target, stays)
    batch = target.prepare(images(), generator(8))
    assert torch.equal(source(*batch), target(*batch))


def test_masks_come_from_the_generator_alone() -> None:
    method = built()
    torch.manual_seed(0)
    first = method.prepare(images(), generator(9))
    torch.manual_seed(1)
    again = method.prepare(images().flip(0), generator(9))
    other = method.prepare(images(), generator(10))
    assert all(torch.equal(a, b) for a, b in zip(first[1:], again[1:], strict=True))
    assert not torch.equal(first[2], other[2])


def test_early_rounds_have_smaller_grids_and_positions_in_proportion() -> None:
    training = {"rounds": 2, "local_steps": 1, "resolutions": [[1, 24], [2, 32]]}
    method = built(training=training)
    engine = Plain(method, np.zeros((4, 1, 32, 32), np.uint8), method.recipe, "lyon")
    (views, context, targets), (_, _, later) = engine.batch(0), engine.batch(1)
    assert views.shape[-1] == 24 and targets.max() < 36 <= later.max()
    assert torch.isfinite(method(views, context, targets)).all()
    # Of patches twice as wide, whose centres lie between two of ours.
    table = resampled(method.head.positions, method.head.grid, (4, 4))
    whole = method.head.positions.reshape(8, 8, -1)
    slow = [3, 7, 11, 15]  # the slowest waves, which interpolation keeps
    assert torch.allclose(table.reshape(4, 4, -1)[1, 1, slow], whole[2:4, 2:4].mean(dim=(0, 1))[slow], atol=1e-3)
