"""Layers computed the faster way on a CPU: the same bits, and layers that stay what they are."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from wardround.backbones import fast_layers, pooling

CPU = torch.device("cpu")


def maps(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return maps behind a ReLU, where many values of a window are equal."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu().to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d((3, 2), (2, 1), (1, 0)), nn.MaxPool2d(3, 2, ceil_mode=True)],
    ids=str,
)
def test_pooled_values_and_their_gradient_are_torchs_own_bits(pool: nn.MaxPool2d, dtype: torch.dtype) -> None:
    usual, fast = maps(3, 5, 9, 8, dtype=dtype), maps(3, 5, 9, 8, dtype=dtype)
    expected = pool(usual)
    with fast_layers(CPU):
        found = pool(fast)
    slope = torch.arange(expected.numel()).reshape(expected.shape).to(dtype)
    expected.backward(slope)
    found.backward(slope)
    assert torch.equal(found, expected) and found.is_contiguous()
    assert torch.equal(fast.grad, usual.grad) and fast.grad.any()


def test_a_value_that_is_no_number_is_passed_on() -> None:
    x = maps(1, 16, 4, 4).detach()
    x[0, 3, 1, 1] = float("nan")
    with fast_layers(CPU):
        assert max_pool2d(x, 2).isnan().sum() == 1


def test_what_does_not_fit_goes_the_usual_way() -> None:
    x = maps(2, 16, 8, 8).detach()
    side_by_side = x.contiguous(memory_format=torch.channels_last)
    assert pooling.fits(x, 2) and not pooling.fits(side_by_side, 2) and not pooling.fits(x[0], 2)
    with fast_layers(CPU):
        pooled, where = max_pool2d(x, 2, return_indices=True)
        assert torch.equal(max_pool2d(side_by_side, 2), pooled) and where.dtype == torch.int64
        assert torch.equal(max_pool2d(x[0], 2), pooled[0])


def test_a_step_of_a_resnet_has_the_same_bits_and_its_pooling_is_the_fast_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a network that pools another way would be left as slow as it was, and nobody would see."""
    calls = []
    monkeypatch.setattr(pooling, "max_pool", lambda *a, _real=pooling.max_pool, **k: calls.append(a) or _real(*a, **k))
    import timm

    net = timm.create_model("resnet10t", in_chans=1, num_classes=0)
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    gradients = []
    for context in (fast_layers(torch.device("meta")), fast_layers(CPU)):
        net.zero_grad()
        with context:
            out = net(images)
        out.sum().backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
    assert len(calls) == 1
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
