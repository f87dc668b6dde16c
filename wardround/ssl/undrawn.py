"""Modules built without drawing their random initial weights, where others are loaded at once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    """Leaves a tensor as it is where it would be filled by chance."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Return the tensor that is to be filled, or what the function gives."""
        kwargs = kwargs or {}
        return (args[0] if args else kwargs["tensor"]) if func in _DRAWS else func(*args, **kwargs)
