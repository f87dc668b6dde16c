"""Where torch's own kernel is a slow one on a CPU: what layers compute is replaced, layers stay themselves."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from wardround.backbones import onednn, pooling


def fast_layers(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context that computes linear layers and maximum pooling the faster way; on a GPU, one of nothing.

    A function of the processor alone, never of a measurement, so that a machine gives the same bits twice.
    """
    return _Faster() if device.type == "cpu" else contextlib.nullcontext()


class _Faster(TorchFunctionMode):
    """Sends F.linear to oneDNN where MKL is slow, F.max_pool2d through channels last."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and args and onednn.fits(args[0]):
            return onednn.linear(*args, **kwargs)
        if func is F.max_pool2d and pooling.fits(*args, **kwargs):
            return pooling.max_pool(*args, **kwargs)
        return func(*args, **kwargs)
