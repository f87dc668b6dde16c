"""The private engines: exact against a loop over single images, and never a unit's share above C."""

import pytest
import torch
from private_methods import (
    METHODS,
    clipped_reference,
    distance,
    disturbed,
    inputs_of,
    norm,
    private,
    unit_gradients,
)

from wardround.config import FederationConfig
from wardround.errors import ConfigError
from wardround.privacy.engine import clipper
from wardround.privacy.grouping import Grouping

UNITS = [0, 1, 1, 2, 2, 2, 3]
FAMILIES = [  # one of each way of writing a network, at the least size that shows it
    ("resnet18", "mae", 64),
    ("seresnet18", "byol", 32),
    ("cbam_resnet18", "byol", 32),
    ("densenet121", "byol", 32),
    ("vgg11", "byol", 32),
    ("mobilenetv2_050", "mae", 64),
    ("efficientnet_b0", "byol", 32),
    ("convnext_atto", "mae", 64),
    ("swin_tiny_patch4_window7_224", "mae", 64),
    ("mobilevit_xxs", "byol", 64),
    ("monai_vit_tiny", "mae", 32),
    ("monai_resnet10", "byol", 32),
]


def compare(config: FederationConfig) -> None:
    method = disturbed(config)
    inputs = inputs_of(method, len(UNITS))
    each = unit_gradients(method, inputs, UNITS)
    clip = 1.01 * sorted(norm(gradient) for gradient in each)[1]  # some are clipped, some are not
    found = clipper(method, config)(inputs, Grouping(torch.tensor(UNITS), 4), clip)
    assert distance(found.sums, clipped_reference(each, clip)) < 1e-6
    assert found.losses.shape == (len(UNITS),)
    assert all(p.requires_grad for name, p in method.named_parameters() if not name.startswith("teacher."))


@pytest.mark.parametrize("method", METHODS)
def test_bookkeeping_gives_the_clipped_sum_of_every_method(method: str) -> None:
    compare(private(method))


@pytest.mark.parametrize(("backbone", "method", "size"), FAMILIES)
def test_bookkeeping_gives_the_clipped_sum_on_every_way_of_writing_a_network(
    backbone: str, method: str, size: int
) -> None:
    volumes = {"dimensions": 3, "spacing": [2.0, 2.0, 2.0]} if backbone.startswith("monai") else {}
    network = {"name": backbone} | ({"depth": 1} if "vit_tiny" in backbone else {})
    compare(private(method, network, size=size, data=volumes))


@pytest.mark.parametrize("method", METHODS)
def test_opacus_hooks_give_the_same_sum(method: str) -> None:
    compare(private(method, privacy={"engine": "opacus"}))


def test_opacus_ghost_clipping_gives_the_same_sum_for_one_row_a_unit() -> None:
    config = private("mae", privacy={"engine": "opacus-ghost"})
    method = disturbed(config)
    inputs = inputs_of(method, 5)
    each = unit_gradients(method, inputs, list(range(5)))
    clip = 1.01 * sorted(norm(gradient) for gradient in each)[1]
    found = clipper(method, config)(inputs, Grouping(torch.arange(5), 5), clip)
    assert distance(found.sums, clipped_reference(each, clip)) < 1e-6


@pytest.mark.parametrize(
    ("method", "more"),
    [("byol", {}), ("mae", {"images_per_patient": 2}), ("mae", {"views": 2})],
)
def test_opacus_ghost_clipping_is_refused_for_several_rows_a_unit(method: str, more: dict[str, int]) -> None:
    config = private(method, privacy={"engine": "opacus-ghost", **more})
    with pytest.raises(ConfigError, match="engine = 'bookkeeping'"):
        clipper(disturbed(config), config)
