"""Losses and layers that couple patients: why clipping is no use there, and that each is refused."""

from typing import Any

import pytest
import torch
from audited_engine import RESNET, SMALL_VIT, Small, made
from conftest import tiny
from private_methods import HEADS, norm, private
from torch import Tensor, nn

from wardround import ssl
from wardround.config import FederationConfig
from wardround.errors import ConfigError
from wardround.privacy.bookkeeping import clipped_sum
from wardround.privacy.capture import Capture
from wardround.privacy.grouping import Grouping
from wardround.privacy.method import trained
from wardround.privacy.rows import rows_of_calls


def nearly_equal(config: FederationConfig, count: int) -> Tensor:
    """Return films of which all but the last are the same up to a little noise: [count, 1, S, S]."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(1, *config.data.shape, generator=draw).repeat(count, 1, 1, 1)
    images += 0.01 * torch.randn(images.shape, generator=draw)
    images[-1] = torch.rand(config.data.shape, generator=draw)
    return images.clamp(0, 1)


def test_clipping_nt_xent_by_the_image_does_not_bound_what_an_image_does() -> None:
    """Removing one of 32 images moves the sum of clipped gradients by many C: it turns all the others."""
    config = tiny(method={"name": "simclr", **HEADS})
    method = ssl.build(config)
    images = nearly_equal(config, 32)

    def total(images: Tensor) -> dict[str, Tensor]:
        with Capture(trained(method), lambda call: None) as capture:
            method(images, images)
        alone = Grouping(torch.arange(len(images)), len(images))
        return clipped_sum(method, (images, images), alone, 0.1, [1] * len(capture.calls)).sums

    whole, fewer = total(images), total(images[:-1])
    assert norm({name: whole[name] - fewer[name] for name in whole}) / 0.1 > 10


COUPLED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("simclr", {"negatives": "batch"}, SMALL_VIT, "negatives = 'public'"),
    ("moco", {}, SMALL_VIT, "the other images of the batch"),
    ("vicreg", {}, SMALL_VIT, "batch"),
    ("dino", {"centre": "batch", "local_views": 0}, SMALL_VIT, "centre"),
    *(
        (method, {}, {"name": name, "norm": "batch"}, "batch normalisation shares statistics")
        for method, name in (
            ("byol", "densenet121"),
            ("byol", "efficientnet_b0"),
            ("byol", "inception_v4"),
            ("simsiam", RESNET),
        )
    ),
]


@pytest.mark.parametrize(("name", "settings", "backbone", "reason"), COUPLED, ids=lambda x: x if type(x) is str else "")
def test_what_couples_patients_is_refused_with_alternatives(
    name: str, settings: dict[str, Any], backbone: dict[str, Any], reason: str
) -> None:
    size = 96 if backbone["name"] == "inception_v4" else 32
    privacy = {"unit": "patient", "epsilon": 8.0, "delta": 1e-3}
    config = tiny(method={"name": name, **settings}, backbone=backbone, data={"image_size": size}, privacy=privacy)
    with pytest.raises(ConfigError, match=reason) as refused:
        made(config, [1] * 4)
    for alternative in ("mae", "negatives = 'public'", "norm = 'group'", "unit = 'site'"):
        assert alternative in str(refused.value)


def frozen_affine(layer: nn.BatchNorm1d) -> nn.BatchNorm1d:
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    return layer


class Normalised(Small):
    """A small method that says that it decomposes, with a layer that may couple."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm = layer


class Squashed(nn.Module):
    """A layer by hand that looks at its batch without a parameter or a statistic of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(8, affine=False), frozen_affine(nn.BatchNorm1d(8)), Squashed()], ids=repr
)
def test_a_layer_that_couples_is_found_by_what_it_does_whatever_the_method_says(layer: nn.Module) -> None:
    with pytest.raises(ConfigError, match="changes with another image of its batch"):
        rows_of_calls(Normalised(layer), (1, 16, 16))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("trains", [True, False])
def test_batch_normalisation_in_a_method_is_refused_by_its_type(affine: bool, trains: bool) -> None:
    """In evaluation mode no batch is looked at; a training loop switches the mode after the engine is made."""
    config = private("mae", SMALL_VIT, size=16)
    method = ssl.build(config).train(trains)
    method.head.norm = nn.BatchNorm1d(16, affine=affine).requires_grad_(False)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"batch normalisation shares statistics over the batch \('head.norm'\)"):
        made(config, [1] * 4, method=method)


@pytest.mark.parametrize("name", ["densenet121", "efficientnet_b0", "inception_v4"])
def test_opacus_finds_no_error_in_batch_normalised_networks_of_timm(name: str) -> None:
    """Why its validator is not asked: timm's BatchNormAct2d passes it."""
    import timm
    from opacus.validators import ModuleValidator

    with torch.device("meta"):
        model = timm.create_model(name)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    assert ModuleValidator.validate(model, strict=False) == []
