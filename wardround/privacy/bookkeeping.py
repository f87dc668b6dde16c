"""The clipped sum of the units' gradients by book-keeping: one forward pass, one backward pass without weights."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from wardround.errors import ConfigError
from wardround.privacy.capture import Call, Capture
from wardround.privacy.grouping import Grouping
from wardround.privacy.method import Decomposing, trained
from wardround.privacy.rules import Term, terms

Layer = tuple[int, int]  # ids of weight and bias


@dataclass(frozen=True)
class Clipped:
    """What one part of a batch adds: sums by parameter name, and each image's loss, for the site's own eyes."""

    sums: dict[str, Tensor]
    losses: Tensor  # [B]


def clipped_sum(
    method: Decomposing, inputs: tuple[Tensor, ...], group: Grouping, clip: float, inner: list[int]
) -> Clipped:
    """Return the sum over units of the gradient of their mean loss, each scaled down to a norm of `clip` at most.

    inner: rows of an image that follow each other, call by call (see rows.rows_of_calls). A unit whose
    gradient is not finite adds zero.
    """
    losses, found = unit_terms(method, inputs, group, inner)
    squares = torch.stack([term.squares for term in found]).double().sum(0)
    return Clipped(weigh(method, _taken_from(found), weights(squares, clip)), losses)


def _taken_from(found: list[Term]) -> Iterator[Term]:
    """Yield the terms and forget them, each of which holds what its layer was given."""
    while found:
        yield found.pop()


def weights(squares: Tensor, clip: float) -> Tensor:
    """Return min(1, clip / norm) of each unit, and 0 where the norm is not finite: squared norms [U] -> [U]."""
    norms = squares.sqrt()
    return torch.where(norms.isfinite(), (clip / norms).clamp(max=1.0), 0.0)


def weigh(method: Decomposing, found: Iterable[Term], share: Tensor) -> dict[str, Tensor]:
    """Return the weighted sums by parameter name; zero where no gradient reached a parameter."""
    sums: dict[int, Tensor] = {}
    every = bool((share > 0).all())
    with _exact_products(share):
        for term in found:
            total = term.weighted(share.to(term.squares.dtype), every).to(term.parameter.dtype)
            key = id(term.parameter)
            sums[key] = sums[key] + total if key in sums else total
    parameters = trained(method)
    return {name: sums[id(p)] if id(p) in sums else torch.zeros_like(p) for name, p in parameters.items()}


@contextmanager
def _exact_products(like: Tensor) -> Iterator[None]:
    """Compute as written: without autocast, which would reach into the hooks, and without watching each function."""
    with torch.autocast(like.device.type, enabled=False), torch._C.DisableTorchFunction():
        yield


def unit_terms(
    method: Decomposing, inputs: tuple[Tensor, ...], group: Grouping, inner: list[int]
) -> tuple[Tensor, list[Term]]:
    """Return each image's loss, [B], and the terms of every parameter's gradient."""
    sizes = torch.bincount(group.units, minlength=group.count)
    losses, calls = _Backward(group, inner).run(method, inputs, 1.0 / sizes[group.units])
    return losses, calls


class _Backward:
    """One forward and backward pass; layers are done as soon as all of their calls have a gradient."""

    def __init__(self, group: Grouping, inner: list[int]) -> None:
        self.group, self.inner = group, inner
        self.found: list[Term] = []
        self.waiting: dict[Layer, int] = defaultdict(int)
        self.arrived: dict[Layer, list[Call]] = defaultdict(list)
        self.order: dict[int, int] = {}  # place of each call in the forward pass, by id

    def run(self, method: Decomposing, inputs: tuple[Tensor, ...], shares: Tensor) -> tuple[Tensor, list[Term]]:
        parameters = trained(method)
        with Capture(parameters, self.arrive) as capture:
            losses = method(*inputs)
        self.order = {id(call): place for place, call in enumerate(capture.calls)}
        for call in capture.calls:
            self.waiting[layer(call)] += 1
        refuse_shared(capture.calls, parameters)
        joint = (losses * shares).sum()
        with _exact_products(joint):
            torch.autograd.backward(joint)
        return losses.detach(), self.found

    def arrive(self, call: Call) -> None:
        """Take the terms of a layer whose last call has come."""
        key = layer(call)
        self.arrived[key].append(call)
        if len(self.arrived[key]) == self.waiting[key]:
            calls = self.arrived.pop(key)
            self.found += terms([(replace(c), self.inner[self.order[id(c)]]) for c in calls], self.group)
            for c in calls:  # which the graph holds: what the terms do not need is freed here
                c.inputs = c.gradient = None


def layer(call: Call) -> Layer:
    """Return what tells the calls of one layer: its parameters."""
    return id(call.weight), id(call.bias)


def refuse_shared(calls: list[Call], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise ConfigError where two layers share a parameter: their gradients would have to be added before the norm."""
    owner: dict[int, tuple[Layer, str]] = {}
    for call in calls:
        for parameter in (call.weight, call.bias):
            if parameter is None:
                continue
            here = (layer(call), call.kind)
            if owner.setdefault(id(parameter), here) != here:
                name = next(name for name, known in parameters.items() if known is parameter)
                raise ConfigError(
                    f"[privacy] engine = 'bookkeeping': '{name}' is shared by two layers. Take engine = 'opacus', "
                    "which is slower, or another backbone."
                )
