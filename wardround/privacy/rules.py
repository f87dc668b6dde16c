"""The gradient of each privacy unit, layer by layer: its norm, and weighted sums of it.

Book-keeping (Bu et al. 2022, arXiv:2210.00038): from what went into a layer, A, and the gradient of what
came out, G, a unit's gradient is A^T G over its rows. Its norm is taken without it where that is cheaper:
|A^T G|^2 = sum of (A A^T) * (G G^T), equation (2), the "ghost" norm (Goodfellow 2015, arXiv:1510.01799; Li et al. 2022,
arXiv:2110.05679). Else it is instantiated, kept, and weighted later.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wardround.privacy.capture import Call
from wardround.privacy.grouping import Grouping

_CHUNK = 2**23  # numbers made at once while norms are taken
# A ghost norm is a sum of products of inner products, whose rounding errors may exceed what is left after they
# cancel. Adding a multiple of the largest error there can be keeps the norm from being understated.
_MARGIN = 16.0


@dataclass(frozen=True)
class Term:
    """The gradients of one parameter: `squares` [U] of their norms, and `total`: weights [U] -> their sum."""

    parameter: nn.Parameter
    squares: Tensor
    total: Callable[[Tensor], Tensor]


Found = list[tuple[Call, int]]  # all calls of one layer, each with its `inner` (see Grouping)


def terms(calls: Found, group: Grouping) -> Iterator[Term]:
    """Yield the term of each parameter of a layer."""
    kind = calls[0][0].kind
    for call, _ in calls:
        if call.inputs is not None and call.inputs._version != call.version:
            raise AssertionError("the input of a layer was overwritten before its gradient was taken")
    yield from _RULES[kind](calls, group)


def _dense(calls: Found, group: Grouping) -> Iterator[Term]:
    """Linear layers and convolutions: A [U, H, S, D] and G [U, H, S, P], H groups of a convolution."""
    call, weight = calls[0][0], calls[0][0].weight
    if call.bias is not None:
        yield _kept(call.bias, sum(group.summed(_over_places(c), inner) for c, inner in calls))  # type: ignore[arg-type]
    if weight is None:
        return
    groups = call.settings.get("groups", 1)
    positions = sum(_positions(c) * len(_gradient(c)) for c, _ in calls) // group.images * group.most
    d, p = weight[0].numel(), weight.shape[0] // groups
    if any(c.derived for c, _ in calls):
        yield _kept(weight, _sum([_through(c, _each([(c, inner)], group, positions * d)) for c, inner in calls]))
    elif positions * (d + p) < d * p:
        squares = torch.cat([_ghost(a, g) for a, g in _chunks(calls, group, positions**2)])
        yield Term(weight, squares, lambda weights: _weighted(calls, weights, group))
    else:
        yield _kept(weight, _each(calls, group, positions * d))


def _each(calls: Found, group: Grouping, numbers: int) -> Tensor:
    """Return the units' gradients of a dense layer: [U, H, P, D]."""
    return torch.cat([g.transpose(-1, -2) @ a for a, g in _chunks(calls, group, numbers)])


def _chunks(calls: Found, group: Grouping, numbers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield A and G of some units at a time, in float32 at least, so that `numbers` a unit stay in bounds."""
    at_once = max(1, _CHUNK // max(1, numbers))
    parts = [(c, group.by_unit(_inputs(c), inner), group.by_unit(_gradient(c), inner)) for c, inner in calls]
    for first in range(0, group.count, at_once):
        some = slice(first, first + at_once)
        pairs = [_unfolded(c, a[some], g[some]) for c, a, g in parts]
        yield (
            pairs[0] if len(pairs) == 1 else (torch.cat([a for a, _ in pairs], 2), torch.cat([g for _, g in pairs], 2))
        )


def _unfolded(call: Call, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's A [U, H, S, D] and G [U, H, S, P] from [U, R, ...] of both."""
    a, g = _wide(a), _wide(g)
    if call.kind == "linear":
        return a.reshape(len(a), 1, -1, a.shape[-1]), g.reshape(len(g), 1, -1, g.shape[-1])
    groups, kernel = call.settings["groups"], call.weight.shape[2:]  # type: ignore[union-attr]
    units, rows = a.shape[:2]
    patches = _patches(a.flatten(0, 1), kernel, call)  # [U * R, C * K, L]
    a = patches.view(units, rows, groups, -1, patches.shape[-1]).permute(0, 2, 1, 4, 3).flatten(2, 3)
    g = g.reshape(units, rows, groups, g.shape[2] // groups, -1).permute(0, 2, 1, 4, 3).flatten(2, 3)
    return a, g


def _patches(x: Tensor, kernel: tuple[int, ...], call: Call) -> Tensor:
    """Return what each position of a convolution sees: [N, C, *size] -> [N, C * K, L]."""
    stride, padding, dilation = (call.settings[key] for key in ("stride", "padding", "dilation"))
    if len(kernel) == 2:
        return F.unfold(x, kernel, dilation, padding, stride)
    x = F.pad(x, [edge for axis in reversed(padding) for edge in (axis, axis)])
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]
    axes = len(kernel)
    x = x.permute(0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))
    return x.reshape(len(x), -1, prod(x.shape[-axes:]))


