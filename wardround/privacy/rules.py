"""The gradient of each privacy unit, layer by layer: its norm, and weighted sums of it.

Book-keeping (Bu et al. 2022, arXiv:2210.00038): from what went into a layer, A, and the gradient of what
came out, G, a unit's gradient is A^T G over its rows. Its norm is taken without it where that is cheaper:
|A^T G|^2 = sum of (A A^T) * (G G^T), equation (2), the "ghost" norm (Goodfellow 2015, arXiv:1510.01799; Li et al. 2022,
arXiv:2110.05679). Else it is instantiated, kept, and weighted later.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wardround.backbones import product
from wardround.privacy.capture import Call
from wardround.privacy.grouping import Grouping

_CHUNK = 2**22  # inner products at once while norms are taken
_LARGE = 3 * 2**19  # products in a matrix product that is taken by itself on a CPU (benchmarks/LOG.md)
# A ghost norm is a sum of products of inner products, whose rounding errors may exceed what is left after they
# cancel. Adding a multiple of the largest error there can be keeps the norm from being understated. And inputs may be
# so small that their squares are zero, though a steep gradient makes something of them: each term of an inner product
# may lose as much as the smallest normal number, which is added too.
_MARGIN = 16.0


@dataclass(frozen=True)
class Term:
    """The gradients of one parameter: `squares` [U] of their norms, and what weighs them."""

    parameter: nn.Parameter
    squares: Tensor
    weighted: Callable[[Tensor, bool], Tensor]  # the second: whether all weights are above zero

    def total(self, weights: Tensor) -> Tensor:
        """Return the sum of the gradients, each times its weight [U]; one of weight zero may be infinite."""
        return self.weighted(weights, bool((weights > 0).all()))


Found = list[tuple[Call, int]]  # all calls of one layer, each with its `inner` (see Grouping)


def terms(calls: Found, group: Grouping) -> Iterator[Term]:
    """Yield the term of each parameter of a layer."""
    kind = calls[0][0].kind
    for call, _ in calls:
        if call.inputs is not None and call.inputs._version != call.version:
            raise AssertionError("the input of a layer was overwritten before its gradient was taken")
    yield from _RULES[kind](calls, group)


def _dense(calls: Found, group: Grouping) -> Iterator[Term]:
    """Linear layers and convolutions: N positions of C inputs a unit, S of P outputs.

    Unit gradients are kept where they are smaller than A and G. Elsewhere the norm is the ghost's, or where
    strides make that dear, that of gradients which are then dropped.
    """
    call, weight = calls[0][0], calls[0][0].weight
    if call.bias is not None:
        yield _kept(call.bias, _sum(group.summed(_over_places(c), inner) for c, inner in calls))
    if weight is None:
        return
    a, g = (sum(x(c).numel() for c, _ in calls) // group.count for x in (_inputs, _gradient))
    n, s = a // _channels(call, _inputs(call)), g // _channels(call, _gradient(call))
    if any(c.derived for c, _ in calls):
        yield _kept(weight, _sum(_through(c, _each(c, group, inner)) for c, inner in calls))
    elif weight.numel() <= a + g:
        yield _kept(weight, _sum(_each(c, group, inner) for c, inner in calls))
    else:
        ghost = n * a + s * g < s * weight.numel()
        squares = _ghost(calls, group) if ghost else _squares(_sum(_each(c, group, inner) for c, inner in calls))
        yield Term(weight, squares, partial(_weighted, calls, group))


def _each(call: Call, group: Grouping, inner: int) -> Tensor:
    """Return the units' gradients of a dense layer's weight: [U, *weight]."""
    inputs, gradient = _wide(_inputs(call)), _wide(_gradient(call))
    if call.kind == "linear":
        a, g = (group.by_unit(x, inner).flatten(1, -2) for x in (inputs, gradient))
        return _products(g.mT, a.mT)
    # One after the other: on a CPU 2 to 5 times as fast as a batched product of what the positions see.
    pairs = zip(group.each_unit(inputs, inner), group.each_unit(gradient, inner), strict=True)
    return torch.stack([_of_convolution(call, a, g) for a, g in pairs])


def _of_convolution(call: Call, inputs: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of a convolution's weight."""
    assert call.weight is not None
    settings = call.settings
    _, total, _ = torch.ops.aten.convolution_backward(
        gradient, inputs, call.weight.to(inputs.dtype), None, settings["stride"], settings["padding"],
        settings["dilation"], False, [0] * (inputs.ndim - 2), settings["groups"], [False, True, False],
    )  # fmt: skip
    return total  # type: ignore[no-any-return]


