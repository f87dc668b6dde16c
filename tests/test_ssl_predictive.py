"""The losses of BYOL, SimSiam and VICReg against loops in float64 and against lightly."""

import math

import pytest
import torch
from conftest import tiny
from lightly.loss import NegativeCosineSimilarity, VICRegLoss
from torch import Tensor

from wardround import ssl as methods
from wardround.data import procedural_set
from wardround.errors import ConfigError
from wardround.ssl.draws import generator
from wardround.ssl.simsiam import SimSiam


def embeddings(count: int, width: int = 7) -> list[Tensor]:
    draw = generator("embeddings", count)
    return [torch.randn(5, width, generator=draw, dtype=torch.float64) for _ in range(count)]


def unit(x: list[float]) -> list[float]:
    length = math.sqrt(sum(a * a for a in x))
    return [a / length for a in x]


def variance(x: list[float]) -> float:
    mean = sum(x) / len(x)
    return sum((a - mean) ** 2 for a in x) / (len(x) - 1)


def test_byols_loss_is_the_squared_distance_of_unit_vectors_both_ways() -> None:
    p1, p2, t1, t2 = embeddings(4)
    losses = methods.build(tiny(method={"name": "byol"})).loss(p1, p2, t1, t2)
    for row, loss in enumerate(losses.tolist()):
        expected = 0.0
        for prediction, target in ((p1, t2), (p2, t1)):
            pairs = zip(unit(prediction[row].tolist()), unit(target[row].tolist()), strict=True)
            expected += sum((a - b) ** 2 for a, b in pairs)
        assert loss == pytest.approx(expected, rel=1e-12)
    # lightly's is the cosine alone: the paper's distance is 2 more than twice that, each way.
    cosines = NegativeCosineSimilarity()(p1, t2) + NegativeCosineSimilarity()(p2, t1)
    assert float(losses.mean()) == pytest.approx(4 + 2 * float(cosines), rel=1e-12)


def test_simsiams_loss_is_half_the_negative_cosine_both_ways() -> None:
    p1, p2, z1, z2 = embeddings(4)
    losses = methods.build(tiny(method={"name": "simsiam"})).loss(p1, p2, z1, z2)
    for row, loss in enumerate(losses.tolist()):
        ways = [
            -sum(a * b for a, b in zip(unit(p[row].tolist()), unit(z[row].tolist()), strict=True))
            for p, z in ((p1, z2), (p2, z1))
        ]
        assert loss == pytest.approx(sum(ways) / 2, rel=1e-12)
    lightly = (NegativeCosineSimilarity()(p1, z2) + NegativeCosineSimilarity()(p2, z1)) / 2
    assert float(losses.mean()) == pytest.approx(float(lightly), rel=1e-12)


def test_simsiam_stops_the_gradient_at_the_target() -> None:
    """Without the stop, the gradient is another."""
    method = methods.build(tiny(method={"name": "simsiam", "hidden_dim": 32, "output_dim": 16})).double()
    views = [torch.rand(4, 1, 16, 16, generator=generator(n)).double() for n in range(2)]
    z1, z2 = (method.project(view) for view in views)
    p1, p2 = method.head[1](z1), method.head[1](z2)
    weight = method.head[0][0].weight
    (stopped,) = torch.autograd.grad(method(*views).sum(), weight)
    (by_hand,) = torch.autograd.grad(method.loss(p1, p2, z1.detach(), z2.detach()).sum(), weight, retain_graph=True)
    (flowing,) = torch.autograd.grad(method.loss(p1, p2, z1, z2).sum(), weight)
    torch.testing.assert_close(stopped, by_hand)
    assert (stopped - flowing).abs().max() > 1e-3 * stopped.abs().max()


def vicreg_terms(z1: Tensor, z2: Tensor) -> tuple[float, float, float]:
    """Return s, v + v' and c + c' of Bardes et al. 2022, equations (1) to (6), in loops."""
    count, width = z1.shape
    distance = sum(
        (a - b) ** 2 for x, y in zip(z1.tolist(), z2.tolist(), strict=True) for a, b in zip(x, y, strict=True)
    )
    hinges, covariances = 0.0, 0.0
    for z in (z1, z2):
        columns = [column.tolist() for column in z.T]
        hinges += sum(max(0.0, 1 - math.sqrt(variance(column) + 1e-4)) for column in columns) / width
        centred = [[a - sum(column) / count for a in column] for column in columns]
        for i, x in enumerate(centred):
            for j, y in enumerate(centred):
                if i != j:
                    covariances += (sum(a * b for a, b in zip(x, y, strict=True)) / (count - 1)) ** 2 / width
    return distance / count, hinges, covariances


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (3.0, 0.5, 2.0)])
def test_vicregs_loss_is_scaled_as_its_authors_code_which_equation_6_is_not(
    weights: tuple[float, float, float],
) -> None:
    z1, z2 = embeddings(2)
    settings = dict(zip(("invariance", "variance", "covariance"), weights, strict=True))
    loss = float(methods.build(tiny(method={"name": "vicreg", **settings})).loss(z1, z2))
    distance, hinges, covariances = vicreg_terms(z1, z2)
    assert hinges > 0.01
    # The equation has weights[0] * distance + weights[1] * hinges: a mean over the width, and over views, is missing.
    expected = weights[0] * distance / z1.shape[1] + weights[1] * hinges / 2 + weights[2] * covariances
    assert loss == pytest.approx(expected, rel=1e-12)
    assert loss == pytest.approx(float(VICRegLoss(*weights)(z1, z2)), rel=1e-12)


def test_vicreg_without_variance_is_refused() -> None:
    """Its embeddings collapse, and without both batch terms its loss would decompose, which `loss_coupling` denies."""
    with pytest.raises(ConfigError, match=r"variance = 0"):
        tiny(method={"name": "vicreg", "variance": 0.0})


@pytest.mark.parametrize(("norm", "collapses"), [("group", True), ("batch", False)])
def test_simsiam_collapses_without_batch_statistics(norm: str, collapses: bool) -> None:
    """As its docstring says: a fact of the method, which whoever turns batch normalisation off must know."""
    settings = {"name": "simsiam", "hidden_dim": 32, "output_dim": 64}
    config = tiny(method=settings, backbone={"norm": norm}, data={"image_size": 32})
    method = methods.build(config)
    assert isinstance(method, SimSiam)
    images = torch.from_numpy(procedural_set(32, 0, config.data).images).float() / 255

    def spread() -> float:
        with torch.no_grad():
            projections = torch.nn.functional.normalize(method.project((images - 0.5) / 0.25))
        return float(projections.std(dim=0).mean()) * math.sqrt(64)  # 1 where they point everywhere alike

    before = spread()
    optimiser = torch.optim.AdamW(method.parameters(), lr=1e-3)
    for step in range(30):
        optimiser.zero_grad()
        method(*method.prepare(images, generator(step))).mean().backward()
        optimiser.step()
    assert (spread() < 0.3 * before) == collapses
    assert (spread() > 0.8 * before) != collapses
