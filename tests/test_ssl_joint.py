"""What the loop and the engines lean on, for every joint-embedding method and setting, on a ViT and a ResNet."""

import math
from typing import Any

import pytest
import torch
from conftest import tiny
from torch import Tensor, nn

from wardround import ssl as methods
from wardround.config import FederationConfig
from wardround.ssl.draws import generator
from wardround.ssl.method import Method
from wardround.ssl.travel import get_site_tensors, get_state, set_site_tensors, set_state
from wardround.update import state_hash

WIDTHS = {"hidden_dim": 32, "output_dim": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    name: {"name": name, **WIDTHS} for name in ("simclr", "moco", "byol", "simsiam", "vicreg")
}
SETTINGS["simclr, public"] = SETTINGS["simclr"] | {"negatives": "public", "bank_size": 8, "bank_draw": 4}
BACKBONES: dict[str, dict[str, Any]] = {
    "vit": {"backbone": {}, "data": {"image_size": 16}},
    "resnet18": {"backbone": {"name": "resnet18"}, "data": {"image_size": 32}},
}
COUPLED = {"simclr", "moco", "vicreg"}  # with normalisation that lets no image see another
GROUP_AND_BATCH = [
    (case, norm) for case in SETTINGS for norm in ("group", "batch") if (case, norm) != ("simclr, public", "batch")
]
with_teacher = pytest.mark.parametrize("case", ["moco", "byol"])
every_setting = pytest.mark.parametrize("case", SETTINGS)
every_norm = pytest.mark.parametrize(("case", "norm"), GROUP_AND_BATCH)
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)


def config(case: str, backbone: str = "vit", norm: str = "group", steps: int = 30) -> FederationConfig:
    changes = BACKBONES[backbone] | {"backbone": BACKBONES[backbone]["backbone"] | {"norm": norm}}
    training = {"rounds": 1, "local_steps": steps}
    return tiny(method=SETTINGS[case], training=training, **changes)


def images(method: Method, count: int = 4) -> Tensor:
    size = method.recipe.data.image_size
    return torch.rand(count, 1, size, size, generator=generator("images"))


def prepared(method: Method, count: int = 4) -> tuple[Tensor, ...]:
    return method.prepare(images(method, count), generator("views"))


def train(method: Method, inputs: tuple[Tensor, ...], steps: int) -> list[float]:
    """Return the losses of some steps on one fixed batch."""
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3, fused=True)
    losses = []
    for step in range(steps):
        optimiser.zero_grad()
        loss = method(*inputs).mean()
        loss.backward()
        optimiser.step()
        method.after_step(step)
        losses.append(float(loss.detach()))
    return losses


