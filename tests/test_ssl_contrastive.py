"""The contrastive losses, SimCLR's and MoCo's, against loops in float64 and against lightly; the public bank."""

import math

import pytest
import torch
from conftest import tiny
from lightly.loss import NTXentLoss
from torch import Tensor

from wardround import ssl as methods
from wardround.data import procedural_set
from wardround.errors import ConfigError
from wardround.ssl.draws import generator
from wardround.ssl.heads import cosines
from wardround.ssl.moco import MoCo, contrast
from wardround.ssl.public import public_bank
from wardround.ssl.simclr import SimCLR, info_nce, nt_xent

PUBLIC = {"name": "simclr", "hidden_dim": 32, "output_dim": 16, "negatives": "public", "bank_size": 9, "bank_draw": 4}


def embeddings(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator("embeddings", seed), dtype=torch.float64)


def images(count: int = 5, size: int = 16) -> Tensor:
    return torch.rand(count, 1, size, size, generator=generator("images", count))


def cosine(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))


def with_bank(anchor: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> float:
    """Return lightly's own value for one anchor whose negatives lie in a memory bank."""
    loss = NTXentLoss(temperature, memory_bank_size=(len(negatives), negatives.shape[1])).double()
    loss.memory_bank.bank = torch.nn.functional.normalize(negatives)
    return float(loss(anchor[None], positive[None]))


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_is_the_papers_over_all_2n_views(temperature: float) -> None:
    z1, z2 = embeddings(5, 7, seed=1), embeddings(5, 7, seed=2)
    views = [row for pair in zip(z1.tolist(), z2.tolist(), strict=True) for row in pair]  # 2k-1 and 2k are a pair
    losses = []
    for i, anchor in enumerate(views):
        shares = [math.exp(cosine(anchor, other) / temperature) for other in views]
        losses.append(-math.log(shares[i ^ 1] / sum(share for k, share in enumerate(shares) if k != i)))
    loss = nt_xent(z1, z2, temperature)
    assert loss.dtype == torch.float64
    assert float(loss) == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert float(loss) == pytest.approx(float(NTXentLoss(temperature)(z1, z2)), rel=1e-12)


def test_with_public_negatives_an_images_loss_is_its_own_over_the_bank() -> None:
    method = methods.build(tiny(method=PUBLIC | {"temperature": 0.3}))
    z1, z2, bank = embeddings(5, 7, seed=1), embeddings(5, 7, seed=2), embeddings(4, 7, seed=3)
    losses = method.loss(z1, z2, cosines(z1, bank), cosines(z2, bank))
    for row, loss in enumerate(losses.tolist()):
        a, b = z1[row].tolist(), z2[row].tolist()
        share = math.exp(cosine(a, b) / 0.3)
        others = [sum(math.exp(cosine(view, negative) / 0.3) for negative in bank.tolist()) for view in (a, b)]
        assert loss == pytest.approx(sum(-math.log(share / (share + other)) for other in others) / 2, rel=1e-12)
        lightly = [with_bank(z1[row], z2[row], bank, 0.3), with_bank(z2[row], z1[row], bank, 0.3)]
        assert loss == pytest.approx(sum(lightly) / 2, rel=1e-12)


def test_mocos_contrast_is_algorithm_1_and_lightlys_bank_of_the_other_keys_times_two_temperatures() -> None:
    queries, keys, temperature = embeddings(5, 7, seed=1), embeddings(5, 7, seed=2), 0.2
    losses, lightly = [], []
    for row, query in enumerate(queries):
        shares = [math.exp(cosine(query.tolist(), key.tolist()) / temperature) for key in keys]
        losses.append(-2 * temperature * math.log(shares[row] / sum(shares)))
        others = torch.cat([keys[:row], keys[row + 1 :]])
        lightly.append(with_bank(query, keys[row], others, temperature))
    value = float(contrast(queries, keys, temperature))
    assert value == pytest.approx(sum(losses) / 5, rel=1e-12)
    # lightly's loss lacks the paper's factor, which keeps the gradient's size alike over temperatures.
    assert value == pytest.approx(2 * temperature * sum(lightly) / 5, rel=1e-12)


def test_moco_contrasts_a_views_queries_with_the_other_views_keys() -> None:
    method = methods.build(tiny(method={"name": "moco"}))
    q1, q2, k1, k2 = (embeddings(5, 7, seed=seed) for seed in range(4))
    assert isinstance(method, MoCo)
    assert torch.equal(method.loss(q1, q2, k1, k2), contrast(q1, k2, 0.2) + contrast(q2, k1, 0.2))


def test_all_rows_of_a_step_meet_the_same_negatives_and_steps_draw_their_own() -> None:
    method = methods.build(tiny(method=PUBLIC))
    drawn = [method.prepare(images(), generator(step))[2] for step in (0, 0, 1)]
    assert drawn[0].shape == (5, 4)
    assert len(set(drawn[0][0].tolist())) == 4
    assert (drawn[0] == drawn[0][0]).all()
    assert torch.equal(drawn[0], drawn[1])
    assert sorted(drawn[0][0].tolist()) != sorted(drawn[2][0].tolist())


def test_negatives_are_procedural_images_as_the_current_network_sees_them_without_gradient() -> None:
    config = tiny(method=PUBLIC)
    method = methods.build(config)
    assert isinstance(method, SimCLR)
    bank = torch.from_numpy(procedural_set(9, config.seed, config.data).images)
    assert torch.equal(method.bank, bank)
    view, drawn = images(), torch.tensor([[7, 2]]).expand(5, -1)
    with torch.no_grad():
        expected = method.project((bank[[7, 2]].float() / 255 - 0.5) / 0.25)
    found = method.negatives(drawn, view)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    with torch.no_grad():
        method.head[-1].weight.mul_(2)
    assert not torch.equal(method.negatives(drawn, view), expected)


def test_the_bank_has_the_size_of_the_views() -> None:
    method = methods.build(tiny(method=PUBLIC, data={"image_size": 32}))
    method.view_size = 16
    inputs = method.prepare(images(size=32), generator(0))
    assert inputs[0].shape[-1] == 16
    assert method(*inputs).shape == (5,)


def test_an_empty_batch_passes_with_public_negatives() -> None:
    method = methods.build(tiny(method=PUBLIC))
    assert method(*(rows[:0] for rows in method.prepare(images(), generator(0)))).shape == (0,)


def test_the_bank_stays_out_of_the_state() -> None:
    assert (
        methods.get_state(methods.build(tiny(method=PUBLIC))).keys()
        == methods.get_state(methods.build(tiny(method=PUBLIC | {"negatives": "batch"}))).keys()
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"backbone": {"norm": "batch"}}, "norm = .batch. mixes images"),
        ({"data": {"dimensions": 3, "spacing": [1.0, 1.0, 1.0]}}, "procedural images are flat"),
    ],
)
def test_public_negatives_are_refused_where_they_are_no_use(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"negatives = 'public'.*{reason}.*Take "):
        public_bank(tiny(method=PUBLIC, **changes), 9, "negatives", "negatives = 'batch'")


def test_a_bank_of_the_batchs_other_views_gives_nt_xent() -> None:
    z1, z2 = embeddings(2, 7, seed=1), embeddings(2, 7, seed=2)
    bank = torch.stack([z1[1], z2[1]])
    first = [info_nce(z, other, cosines(z, bank), 0.2)[0] for z, other in ((z1, z2), (z2, z1))]
    bank = torch.stack([z1[0], z2[0]])
    second = [info_nce(z, other, cosines(z, bank), 0.2)[1] for z, other in ((z1, z2), (z2, z1))]
    assert float(sum(first + second)) / 4 == pytest.approx(float(nt_xent(z1, z2, 0.2)), rel=1e-12)
