"""float32 matrix products of linear layers by oneDNN, where torch would take MKL and MKL is slow.

On processors that are not Intel's, MKL stays with AVX2; oneDNN, which torch carries for convolutions
and bfloat16, uses AVX-512 there and is about twice as fast at the same precision. Layers stay
`nn.Linear`; only what `F.linear` computes is replaced, inside `fast_layers`.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return F.linear of what `fits`: [..., I], [O, I], [O] -> [..., O]."""
    out: Tensor = _Linear.apply(x, weight, bias)
    return out


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T as `fast_layers` would compute it, without a gradient: [..., I], [O, I] -> [..., O]."""
    return _product(x, weight, None) if fits(x) else F.linear(x, weight)


class _Linear(torch.autograd.Function):
    """y = x W^T + b and its gradient, each product by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., I], [O, I], [O] -> [..., O]"""
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """[..., O] -> [..., I], [O, I], [O]; only what is asked for is computed."""
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = (*ctx.needs_input_grad, False)[:3]
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            _product(grad, weight.t(), None) if for_x else None,
            _product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )[: len(ctx.needs_input_grad)]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def fits(x: Tensor) -> bool:
    """Return whether oneDNN takes this input, and faster: not under autocast, which would have chosen the precision."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
        and _mkl_is_slow()
    )


@cache
def _mkl_is_slow() -> bool:
    """Return whether this is a processor with AVX-512 on which MKL does not use it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch._C.has_mkl:
        return False
    cpu = Path("/proc/cpuinfo")  # the vendor's name stands nowhere else
    return cpu.exists() and "AuthenticAMD" in cpu.read_text(encoding="utf-8")
