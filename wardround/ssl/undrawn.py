"""Modules built without drawing their random initial weights, where others are loaded at once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Of a ViT-B, a second. Constants are set all the same: some stay at a site, as the scales of batch normalisation may.
_DRAWS: set[Callable[..., Any]] = {
    Tensor.normal_,
    Tensor.uniform_,
    Tensor.erfinv_,  # timm's truncated normal, of uniform draws
    nn.init.normal_,
    nn.init.uniform_,
    nn.init.trunc_normal_,
    nn.init.kaiming_normal_,
    nn.init.kaiming_uniform_,
    nn.init.xavier_normal_,
    nn.init.xavier_uniform_,
}


class Undrawn(TorchFunctionMode):
    """Fills a tensor with zeros where it would be filled by chance: SparK computes with its network as it is built,
    and what memory happens to hold may be no number at all.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Return the tensor that is to be filled, or what the function gives."""
        kwargs = kwargs or {}
        if func not in _DRAWS:
            return func(*args, **kwargs)
        tensor: Tensor = args[0] if args else kwargs["tensor"]
        with torch.no_grad():
            return tensor.zero_()
