"""Opacus's two ways to the same clipped sum: a gradient an image by hooks, and ghost clipping in two passes."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wardround.backbones import Token
from wardround.config.privacy import UnitPrivacyConfig
from wardround.errors import ConfigError
from wardround.privacy.bookkeeping import Clipped, weights
from wardround.privacy.grouping import Grouping
from wardround.privacy.method import Decomposing, trained
from wardround.privacy.rows import noisy_copy, prepared, refuse_inexact


class PerImageHooks:
    """Opacus's GradSampleModule: the gradient of every row, summed inside the unit before clipping."""

    def __init__(self, method: Decomposing, shape: tuple[int, ...]) -> None:
        """shape: of one image. Raises ConfigError for a method whose gradients Opacus does not get right."""
        probe = noisy_copy(method)
        inputs = prepared(probe, shape, 0)
        alone = Grouping(torch.arange(len(inputs[0])), len(inputs[0]))
        _, each = _hooked(_wrapped(probe), probe, tuple(inputs), alone)
        plain = noisy_copy(method)
        refuse_inexact(plain, inputs, lambda image: {name: rows[image] for name, rows in each.items()}, "opacus")
        self.method, self.wrapped = method, _wrapped(method)

    def __call__(self, inputs: tuple[Tensor, ...], group: Grouping, clip: float) -> Clipped:
        """Return the sum of the units' clipped gradients, as bookkeeping.clipped_sum does."""
        losses, each = _hooked(self.wrapped, self.method, inputs, group)
        squares = torch.stack([rows.flatten(1).double().square().sum(1) for rows in each.values()]).sum(0)
        share = weights(squares, clip)
        sums = {}
        for name, rows in each.items():
            good = rows.flatten(1).where((share > 0)[:, None], 0.0)
            sums[name] = (share.to(rows.dtype) @ good).view(rows.shape[1:])
        return Clipped(sums, losses)


class GhostClipping:
    """Opacus's fast gradient clipping: norms in a first backward pass, the weighted sum in a second."""

    def __init__(self, method: Decomposing, shape: tuple[int, ...], privacy: UnitPrivacyConfig) -> None:
        """Raises ConfigError where a unit has more than one row: the norms would be those of rows."""
        if privacy.images_per_patient > 1 or privacy.views > 1:
            raise ConfigError(
                f"[privacy] engine = 'opacus-ghost' clips rows, and with images_per_patient = "
                f"{privacy.images_per_patient} and views = {privacy.views} a unit has several. Take engine = "
                "'bookkeeping'."
            )
        probe = noisy_copy(method)
        inputs = prepared(probe, shape, 0)
        _, _, norms = _ghost_norms(_wrapped(probe, ghost=True), tuple(inputs))
        plain = noisy_copy(method)
        for image in range(len(inputs[0])):
            loss = plain(*(x[image : image + 1] for x in inputs)).sum()
            found = torch.autograd.grad(loss, list(trained(plain).values()), allow_unused=True, materialize_grads=True)
            expected = torch.stack([gradient.square().sum() for gradient in found]).sum().sqrt()
            if len(norms) != len(inputs[0]) or not torch.allclose(norms[image], expected, rtol=1e-5):
                raise ConfigError(
                    "[privacy] engine = 'opacus-ghost': it does not give the norm of one image's gradient for this "
                    "method and backbone, whose networks see several rows an image. Take engine = 'bookkeeping'."
                )
        self.method, self.wrapped = method, _wrapped(method, ghost=True)

    def __call__(self, inputs: tuple[Tensor, ...], group: Grouping, clip: float) -> Clipped:
        """Return the sum of the units' clipped gradients, as bookkeeping.clipped_sum does."""
        parameters = trained(self.method)
        losses, graph, norms = _ghost_norms(self.wrapped, inputs)
        share = weights(norms.double().square(), clip).to(graph.dtype)
        self.wrapped.disable_hooks()
        good = graph.where(share > 0, 0.0)
        total, every = (share * good).sum(), list(parameters.values())
        with _unasked():
            sums = torch.autograd.grad(total, every, allow_unused=True, materialize_grads=True)
        self.wrapped.enable_hooks()
        return Clipped(dict(zip(parameters, sums, strict=True)), losses)


def _wrapped(method: Decomposing, *, ghost: bool = False) -> Any:
    """Return the method with Opacus's hooks on its layers."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.grad_sample.utils import register_grad_sampler, register_norm_sampler

    register_grad_sampler(Token)(_token_rows)
    register_norm_sampler(Token)(_token_norms)
    if ghost:
        return GradSampleModuleFastGradientClipping(method, loss_reduction="sum", strict=False, use_ghost_clipping=True)
    return GradSampleModule(method, loss_reduction="sum", strict=False)


def _token_rows(layer: Token, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return the gradient of a token's vector for each row: [R, ..., D] -> [R, D]."""
    return {layer.weight: backprops.reshape(len(backprops), -1, backprops.shape[-1]).sum(1)}


def _token_norms(layer: Token, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    return {layer.weight: _token_rows(layer, activations, backprops)[layer.weight].norm(dim=1)}


def _hooked(
    wrapped: Any, method: Decomposing, inputs: tuple[Tensor, ...], group: Grouping
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return each image's loss, [B], and each unit's gradient by parameter name, [U, ...]."""
    sizes = torch.bincount(group.units, minlength=group.count)
    losses = _run(wrapped, inputs)
    _back((losses / sizes[group.units]).sum())
    each = {}
    for name, parameter in trained(method).items():
        rows = getattr(parameter, "grad_sample", None)
        if isinstance(rows, list):
            rows = torch.stack(rows).sum(0)
        each[name] = parameter.new_zeros(group.count, *parameter.shape) if rows is None else group.summed(rows, 1)
        parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]  # Opacus's own attribute
    return losses.detach(), each


def _ghost_norms(wrapped: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses, the same with their graph, and the norm of each row's gradient: three times [B]."""
    losses = _run(wrapped, inputs)
    _back(losses.sum(), retain=True)
    norms = wrapped.get_norm_sample()
    wrapped.zero_grad(set_to_none=True)
    return losses.detach(), losses, norms


def _run(wrapped: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    try:
        losses: Tensor = wrapped(*inputs)
    except RuntimeError as error:
        raise _refused(error) from error
    return losses


def _back(loss: Tensor, *, retain: bool = False) -> None:
    try:
        with _unasked():
            torch.autograd.backward(loss, retain_graph=retain)
    except RuntimeError as error:
        raise _refused(error) from error


@contextmanager
def _unasked() -> Iterator[None]:
    """Silence torch where the first layer's input has no gradient, of which Opacus makes no use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def _refused(error: RuntimeError) -> Exception:
    """Return what a user can do where Opacus's hooks meet a network that writes in place."""
    if "inplace" not in str(error) and "in-place" not in str(error):
        return error
    return ConfigError(
        "[privacy]: Opacus's hooks do not take this backbone, which adds in place; take engine = 'bookkeeping'."
    )