def _ghost(a: Tensor, g: Tensor) -> Tensor:
    """Return each unit's squared norm, [U], not below the true one: [U, H, S, D] and [U, H, S, P]."""
    of_a, of_g = a @ a.transpose(-1, -2), g @ g.transpose(-1, -2)
    lengths = (of_a.diagonal(dim1=-2, dim2=-1) * of_g.diagonal(dim1=-2, dim2=-1)).sqrt()
    error = _MARGIN * torch.finfo(a.dtype).eps * lengths.sum(-1).square()
    return (of_a.mul_(of_g).sum((-1, -2)) + error).sum(1).clamp(min=0)


def _weighted(calls: Found, weights: Tensor, group: Grouping) -> Tensor:
    """Return the sum of the units' gradients, each times its weight, by one product a call."""
    return sum((_product(call, weights, inner, group) for call, inner in calls), start=torch.zeros(()))


def _product(call: Call, weights: Tensor, inner: int, group: Grouping) -> Tensor:
    assert call.weight is not None
    share = group.of_rows(weights, len(_gradient(call)), inner)
    scaled = _silenced(_wide(_gradient(call)), share) * _broadcast(share, _gradient(call))
    inputs = _silenced(_wide(_inputs(call)), share)
    if call.kind == "linear":
        scaled, inputs = scaled.reshape(-1, scaled.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
        return F.linear(scaled.t(), inputs.t())
    settings, axes = call.settings, inputs.ndim - 2
    _, total, _ = torch.ops.aten.convolution_backward(
        scaled, inputs, call.weight.to(inputs.dtype), None, settings["stride"], settings["padding"],
        settings["dilation"], False, [0] * axes, settings["groups"], [False, True, False],
    )  # fmt: skip
    return total  # type: ignore[no-any-return]


def _silenced(rows: Tensor, share: Tensor) -> Tensor:
    """Return rows with zeros where their unit has no weight: zero times infinity would be no number."""
    return rows if bool((share > 0).all()) else rows.where(_broadcast(share, rows) > 0, 0.0)


def _layer_norm(calls: Found, group: Grouping) -> Iterator[Term]:
    """Scale: the sum over positions of G * x^, x^ the normalised input; shift: of G."""

    def scaled(call: Call) -> Tensor:
        shape = call.settings["shape"]
        return _gradient(call) * F.layer_norm(_wide(_inputs(call)), shape, eps=call.settings["eps"])

    yield from _affine(calls, group, scaled, lambda call, x: _over(x, 1, x.ndim - len(call.settings["shape"])))


def _group_norm(calls: Found, group: Grouping) -> Iterator[Term]:
    """As layer normalisation, over the positions of each channel."""

    def scaled(call: Call) -> Tensor:
        return _gradient(call) * F.group_norm(_wide(_inputs(call)), call.settings["groups"], eps=call.settings["eps"])

    yield from _affine(calls, group, scaled, lambda call, x: _over(x, 2, x.ndim))


def _affine(
    calls: Found, group: Grouping, scaled: Callable[[Call], Tensor], over_places: Callable[[Call, Tensor], Tensor]
) -> Iterator[Term]:
    call = calls[0][0]
    if call.weight is not None:
        yield _kept(call.weight, _sum(group.summed(over_places(c, scaled(c)), inner) for c, inner in calls))
    if call.bias is not None:
        yield _kept(call.bias, _sum(group.summed(over_places(c, _wide(_gradient(c))), inner) for c, inner in calls))


def _elementwise(calls: Found, group: Grouping) -> Iterator[Term]:
    """A parameter added to rows, or multiplied with them, after it was broadcast."""
    parts = []
    for call, inner in calls:
        product = _wide(_gradient(call))
        if call.inputs is not None:
            product = product * call.inputs
        shape = (1,) * (product.ndim - len(call.settings["shape"])) + call.settings["shape"]
        if shape[0] != 1:
            raise AssertionError("a parameter with a value a row has no gradient of one image")
        repeated = [axis for axis in range(1, product.ndim) if shape[axis] == 1]
        parts.append(_through(call, group.summed(product.sum(repeated, keepdim=True) if repeated else product, inner)))
    weight = calls[0][0].weight
    assert weight is not None
    yield _kept(weight, _sum(parts))


def _embedding(calls: Found, group: Grouping) -> Iterator[Term]:
    """Rows of a table: two positions of a unit meet where they have the same index."""
    weight = calls[0][0].weight
    assert weight is not None
    ids = torch.cat([group.by_unit(_inputs(c) + 1, inner).flatten(1) for c, inner in calls], 1)  # 0: padding
    g = torch.cat([_wide(group.by_unit(_gradient(c), inner)).flatten(1, -2) for c, inner in calls], 1)
    same = (ids.unsqueeze(1) == ids.unsqueeze(2)) & (ids > 0).unsqueeze(1)
    squares = (g @ g.transpose(1, 2) * same).sum((1, 2)).clamp(min=0)

    def total(weights: Tensor) -> Tensor:
        rows = g.where((weights > 0)[:, None, None], 0.0) * weights[:, None, None]
        table = g.new_zeros(len(weight) + 1, g.shape[-1])
        return table.index_add_(0, ids.flatten(), rows.flatten(0, 1))[1:]

    yield Term(weight, squares, total)


def _through(call: Call, each: Tensor) -> Tensor:
    """Return the units' gradients of a parameter from those of what was made of it: [U, ...] -> [U, *parameter]."""
    assert call.weight is not None
    if call.derived is None:
        return each.reshape(len(each), *call.weight.shape)
    made, leaf = call.derived.graph, call.derived.leaf
    each = each.reshape(len(each), *made.shape).to(made.dtype)
    return torch.autograd.grad(made, leaf, each, retain_graph=True, is_grads_batched=True)[0]


def _kept(parameter: nn.Parameter, each: Tensor) -> Term:
    """Return the term of a parameter whose gradients are kept: [U, ...]."""
    flat = each.flatten(1)

    def total(weights: Tensor) -> Tensor:
        good = flat if bool((weights > 0).all()) else flat.where((weights > 0).unsqueeze(1), 0.0)
        return (weights @ good).view(parameter.shape)

    return Term(parameter, flat.square().sum(1), total)


def _over_places(call: Call) -> Tensor:
    """Return the sum of a dense layer's output gradient over its positions: [R, P]."""
    g = _wide(_gradient(call))
    return _over(g, 1, g.ndim - 1) if call.kind == "linear" else _over(g, 2, g.ndim)


def _over(x: Tensor, first: int, end: int) -> Tensor:
    """Return the sum over the axes from `first` to before `end`."""
    return x.sum(tuple(range(first, end))) if first < end else x


def _positions(call: Call) -> int:
    """Return how many positions a row of a dense layer's output has."""
    shape = _gradient(call).shape
    return prod(shape[1:-1]) if call.kind == "linear" else prod(shape[2:])


def _inputs(call: Call) -> Tensor:
    assert call.inputs is not None
    return call.inputs


def _gradient(call: Call) -> Tensor:
    assert call.gradient is not None
    return call.gradient


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _broadcast(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (like.ndim - 1))


def _sum(parts: "Iterator[Tensor] | list[Tensor]") -> Tensor:
    first, *others = parts
    return sum(others, start=first)


_RULES: dict[str, Callable[[Found, Grouping], Iterator[Term]]] = {
    "linear": _dense,
    "conv": _dense,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "add": _elementwise,
    "mul": _elementwise,
    "embedding": _embedding,
}
