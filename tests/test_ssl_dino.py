"""DINO against loops in float64 and lightly, and what its centre does to images that never meet."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from torch import Tensor, nn

from wardround import ssl as methods
from wardround.config import FederationConfig
from wardround.data import procedural_set
from wardround.errors import ConfigError
from wardround.ssl.dino import BANK, DINO, Prototypes, distillation
from wardround.ssl.draws import generator
from wardround.ssl.engine import Plain
from wardround.ssl.pretrain import pretrain
from wardround.ssl.views import normalise
from wardround.update import state_hash

HEAD = {"hidden_dim": 32, "bottleneck_dim": 16, "output_dim": 24}
RESNET: dict[str, Any] = {"backbone": {"name": "resnet18"}, "data": {"image_size": 64}}
TEMPERATURES = (0.1, 0.04)


def recipe(backbone: str = "vit", training: dict[str, Any] | None = None, **method: Any) -> FederationConfig:
    where = RESNET if backbone == "resnet18" else {}
    return tiny(method={"name": "dino"} | HEAD | method, training=training or {}, **where)


def built(backbone: str = "vit", **method: Any) -> DINO:
    made = methods.build(recipe(backbone, **method))
    assert isinstance(made, DINO)
    return made


def images(method: DINO, count: int = 5) -> Tensor:
    return torch.rand(count, *method.recipe.data.shape, generator=generator("images", count))


def outputs(count: int, batch: int = 3, width: int = 6) -> list[Tensor]:
    return [torch.randn(batch, width, generator=generator("outputs", i), dtype=torch.float64) for i in range(count)]


def softmax(values: list[float]) -> list[float]:
    weights = [math.exp(value - max(values)) for value in values]
    return [weight / sum(weights) for weight in weights]


def reference_loss(students: list[list[float]], teachers: list[list[float]], centre: list[float]) -> float:
    """Return one image's H(P_t, P_s) of equation (3), the mean over its pairs of views, in float64."""
    terms = []
    for t, teacher in enumerate(teachers):
        target = softmax([(value - c) / TEMPERATURES[1] for value, c in zip(teacher, centre, strict=True)])
        for s, student in enumerate(students):
            if s != t:
                predicted = softmax([value / TEMPERATURES[0] for value in student])
                terms.append(-sum(p * math.log(q) for p, q in zip(target, predicted, strict=True)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("local_views", [0, 3])
def test_the_loss_is_the_papers_over_pairs_of_views(local_views: int) -> None:
    students, teachers, centre = outputs(2 + local_views), outputs(2, 3, 6)[::-1], outputs(1, 1, 6)[0][0]
    expected = [
        reference_loss([s[i].tolist() for s in students], [t[i].tolist() for t in teachers], centre.tolist())
        for i in range(3)
    ]
    assert distillation(students, teachers, centre, TEMPERATURES).tolist() == pytest.approx(expected, rel=1e-12)


def test_the_loss_and_the_running_centre_are_lightlys() -> None:
    students, teachers = outputs(5), outputs(2)[::-1]
    theirs = DINOLoss(output_dim=6, teacher_temp=TEMPERATURES[1], student_temp=TEMPERATURES[0], center_momentum=0.9)
    theirs = theirs.double()
    theirs.center += outputs(1, 1)[0]
    centre = theirs.center[0, 0].clone()
    assert distillation(students, teachers, centre, TEMPERATURES).mean().item() == pytest.approx(
        theirs(teachers, students).item(),
        rel=1e-9,  # they divide by a temperature in float32
    )
    method = built(output_dim=8)
    theirs, rows = DINOLoss(output_dim=8, center_momentum=0.9), [o.float() for o in outputs(8, 4, 8)]
    for step in range(2):
        method.loss(*rows)
        method.after_step(step)
        theirs.update_center(torch.stack(rows[-2:]))
    assert torch.allclose(method.head.centre, theirs.center.flatten(), atol=1e-7)
    assert method.head.centre.abs().min() > 0


def test_prototypes_are_a_weight_normalised_layer_on_unit_vectors_and_so_are_their_gradients() -> None:
    """With lightly's own head the suite's warnings, which are errors, would stop us."""
    with pytest.raises(FutureWarning, match="weight_norm"):
        DINOProjectionHead(8, 8, 8, 8)
    mine = Prototypes(5, 7)
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(5, 7, bias=False))
    direction = theirs.parametrizations.weight.original1  # type: ignore[union-attr, index]
    with torch.no_grad():
        theirs.parametrizations.weight.original0.fill_(1.0)  # type: ignore[union-attr, index, operator]
        direction.copy_(mine.weight)  # type: ignore[operator]
    x = torch.randn(3, 5, generator=generator("x"))
    slopes = torch.randn(3, 7, generator=generator("slopes"))
    results = [mine(x), theirs(nn.functional.normalize(x, dim=1))]
    for result in results:
        result.backward(slopes)
    assert torch.allclose(*results, atol=1e-6)
    assert torch.allclose(mine.weight.grad, direction.grad, atol=1e-6)  # type: ignore[arg-type]


def next_losses(method: DINO, views: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return the losses of a batch, and of the same views after the step that this batch made, weights aside."""
    start = method.head.centre.clone()
    with torch.no_grad():
        now = method(*views)
        method.after_step(0)
        other = tuple(view.flip(-1) for view in outputs_like(views))
        later = method(*other)
    method.head.centre.copy_(start)
    return now, later


def outputs_like(views: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.rand(view.shape, generator=generator("next", place)) for place, view in enumerate(views)]


@pytest.mark.parametrize("centre", ["constant", "public", "batch"])
@pytest.mark.parametrize("backbone", ["vit", "resnet18"])
def test_only_a_running_centre_lets_an_image_into_the_losses_of_others(backbone: str, centre: str) -> None:
    method = built(backbone, centre=centre)
    views = method.prepare(images(method), generator(1))
    altered = tuple(view.clone() for view in views)
    for view in altered:
        view[2] = 3.0 - view[2]
    (now, later), (now_altered, later_altered) = next_losses(method, views), next_losses(method, altered)
    assert (now == now_altered).tolist() == [True, True, False, True, True]
    assert torch.equal(later, later_altered) == (method.coupling is None)
    assert (method.coupling is None) == (centre != "batch")


@pytest.mark.parametrize(
    ("backbone", "method"),
    [("vit", {}), ("vit", {"local_views": 0}), ("vit", {"centre": "public"}), ("resnet18", {"local_views": 2})],
)
def test_every_trainable_parameter_gets_a_gradient_and_the_teacher_none(backbone: str, method: dict[str, Any]) -> None:
    made = built(backbone, **method)
    views = made.prepare(images(made, 4), generator(2))
    optimiser = torch.optim.SGD(made.parameters(), lr=1e-3)
    for _ in range(2):  # timm's residual blocks begin at zero, and pass gradients from the second step on
        optimiser.zero_grad()
        made(*views).mean().backward()
        optimiser.step()
    for name, parameter in made.named_parameters():
        if name.startswith("teacher."):
            assert not parameter.requires_grad and parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("backbone", ["vit", "resnet18"])
def test_the_loss_falls_on_a_fixed_batch(backbone: str) -> None:
    """The centre settles first: while it does, targets soften and the loss rises whatever the student learns."""
    made = built(backbone, local_views=1, centre="batch")
    views = made.prepare(images(made, 2), generator(3))
    with torch.no_grad():
        made.head.centre.copy_(torch.stack(made.embed(*views)[-2:]).mean(dim=(0, 1)))
    optimiser = torch.optim.AdamW(made.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = made(*views).mean()
        loss.backward()
        optimiser.step()
        made.after_step(0)
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]), losses


@pytest.mark.parametrize("centre", ["batch", "public"])
def test_a_run_that_is_cut_and_carried_over_ends_in_the_same_bits(centre: str) -> None:
    config = recipe(centre=centre, local_views=1)
    pixels = (images(built(), 6) * 255).byte().numpy()

    def train(made: methods.Method, first: int, steps: int, moments: dict[str, Any]) -> dict[str, Any]:
        return pretrain(made, Plain(made, pixels, config, "lyon"), first, steps, moments, "x").moments

    whole, first, second = (methods.build(config) for _ in range(3))
    train(whole, 0, 4, {})
    moments = train(first, 0, 2, {})
    methods.set_state(second, methods.get_state(first))
    methods.set_site_tensors(second, methods.get_site_tensors(first))
    train(second, 2, 2, moments)
    assert state_hash(methods.get_state(whole)) == state_hash(methods.get_state(second))
    assert state_hash(methods.get_site_tensors(whole)) == state_hash(methods.get_site_tensors(second))
    assert state_hash(methods.get_state(first)) != state_hash(methods.get_state(second))


def test_micro_batches_give_the_joint_gradient_and_the_joint_centre() -> None:
    config = recipe(training={"clip_norm": None, "batch_size": 5})
    results = []
    for micro_batch in (0, 2):
        made = methods.build(config)
        assert isinstance(made, DINO)
        engine = Plain(made, (images(made) * 255).byte().numpy(), config, "lyon", micro_batch=micro_batch)
        loss = engine.gradients(engine.batch(0))
        made.after_step(0)
        slopes = torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])
        results.append((loss, slopes, made.head.centre))
    for joint, cut in zip(*results, strict=True):
        assert (joint - cut).abs().max() < 1e-5 * joint.abs().max()


def test_the_teacher_stays_and_a_running_centre_travels() -> None:
    for centre in ("constant", "public", "batch"):
        method = built(centre=centre)
        state, stays = methods.get_state(method), methods.get_site_tensors(method)
        assert ("head.centre" in state) == (centre == "batch")
        assert all(name.startswith(("backbone.", "head.")) for name in state)
        taught = {f"teacher.parts.{name.removeprefix('head.')}" for name in state if name != "head.centre"}
        assert set(stays) == taught and not any("bank" in name for name in state)


def test_a_new_state_makes_the_teacher_the_student_and_site_memory_brings_it_back() -> None:
    source, target = built(), built()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1)
        source.head.centre.fill_(0.5)
    source.after_step(1)
    methods.set_state(target, methods.get_state(source))
    assert torch.equal(target.head.centre, torch.full((24,), 0.5))
    mine, theirs = target.backbone.state_dict(), target.teacher.parts["backbone"].state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    methods.set_site_tensors(target, methods.get_site_tensors(source))
    views = target.prepare(images(target), generator(4))
    assert torch.equal(source(*views), target(*views))


def test_a_public_centre_is_the_teachers_mean_over_phantoms_whatever_the_student_is() -> None:
    method = built(centre="public")
    bank = procedural_set(BANK, method.recipe.seed, method.recipe.data).images
    rows = [normalise(torch.from_numpy(image[None]).float() / 255, method.recipe.data) for image in bank]
    expected = sum(method.teacher(row)[0].double() for row in rows) / len(rows)
    assert torch.allclose(method.centre().double(), expected, atol=1e-6)
    before = method.centre()
    with torch.no_grad():
        for parameter in method.backbone.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator("move")))
    assert torch.equal(method.centre(), before)
    method.after_step(0)
    assert not torch.equal(method.centre(), before)


def test_a_public_centre_is_refused_where_it_is_of_no_use() -> None:
    with pytest.raises(ConfigError, match=r"centre = 'public'.*norm = 'batch' mixes images.*Take centre = 'constant'"):
        methods.build(
            tiny(
                method={"name": "dino", "centre": "public"},
                backbone={"name": "resnet18", "norm": "batch"},
                data={"image_size": 64},
            )
        )


@pytest.mark.parametrize(
    ("backbone", "image_size", "asked", "edge"),
    [
        ({"patch_size": 8}, 16, None, 8),
        ({"patch_size": 8}, 40, None, 24),  # half is 20, which is no multiple of 8
        ({"patch_size": 8}, 48, 16, 16),
        ({"name": "resnet18"}, 48, None, 32),
        ({"name": "resnet18"}, 96, None, 48),
        ({"name": "resnet18"}, 48, 20, 20),
    ],
)
def test_small_crops_are_half_of_a_view_or_what_the_backbone_takes(
    backbone: dict[str, Any], image_size: int, asked: int | None, edge: int
) -> None:
    method = {"name": "dino", "local_views": 2, "local_size": asked, **HEAD}
    made = methods.build(tiny(method=method, backbone=backbone, data={"image_size": image_size}))
    views = made.prepare(torch.rand(2, 1, image_size, image_size), generator(5))
    assert [view.shape[2:] for view in views] == [(image_size, image_size)] * 2 + [(edge, edge)] * 2
    assert all(torch.isfinite(output).all() for output in made.embed(*views))


def test_small_crops_follow_the_resolution_of_the_round() -> None:
    training = {"rounds": 2, "local_steps": 1, "resolutions": [[1, 16], [2, 32]]}
    made = methods.build(tiny(method={"name": "dino", **HEAD}, training=training, data={"image_size": 32}))
    engine = Plain(made, np.zeros((4, 1, 32, 32), np.uint8), made.recipe, "lyon")
    assert [[view.shape[-1] for view in engine.batch(step)] for step in (0, 1)] == [
        [16] * 2 + [8] * 4,
        [32] * 2 + [16] * 4,
    ]


@pytest.mark.parametrize(
    ("backbone", "method", "message"),
    [
        ({"patch_size": 8}, {"local_size": 12}, r"local_size = 12: expected .* multiple of its patch"),
        ({"patch_size": 8}, {"local_size": 64}, r"local_size = 64: expected an edge up to \[data\] image_size = 32"),
        ({"patch_size": 32}, {}, r"takes no small crop .* Set local_views = 0"),
        ({"name": "resnet18"}, {}, r"takes no small crop beside views of 32 pixels .*Set local_views = 0"),
        ({}, {"local_scale": [0.4, 0.1]}, r"local_scale = \[0.4, 0.1\]: expected 0 < smallest"),
    ],
)
def test_small_crops_that_cannot_be_are_refused(backbone: dict[str, Any], method: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        methods.build(tiny(method={"name": "dino"} | method, backbone=backbone, data={"image_size": 32}))
    if "patch_size" in backbone and not method:
        methods.build(tiny(method={"name": "dino", "local_views": 0}, backbone=backbone, data={"image_size": 32}))


def test_the_loss_is_float32_under_autocast() -> None:
    made = built(local_views=1)
    views = made.prepare(images(made), generator(6))
    full = made(*views)
    with torch.autocast("cpu", torch.bfloat16):
        half = made(*views)
    assert half.dtype == torch.float32 and made.embed(*views)[0].dtype == torch.float32
    assert not torch.equal(half, full) and torch.allclose(half, full, rtol=0.1)
