"""Label-free figures against hand-computed values, and a collapse that is seen."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny

from wardround import ssl as methods
from wardround.errors import UpdateError
from wardround.plan import resolve
from wardround.probe.monitor import Monitor, figures, watch
from wardround.server.run_folder import create
from wardround.server.tracking import collapse_lines, may_rise

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 1, 16, 16), dtype=np.uint8)


def test_the_figures_of_four_orthogonal_vectors() -> None:
    seen = figures(torch.eye(4), torch.eye(4).roll(1, 0))
    # Four equal singular values; every pair of unit vectors is sqrt(2) apart: squared, 2.
    assert seen.effective_rank == pytest.approx(4.0, rel=1e-5)
    assert (seen.alignment, seen.uniformity) == pytest.approx((2.0, 4.0))
    # A column is (1, 0, 0, 0): its sample variance is 1/4, and the root of 1/4 times the root of 4 is 1.
    assert seen.feature_spread == pytest.approx(1.0)


def test_the_effective_rank_is_the_exponential_of_the_entropy_of_the_singular_values() -> None:
    features = torch.diag(torch.tensor([3.0, 1.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert figures(features, features).effective_rank == pytest.approx(math.exp(entropy), rel=1e-5)


def test_one_image_has_figures_and_no_warning_from_torch() -> None:
    assert figures(torch.ones(1, 4), torch.ones(1, 4)) == Monitor(pytest.approx(1.0), 0.0, 0.0, 0.0)  # type: ignore[arg-type]


def test_features_that_are_all_alike_count_as_collapsed() -> None:
    alike = torch.ones(20, 8) + 1e-3 * torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    seen = figures(alike, alike)
    assert seen.collapsed
    assert seen.effective_rank == pytest.approx(1.0, abs=0.05)
    assert seen.uniformity == pytest.approx(0.0, abs=1e-4)
    spread = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    assert not figures(spread, spread).collapsed


def test_a_backbone_is_watched_alike_whenever_asked_and_stays_in_training() -> None:
    config = tiny()
    backbone = methods.build(config).backbone.train()
    first, again = (watch(backbone, IMAGES, config, "lyon") for _ in range(2))
    assert first == again
    assert backbone.training
    with torch.no_grad():
        backbone.norm.weight.zero_()
        backbone.norm.bias.fill_(1.0)
    assert watch(backbone, IMAGES, config, "lyon").collapsed


def test_a_few_images_at_once_give_the_same_figures() -> None:
    config = tiny()
    backbone = methods.build(config).backbone
    whole, cut = (vars(watch(backbone, IMAGES, config, "lyon", at_once)) for at_once in (64, 3))
    assert cut == pytest.approx(whole, rel=1e-4)


def test_features_that_are_no_numbers_are_said_by_name() -> None:
    config = tiny()
    backbone = methods.build(config).backbone
    with torch.no_grad():
        backbone.norm.bias[0] = torch.nan
    with pytest.raises(UpdateError, match="site 'lyon': the backbone's features are not finite"):
        watch(backbone, IMAGES, config, "lyon")


def test_a_collapse_is_a_warning_that_names_the_site() -> None:
    healthy, collapsed = Monitor(9.0, 0.8, 0.2, 2.0), Monitor(1.1, 0.01, 0.0, 0.0)
    lines = collapse_lines(
        {
            "lyon": {"images": 90, **vars(healthy)},
            "oslo": {"images": 90, **vars(collapsed)},
            "york": {"images": 4, **vars(collapsed)},  # too few to judge by
        }
    )
    assert len(lines) == 1
    assert lines[0].startswith("warning: site 'oslo': features collapse (effective rank 1.1, spread 0.010)")


@pytest.mark.parametrize(
    ("spreads", "said"),
    [
        ([0.028, 0.019, 0.039, 0.092], [False, False, False, False]),  # the demo's
        ([0.028, 0.019, 0.019, 0.018], [False, False, True, True]),  # it does not come apart
        ([0.4, 0.3, 0.04, 0.04, 0.04], [False, False, True, True, True]),  # it was apart
    ],
)
def test_features_that_may_come_apart_by_themselves_have_two_rounds_to(spreads: list[float], said: list[bool]) -> None:
    rounds = [{"lyon": {"images": 90, **vars(Monitor(1.4, spread, 0.0, 0.0))}} for spread in spreads]
    for sites, spread in zip(rounds, spreads, strict=True):
        sites["lyon"]["effective_rank"] = 1.4 if spread < 0.05 else 9.0
    lines = [collapse_lines(sites, rounds[:number], may_rise=True) for number, sites in enumerate(rounds)]
    assert [bool(line) for line in lines] == said


def test_only_what_reconstructs_may_come_apart_and_not_after_its_last_round(tmp_path: Path) -> None:
    for method, rises in (("mae", True), ("byol", False)):
        run = create(tmp_path / method, resolve(tiny(method={"name": method})), {"lyon": ""}, "", 0)
        assert [may_rise(run, number) for number in (1, 2)] == [rises, False]
