"""Maximum pooling as torch computes it where channels lie side by side: the same bits, two to three times as fast.

torch's kernel for the usual layout goes position by position; the one for channels last takes the channels of a
position at once. Both take the first of equal values. The way back is the usual layout's, which is the faster one.
"""

from typing import Any

import torch
from torch import Tensor


def max_pool(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """Return F.max_pool2d of a batch of maps in torch's usual layout, whose indices nobody asks for: see `fits`."""
    assert not return_indices
    pooled: Tensor = _MaxPool.apply(x, (kernel_size, stride or kernel_size, padding, dilation, ceil_mode))
    return pooled


def fits(x: Tensor, *_: Any, return_indices: bool = False, **__: Any) -> bool:
    """Return whether `max_pool` takes what F.max_pool2d was given: [B, C, H, W] on the CPU, in the usual layout."""
    return x.device.type == "cpu" and x.ndim == 4 and x.is_contiguous() and not return_indices


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple[Any, ...]) -> Tensor:
        """[B, C, H, W] -> [B, C, h, w]; window: kernel, stride, padding, dilation, ceil_mode."""
        side_by_side = x.contiguous(memory_format=torch.channels_last)
        out, where = torch.ops.aten.max_pool2d_with_indices(side_by_side, *_pairs(window))
        ctx.window = window
        ctx.save_for_backward(x, where.contiguous())
        pooled: Tensor = out.contiguous()
        return pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """[B, C, h, w] -> [B, C, H, W]"""
        x, where = ctx.saved_tensors
        back = torch.ops.aten.max_pool2d_with_indices_backward
        return back(grad.contiguous(), x, *_pairs(ctx.window), where), None


def _pairs(window: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a window with both edges of each of its sizes, as the operator wants them."""
    *sizes, ceil_mode = window
    return *([size, size] if isinstance(size, int) else list(size) for size in sizes), ceil_mode
