"""What a forward pass does with its parameters, call by call, watched at torch's own functions.

Hooks on layers would miss a parameter that is used outside its layer, and would have to know each
subclass. Here every function of torch that meets a trainable parameter either has a rule or is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from wardround.errors import ConfigError

_SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__}
_IN_PLACE = {Tensor.mul_, Tensor.__imul__}
_MATRIX = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


@dataclass(frozen=True)
class Derived:
    """What was made of one parameter alone, such as its shape changed, its rows normalised or gathered."""

    parameter: nn.Parameter
    leaf: Tensor  # stands for the parameter in the graph
    graph: Tensor  # what was made, with its graph


@dataclass
class Call:
    """One use of a layer's parameters: what went in, and after the backward pass the gradient of what came out."""

    kind: str  # linear, conv, layer_norm, group_norm, embedding, add, mul
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    inputs: Tensor | None  # None where the gradient does not depend on them
    settings: Mapping[str, Any] = field(default_factory=dict)
    version: int = 0  # of `inputs`, which must not have been written to since
    gradient: Tensor | None = None
    derived: Derived | None = None  # where `weight` was not used as it is


class Capture(TorchFunctionMode):
    """Inside, parameters are frozen, and each call that meets one is kept for its gradient.

    `arrived` is called in the backward pass, as soon as a call has its gradient.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], arrived: Callable[[Call], None]) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.parameters = parameters
        self.arrived = arrived
        self.calls: list[Call] = []
        self._derived: dict[int, tuple[Derived, Tensor]] = {}  # by id; the tensor is kept so that the id stays
        self._anchor = torch.zeros((), requires_grad=True)

    def __enter__(self) -> "Capture":
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._meets_ours((*args, *kwargs.values())) or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func in _RULES:
            return self._keep(func, _RULES[func](*args, **kwargs), args, kwargs)
        tensors = [value for value in _flat((*args, *kwargs.values())) if isinstance(value, Tensor)]
        rows = [value for value in tensors if value.is_floating_point() and not self._is_ours(value)]
        if not rows:
            return self._derive(func, args, kwargs)
        if len(tensors) == 2 and func in _SUMS | _PRODUCTS | _MATRIX and _has_two_operands(args, kwargs):
            return self._keep(func, self._binary(func, *args), args, kwargs)
        raise self._no_rule(func, tensors)

    def _meets_ours(self, values: Sequence[Any]) -> bool:
        for value in values:  # no generator: this runs at every function of torch
            if self._meets_ours(value) if isinstance(value, list | tuple) else self._is_ours(value):
                return True
        return False

    def _is_ours(self, value: Any) -> bool:
        return id(value) in self.names or id(value) in self._derived

    def _known(self, value: Tensor) -> Derived:
        if id(value) in self._derived:
            return self._derived[id(value)][0]
        assert isinstance(value, nn.Parameter)
        leaf = value.detach().requires_grad_()
        return Derived(value, leaf, leaf)

    def _derive(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what a function makes of one parameter, and remember how."""
        ours = [value for value in _flat((*args, *kwargs.values())) if self._is_ours(value)]
        known = self._known(ours[0])
        if any(value is not ours[0] for value in ours) or not any(value is ours[0] for value in args):
            raise self._no_rule(func, ours)
        graph = func(*(known.graph if value is ours[0] else value for value in args), **kwargs)
        if not isinstance(graph, Tensor) or not graph.requires_grad or graph is known.graph:
            return func(*args, **kwargs)  # a shape, an index, or the parameter itself
        made = graph.detach()
        self._derived[id(made)] = (Derived(known.parameter, known.leaf, graph), made)
        return made

    def _binary(self, func: Any, left: Any, right: Any) -> Call:
        """Return the call of a sum or product of something with rows and something of ours."""
        mine, other = (left, right) if self._is_ours(left) else (right, left)
        known = self._known(mine)
        settings = {"shape": tuple(mine.shape)}
        if func in _MATRIX:
            if mine is left or mine.ndim != 2:
                raise self._no_rule(func, [mine])
            known = Derived(known.parameter, known.leaf, known.graph.t())
            return Call("linear", known.parameter, None, other, settings, derived=known)
        used = None if mine is known.parameter else known
        if func in _SUMS:
            return Call("add", known.parameter, None, None, settings, derived=used)
        factor = other.clone() if func in _IN_PLACE else other  # which the product then stands in place of
        return Call("mul", known.parameter, None, factor, settings, derived=used)

    def _keep(self, func: Any, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        for name in ("weight", "bias"):
            value = getattr(call, name)
            if value is not None and id(value) in self._derived and name == "weight":
                call.derived = self._known(value)
                call.weight = call.derived.parameter
            elif value is not None and id(value) not in self.names:
                raise self._no_rule(func, [v for v in (call.weight, call.bias) if v is not None and self._is_ours(v)])
        if call.inputs is not None:
            call.inputs = call.inputs.detach()
            call.version = call.inputs._version
        out: Tensor = func(*args, **kwargs)
        if not out.requires_grad:
            out = out + self._anchor.to(out.device)  # no leaf: what comes next may write to it in place
        self.calls.append(call)

        def arrive(gradient: Tensor) -> None:
            call.gradient = gradient
            self.arrived(call)

        out.register_hook(arrive)  # type: ignore[no-untyped-call]
        return out

    def _no_rule(self, func: Any, ours: Sequence[Tensor]) -> ConfigError:
        name = next(self.names[id(self._known(value).parameter)] for value in ours if self._is_ours(value))
        return ConfigError(
            f"[privacy] engine = 'bookkeeping': there is no rule for '{name}' in {resolve_name(func) or func}. "
            "Take engine = 'opacus', which is slower, or another backbone or method."
        )


def _flat(values: Sequence[Any]) -> list[Any]:
    return [inner for value in values for inner in (value if isinstance(value, list | tuple) else [value])]


def _has_two_operands(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a sum or product has its two operands and nothing else, such as `alpha`."""
    return len(args) == 2 and not kwargs and all(isinstance(value, Tensor) and value.ndim for value in args)


def _linear(x: Tensor, weight: Any, bias: Any = None) -> Call:
    return Call("linear", weight, bias, x)


def _conv(
    x: Tensor, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Call:
    if isinstance(padding, str):
        raise ConfigError(f"[privacy]: a convolution with padding = '{padding}' has no rule; take another backbone.")
    axes = x.ndim - 2
    wide = [(value,) * axes if isinstance(value, int) else tuple(value) for value in (stride, padding, dilation)]
    return Call("conv", weight, bias, x, dict(zip(("stride", "padding", "dilation"), wide, strict=True), groups=groups))


def _layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Call:
    return Call("layer_norm", weight, bias, x, {"shape": tuple(shape), "eps": eps})


def _group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Call:
    return Call("group_norm", weight, bias, x, {"groups": groups, "eps": eps})


def _embedding(
    ids: Tensor,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call:
    if padding_idx is not None or max_norm is not None or scale_grad_by_freq or sparse:
        raise ConfigError("[privacy]: an embedding with options has no rule; take another backbone.")
    return Call("embedding", weight, None, ids)


_RULES: dict[Any, Callable[..., Call]] = {
    F.linear: _linear,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.embedding: _embedding,
}