def _ghost(calls: Found, group: Grouping) -> Tensor:
    """Return each unit's squared norm, [U], not below the true one."""
    parts = [
        (c, _matrices(c, _inputs(c), group, inner), _matrices(c, _gradient(c), group, inner)) for c, inner in calls
    ]
    stack, positions = len(parts[0][1]), sum(a.shape[1] for _, a, _ in parts)
    at_once = max(1, _CHUNK // positions**2)
    some = (slice(first, first + at_once) for first in range(0, stack, at_once))
    return torch.cat([_ghost_of([(c, a[at], g[at]) for c, a, g in parts]) for at in some]).view(group.count, -1).sum(1)


def _ghost_of(parts: list[tuple[Call, Tensor, Tensor]]) -> Tensor:
    """Return squared norms, [M]: calls with A [M, N, D] and G [M, S, P]."""
    squares, of_both, of_inputs, of_outputs = [], [], [], []
    for place, (call, a, g) in enumerate(parts):
        for earlier, (other, b, h) in enumerate(parts[: place + 1]):
            of_a, of_g = _seen(call, other, _products(a, b)), _products(g, h)
            squares.append((of_a * of_g).sum((1, 2)).mul(1 if earlier == place else 2))
        long, steep = (x.diagonal(dim1=1, dim2=2).clamp(min=0) for x in (of_a, of_g))
        of_both.append((long * steep).sqrt().sum(1))
        of_inputs.append(long.sqrt().sum(1))
        of_outputs.append(steep.sqrt().sum(1))
    assert call.weight is not None
    number, (outs, ins) = torch.finfo(of_a.dtype), call.weight.flatten(1).shape  # an inner product's terms, at most
    error = _MARGIN * number.eps * _sum(of_both).square()
    for terms_of_one, lengths in ((ins, of_outputs), (outs, of_inputs)):
        error += (sqrt(terms_of_one * number.tiny) * _sum(lengths)).square()
    return (_sum(squares) + error).clamp(min=0)


def _matrices(call: Call, x: Tensor, group: Grouping, inner: int) -> Tensor:
    """Return the positions of each unit, and of each group of a convolution, as rows: [M, N, C]."""
    x = _wide(group.by_unit(x, inner))
    if call.kind == "linear":
        return x.flatten(1, -2)
    x = x.reshape(*x.shape[:2], call.settings["groups"], x.shape[2] // call.settings["groups"], -1)
    return x.permute(0, 2, 3, 1, 4).flatten(3).flatten(0, 1).mT


def _seen(call: Call, other: Call, products: Tensor) -> Tensor:
    """Return the inner products of what positions of the output see, from those of the input's: -> [M, S, S'].

    What two positions of a convolution see has the inner product of the inputs under the kernel's first place,
    plus that under its second, and so on, one axis after the other. So nothing is unfolded.
    """
    if call.kind == "linear":
        return products
    assert call.weight is not None
    kernel = call.weight.shape[2:]
    (mine, went_in), (theirs, others_in) = ((_gradient(c).shape[2:], _inputs(c).shape[2:]) for c in (call, other))
    rows = [n // prod(size) for n, size in zip(products.shape[1:], (went_in, others_in), strict=True)]
    products = products.view(-1, rows[0], *went_in, rows[1], *others_in)
    edges = [edge for pad in reversed(call.settings["padding"]) for edge in (pad, pad)]
    if any(edges):
        products = F.pad(products, [*edges, 0, 0, *edges])
    for axis, places in enumerate(kernel):
        step, gap = call.settings["stride"][axis], call.settings["dilation"][axis]
        here, there = 2 + axis, 3 + len(kernel) + axis
        products = _sum(
            _every(_every(products, here, first * gap, step, mine[axis]), there, first * gap, step, theirs[axis])
            for first in range(places)
        )
    return products.flatten(2 + len(kernel)).flatten(1, 1 + len(kernel))


def _every(x: Tensor, axis: int, first: int, step: int, count: int) -> Tensor:
    """Return `count` places along an axis, `step` apart."""
    return x[(slice(None),) * axis + (slice(first, first + (count - 1) * step + 1, step),)]


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T of each of a stack of matrices: [M, N, C], [M, N', C] -> [M, N, N']."""
    if a.device.type == "cpu" and a.shape[1] * a.shape[2] * b.shape[1] >= _LARGE:
        return torch.stack([product(x, y) for x, y in zip(a, b, strict=True)])
    return torch.bmm(a, b.mT)


def _weighted(calls: Found, group: Grouping, weights: Tensor, every: bool) -> Tensor:
    """Return the sum of the units' gradients, each times its weight, by one product a call."""
    return _sum(_product(call, group.of_rows(weights, len(_gradient(call)), inner), every) for call, inner in calls)


def _product(call: Call, share: Tensor, every: bool) -> Tensor:
    inputs, gradient = (_wide(x) if every else _silenced(_wide(x), share) for x in (_inputs(call), _gradient(call)))
    gradient = gradient * _broadcast(share, gradient)
    if call.kind == "linear":
        return product(gradient.flatten(0, -2).t(), inputs.flatten(0, -2).t())
    return _of_convolution(call, inputs, gradient)


def _silenced(rows: Tensor, share: Tensor) -> Tensor:
    """Return rows with zeros where their unit has no weight: zero times infinity would be no number."""
    return rows.where(_broadcast(share, rows) > 0, 0.0)


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
    lengths = g.norm(dim=-1)
    error = _MARGIN * torch.finfo(g.dtype).eps * (lengths.unsqueeze(1) * lengths.unsqueeze(2) * same).sum((1, 2))
    squares = ((g @ g.mT * same).sum((1, 2)) + error).clamp(min=0)

    def total(weights: Tensor, every: bool) -> Tensor:
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

    def total(weights: Tensor, every: bool) -> Tensor:
        return (weights @ (flat if every else _silenced(flat, weights))).view(parameter.shape)

    return Term(parameter, _squares(flat), total)


def _squares(each: Tensor) -> Tensor:
    """Return the units' squared norms: [U, ...] -> [U]."""
    return each.flatten(1).square().sum(1)


def _over_places(call: Call) -> Tensor:
    """Return the sum of a dense layer's output gradient over its positions: [R, P]."""
    g = _wide(_gradient(call))
    return _over(g, 1, g.ndim - 1) if call.kind == "linear" else _over(g, 2, g.ndim)


def _over(x: Tensor, first: int, end: int) -> Tensor:
    """Return the sum over the axes from `first` to before `end`."""
    return x.sum(tuple(range(first, end))) if first < end else x


def _channels(call: Call, x: Tensor) -> int:
    """Return how many numbers a dense layer has at a position."""
    return x.shape[-1 if call.kind == "linear" else 1]


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