def of_each_image(method: Method, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return all that a loss says of each image: its term, where it has one, and its slope at each embedding."""
    embedded = method.embed(*inputs)
    loss = method.loss(*embedded)
    slopes = torch.autograd.grad(loss.sum(), [rows for rows in embedded if rows.requires_grad])
    return [*([loss] if loss.ndim else []), *slopes]


@every_norm
def test_other_images_notice_a_replaced_one_if_and_only_if_the_method_says_so(case: str, norm: str) -> None:
    method = methods.build(config(case, norm=norm))
    pictures = images(method, 5)
    altered = pictures.clone()
    altered[2] = 1 - altered[2]
    before, after = (of_each_image(method, method.prepare(p, generator("views"))) for p in (pictures, altered))
    others = [0, 1, 3, 4]
    noticed = [not torch.equal(a[row], b[row]) for a, b in zip(before, after, strict=True) for row in others]
    assert all(not torch.equal(a[2], b[2]) for a, b in zip(before, after, strict=True))
    assert all(noticed) if method.coupling else not any(noticed)
    assert (method.coupling is not None) == (norm == "batch" or case in COUPLED)
    assert method(*method.prepare(pictures, generator("views"))).shape == (() if case in COUPLED else (5,))


@every_backbone
@every_norm
def test_every_trainable_parameter_gets_a_gradient_and_no_teacher_does(case: str, norm: str, backbone: str) -> None:
    method = methods.build(config(case, backbone, norm))
    train(method, prepared(method), 1)  # timm's residual branches end in a norm of scale 0, which blocks the first one
    method.zero_grad()
    method(*prepared(method)).mean().backward()
    for name, parameter in method.named_parameters():
        if name.startswith("teacher."):
            assert not parameter.requires_grad and parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@every_backbone
@every_setting
def test_the_loss_falls_over_thirty_steps_on_a_fixed_batch(case: str, backbone: str) -> None:
    method = methods.build(config(case, backbone))
    losses = train(method, prepared(method), 30)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.05


@every_setting
def test_the_same_seed_gives_the_same_bits(case: str) -> None:
    hashes = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(hashes))  # the process's own draws play no part
        recipe = config(case).model_copy(update={"seed": seed})
        method = methods.build(recipe)
        losses = train(method, prepared(method), 3)
        hashes.append((state_hash(get_state(method)), losses))
    assert hashes[0] == hashes[1]
    assert hashes[0][0] != hashes[2][0]


@every_setting
def test_a_part_of_the_batch_embeds_as_it_does_in_the_whole(case: str) -> None:
    method = methods.build(config(case)).eval()
    inputs = prepared(method)
    with torch.no_grad():
        whole = method.embed(*inputs)
        parts = [method.embed(*(rows[part] for rows in inputs)) for part in (slice(0, 1), slice(1, 4))]
    for rows, *cut in zip(whole, *parts, strict=True):
        torch.testing.assert_close(torch.cat(cut), rows)


@every_setting
def test_the_loss_is_in_float32_under_bfloat16_and_stays_in_float64(case: str) -> None:
    method = methods.build(config(case))
    inputs = prepared(method)
    embedded = [rows.detach() for rows in method.embed(*inputs)]
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = method.loss(*embedded)
        of_rounded = method.loss(*(rows.bfloat16() for rows in embedded))
    assert torch.equal(under_autocast, method.loss(*embedded))
    assert of_rounded.dtype == torch.float32
    wide = [rows.double() if rows.is_floating_point() else rows for rows in inputs]
    assert method.double()(*wide).dtype == torch.float64


@every_setting
def test_heads_are_of_plain_layers_and_see_one_row_at_a_time(case: str) -> None:
    head = methods.build(config(case)).head
    assert {type(layer) for layer in head.modules() if list(layer.parameters(recurse=False))} == {
        nn.Linear,
        nn.LayerNorm,
    }


@pytest.mark.parametrize("case", ["moco", "byol", "simsiam", "vicreg"])
def test_each_view_has_its_own_batch_statistics(case: str) -> None:
    method = methods.build(config(case, norm="batch"))
    first, second = prepared(method)
    with torch.no_grad():
        one, other = method.embed(first, second), method.embed(first, second.flip(0))
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


def test_simclrs_views_share_their_batch_statistics() -> None:
    method = methods.build(config("simclr", norm="batch"))
    first, second = prepared(method)
    with torch.no_grad():
        assert not torch.equal(method.embed(first, second)[0], method.embed(first, 2 * second)[0])


@with_teacher
def test_the_teacher_follows_by_the_papers_cosine(case: str) -> None:
    method = methods.build(config(case, steps=4))
    assert method.teacher is not None
    expected = {name: p.double() for name, p in method.teacher.parts.named_parameters()}
    for step in range(4):
        with torch.no_grad():
            for parameter in method.backbone.parameters():
                parameter.add_(0.5)
        method.after_step(step)
        momentum = 1 - (1 - 0.99) * (math.cos(math.pi * step / 4) + 1) / 2  # Grill et al. 2020, section 3.2
        for name, student in (("backbone", method.backbone), ("projector", method.head.get_submodule("projector"))):
            for inner, parameter in student.named_parameters():
                old = expected[f"{name}.{inner}"]
                expected[f"{name}.{inner}"] = momentum * old + (1 - momentum) * parameter.detach().double()
    for name, parameter in method.teacher.parts.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-6, atol=1e-6)


@with_teacher
def test_the_targets_are_the_teachers_projections_of_each_view(case: str) -> None:
    method = methods.build(config(case))
    with torch.no_grad():
        for parameter in method.backbone.parameters():
            parameter.add_(0.1)
    first, second = prepared(method)
    targets = method.embed(first, second)[2:]
    fresh = methods.build(config(case))
    for target, view in zip(targets, (first, second), strict=True):
        expected = fresh.head.get_submodule("projector")(fresh.backbone.features(view))
        torch.testing.assert_close(target, expected.detach())
        assert not target.requires_grad


@with_teacher
def test_a_teacher_stays_at_its_site_and_becomes_the_student_when_a_state_comes(case: str) -> None:
    method, other = (methods.build(config(case, norm="batch")) for _ in range(2))
    train(method, prepared(method), 2)
    kept, state = get_site_tensors(method), get_state(method)
    own = {name for name, _ in method.named_parameters() if name.startswith("teacher.")}
    assert own and own <= kept.keys()
    assert not own & state.keys()
    set_state(other, state)
    assert other.teacher is not None
    for name, part in other.taught().items():
        for mine, student in zip(other.teacher.parts[name].parameters(), part.parameters(), strict=True):
            assert torch.equal(mine, student)
    set_site_tensors(other, kept)
    assert state_hash(get_site_tensors(other)) == state_hash(kept)
