"""Which image each row inside a network belongs to, found by changing one image and watching the rest.

It is a check as much as a finding: a row that two images reach, a parameter that gets a gradient past
the rules, or a rule that differs from autograd is refused here, whatever the types of the layers say.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from wardround.errors import ConfigError
from wardround.privacy.bookkeeping import refuse_shared, unit_terms, weigh
from wardround.privacy.capture import Call, Capture
from wardround.privacy.grouping import Grouping
from wardround.privacy.method import Decomposing, trained

ImageGradient = Callable[[int], dict[str, Tensor]]  # number of an image -> its gradient by parameter name

_IMAGES = 3
_NOISE = 0.02  # on the weights: layers that start at zero would hide what is behind them
_SAME = 1e-9  # of float64 numbers, relative to the largest


def rows_of_calls(method: Decomposing, shape: tuple[int, ...]) -> list[int]:
    """Return `inner` (see Grouping) of each call of a forward pass, in order.

    shape: of one image. Five passes of three images of noise in float64, on a copy. Raises ConfigError
    for a method that mixes images, or for which book-keeping would not be exact.
    """
    if method.coupling is not None:
        raise ConfigError(f"[privacy]: {method.coupling}.")
    probe = noisy_copy(method)
    first, second = (prepared(probe, shape, seed) for seed in range(2))
    calls, losses = _traced(probe, first)
    touched = [torch.zeros(_IMAGES, len(_both(call)[-1]), dtype=torch.bool) for call in calls]
    for image in range(_IMAGES):
        changed, their_losses = _traced(probe, _swapped(first, second, image))
        if not (losses != their_losses)[torch.arange(_IMAGES) != image].logical_not().all():
            raise ConfigError(
                "[privacy]: the loss of an image changes with another image of its batch; take another method."
            )
        for marks, before, after in zip(touched, calls, changed, strict=True):
            for old, new in zip(_both(before), _both(after), strict=True):
                marks[image] |= _differ(old, new, marks.shape[1])
    inner = [_inner(marks, _name(call, probe)) for marks, call in zip(touched, calls, strict=True)]
    group = Grouping(torch.arange(_IMAGES), _IMAGES)
    _, found = unit_terms(probe, tuple(first), group, inner)
    alone = torch.eye(_IMAGES, dtype=torch.float64)
    refuse_inexact(probe, first, lambda image: weigh(probe, found, alone[image]), "bookkeeping")
    return inner


def noisy_copy(method: Decomposing) -> Decomposing:
    """Return a float64 copy on the CPU whose weights are none of them zero."""
    probe = copy.deepcopy(method).double().cpu()  # type: ignore[attr-defined]  # a module
    with torch.no_grad():
        draw = torch.Generator().manual_seed(1)
        for parameter in trained(probe).values():
            parameter.add_(_NOISE * torch.randn(parameter.shape, generator=draw))
    return probe  # type: ignore[no-any-return]


def prepared(probe: Decomposing, shape: tuple[int, ...], seed: int) -> list[Tensor]:
    """Return the inputs that a method makes of images of noise; what it draws is the same for every seed."""
    images = torch.rand(_IMAGES, *shape, generator=torch.Generator().manual_seed(seed))
    inputs = probe.prepare(images, torch.Generator().manual_seed(2))
    return [x.double() if x.is_floating_point() else x for x in inputs]


def _swapped(first: list[Tensor], second: list[Tensor], image: int) -> list[Tensor]:
    """Return inputs with one image replaced; what is drawn beside the images, such as masks, stays."""
    swapped = []
    for own, other in zip(first, second, strict=True):
        mixed = own.clone()
        if own.is_floating_point():
            mixed[image] = other[image]
        swapped.append(mixed)
    return swapped


def _traced(probe: Decomposing, inputs: list[Tensor]) -> tuple[list[Call], Tensor]:
    """Return the calls of a pass with their gradients, and the losses."""
    with Capture(trained(probe), lambda call: None) as capture:
        losses = probe(*inputs)
    refuse_shared(capture.calls, trained(probe))
    torch.autograd.backward(losses.sum())
    return list(capture.calls), losses.detach()


def _both(call: Call) -> list[Tensor]:
    """Return what of a call may change with an image: its gradient, and its inputs where they have rows."""
    assert call.gradient is not None
    found = [call.inputs] if call.inputs is not None and len(call.inputs) == len(call.gradient) else []
    return [*found, call.gradient]


def _differ(old: Tensor, new: Tensor, rows: int) -> Tensor:
    """Return which rows of two tensors differ: [R]."""
    least = _SAME * float(old.abs().max())
    return ((old - new).abs() > least).reshape(rows, -1).any(1)


def _inner(marks: Tensor, name: str) -> int:
    """Return how many rows of an image follow each other: [images, R] of which image reaches which row."""
    rows = marks.shape[1]
    if (marks.sum(0) > 1).any():
        raise ConfigError(f"[privacy]: '{name}' mixes the images of a batch; take another backbone or method.")
    for inner in range(1, rows // _IMAGES + 1):
        if rows % (inner * _IMAGES) == 0:
            owner = torch.arange(rows) // inner % _IMAGES
            if not marks[torch.arange(_IMAGES)[:, None] != owner].any():
                return inner
    raise ConfigError(
        f"[privacy] engine = 'bookkeeping': the {rows} rows of '{name}' do not follow {_IMAGES} images. Take "
        "another backbone or method."
    )


def refuse_inexact(probe: Decomposing, inputs: list[Tensor], image_gradient: ImageGradient, engine: str) -> None:
    """Raise ConfigError unless an engine's gradient of each image is that of autograd on the image alone."""
    parameters = trained(probe)
    for image in range(_IMAGES):
        found = image_gradient(image)
        loss = probe(*(x[image : image + 1] for x in inputs)).sum()
        plain = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for (name, _), expected in zip(parameters.items(), plain, strict=True):
            least = 1e-7 * float(expected.abs().max()) + 1e-12
            if not torch.allclose(found[name], expected, rtol=1e-5, atol=least):
                raise ConfigError(
                    f"[privacy] engine = '{engine}': the gradient of '{name}' for one image is not exact. Take "
                    "another engine, backbone or method."
                )


def _name(call: Call, probe: Decomposing) -> str:
    wanted = call.weight if call.weight is not None else call.bias
    return next(name for name, parameter in trained(probe).items() if parameter is wanted)
