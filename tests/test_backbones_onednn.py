"""Linear layers by oneDNN: the same numbers and gradients, and layers that stay what they are."""

import pytest
import torch
from torch import nn

from wardround.backbones import fast_layers, onednn

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def mkl_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever processor runs the tests."""
    monkeypatch.setattr(onednn, "_mkl_is_slow", lambda: True)


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40)


@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_are_those_of_a_float64_loop(shape: tuple[int, ...], bias: bool, layer: nn.Linear) -> None:
    if not bias:
        layer.bias = None
    x = torch.randn(shape, requires_grad=True)
    with fast_layers(CPU):
        out = layer(x)
    slope = torch.randn(out.shape)
    (out * slope).sum().backward()
    exact, w, g = x.detach().double(), layer.weight.detach().double(), slope.double()
    rows, slopes = exact.reshape(-1, 24), g.reshape(-1, 40)
    value = torch.einsum("...i,oi->...o", exact, w) + (0 if layer.bias is None else layer.bias.detach().double())
    assert out.dtype == torch.float32
    assert torch.allclose(out.double(), value, rtol=0, atol=2e-6)
    assert torch.allclose(x.grad.double(), torch.einsum("...o,oi->...i", g, w), rtol=0, atol=5e-6)
    assert torch.allclose(layer.weight.grad.double(), torch.einsum("no,ni->oi", slopes, rows), rtol=0, atol=1e-5)
    if layer.bias is not None:
        assert torch.allclose(layer.bias.grad.double(), slopes.sum(0), rtol=0, atol=1e-5)


def test_other_precisions_and_empty_batches_go_the_usual_way(layer: nn.Linear) -> None:
    with fast_layers(CPU):
        assert layer(torch.zeros(0, 24)).shape == (0, 40)
        assert layer.double()(torch.zeros(2, 24).double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.float()(torch.zeros(2, 24)).dtype == torch.bfloat16


def test_a_frozen_layer_and_a_first_layer_get_no_gradient_that_nobody_asked_for(layer: nn.Linear) -> None:
    layer.requires_grad_(False)
    x = torch.randn(3, 24, requires_grad=True)
    with fast_layers(CPU):
        layer(x).sum().backward()
    assert layer.weight.grad is None
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(3, -1), atol=1e-5)


def test_layers_are_untouched_and_the_context_ends(layer: nn.Linear) -> None:
    x = torch.randn(3, 24)
    before = layer(x)
    with fast_layers(CPU):
        assert type(layer) is nn.Linear
        inside = layer(x)
    assert torch.allclose(inside, before, atol=1e-6)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_product_is_that_of_a_linear_layer_in_any_precision(dtype: torch.dtype) -> None:
    x, weight = (torch.randn(size, 24, generator=torch.Generator().manual_seed(size)).to(dtype) for size in (7, 5))
    expected = x.double() @ weight.double().T
    assert onednn.product(x, weight).dtype == dtype
    assert torch.allclose(onednn.product(x, weight).double(), expected, rtol=0.02 if dtype == torch.bfloat16 else 1e-5)
