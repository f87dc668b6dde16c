"""The clipped sum of the units' gradients by book-keeping: one forward pass, one backward pass without weights."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

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
    squares = torch.stack([term.squares.double() for term in found]).sum(0)
    return Clipped(weigh(method, found, weights(squares, clip)), losses)


def weights(squares: Tensor, clip: float) -> Tensor:
    """Return min(1, clip / norm) of each unit, and 0 where the norm is not finite: squared norms [U] -> [U]."""
    norms = squares.sqrt()
    return torch.where(norms.isfinite(), (clip / norms).clamp(max=1.0), 0.0)


def weigh(method: Decomposing, found: list[Term], share: Tensor) -> dict[str, Tensor]:
    """Return the weighted sums by parameter name; zero where no gradient reached a parameter."""
    names = {id(parameter): name for name, parameter in trained(method).items()}
    sums = {name: torch.zeros_like(parameter) for name, parameter in trained(method).items()}
    for term in found:
        sums[names[id(term.parameter)]] += term.total(share.to(term.squares.dtype)).to(term.parameter.dtype)
    return sums


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
        torch.autograd.backward((losses * shares).sum())
        return losses.detach(), self.found

    def arrive(self, call: Call) -> None:
        """Take the terms of a layer whose last call has come."""
        key = layer(call)
        self.arrived[key].append(call)
        if len(self.arrived[key]) == self.waiting[key]:
            calls = [(c, self.inner[self.order[id(c)]]) for c in self.arrived.pop(key)]
            self.found += terms(calls, self.group)


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
