"""DP-SGD over a site's units (Abadi et al. 2016, arXiv:1607.00133, Algorithm 1), as the training loop's engine.

A step draws each unit with probability q by itself, sums the units' clipped gradients, adds noise once,
and divides by the declared number of units a step: never by the number drawn. All its randomness comes
from the operating system; the experiment's seed, which others know, reaches none of it.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wardround.backbones import fast_layers
from wardround.config.federation import Recipe
from wardround.config.privacy import UnitPrivacyConfig
from wardround.errors import ConfigError
from wardround.privacy.accounting import Mechanism
from wardround.privacy.bookkeeping import Clipped, clipped_sum
from wardround.privacy.grouping import Grouping
from wardround.privacy.hooks import GhostClipping, PerImageHooks
from wardround.privacy.method import Decomposing, trained
from wardround.privacy.noise import fresh_generator, fresh_words, generator_from, standard_normal, uniform
from wardround.privacy.rows import rows_of_calls

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Clipper = Callable[[tuple[Tensor, ...], Grouping, float], Clipped]
_LOW_PRECISION_CLIP = 0.99  # of C under autocast, whose rounding took clipped norms 0.16 % over it


class Private:
    """Poisson draws of units, clipped sums, noise: behind the calls that the training loop knows."""

    def __init__(
        self,
        method: Decomposing,
        images: NDArray[np.uint8],
        units: NDArray[np.int32],
        recipe: Recipe,
        mechanism: Mechanism,
        fabric: "Fabric",
        micro_batch: int = 0,
    ) -> None:
        """images: [N, C, S, S]; units: [N], which one each image belongs to, -1 for none; micro_batch: rows at once."""
        assert isinstance(recipe.privacy, UnitPrivacyConfig)
        self.method, self.images, self.recipe, self.fabric = method, images, recipe, fabric
        self.privacy, self.mechanism = recipe.privacy, mechanism
        self.micro_batch = micro_batch or recipe.training.batch_size
        self.parameters = trained(method)
        self.device = next(iter(self.parameters.values())).device
        self.clip = clipper(method, recipe)
        order = np.argsort(units, kind="stable")
        order = order[units[order] >= 0]
        edges = np.flatnonzero(np.diff(units[order], prepend=-1, append=np.iinfo(np.int32).max))
        self.units = [order[first:end] for first, end in pairwise(edges)]

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Return the images that a step draws and the unit of each, ascending, alike in all processes: twice [B].

        B may be 0.
        """
        self.method.view_size = self.recipe.view_size(step)
        drawn: tuple[Tensor, Tensor] = self.fabric.broadcast(self.draw())
        return drawn

    def draw(self) -> tuple[Tensor, Tensor]:
        """Return the images that are drawn and the unit of each, ascending: twice [B]."""
        draw = fresh_generator()
        drawn = uniform(len(self.units)) < self.mechanism.rate
        rows, units = [], []
        for number, unit in enumerate(np.flatnonzero(drawn).tolist()):
            own = torch.from_numpy(self.units[unit])
            own = own[torch.randperm(len(own), generator=draw)[: self.privacy.images_per_patient]]
            rows.append(own.repeat_interleave(self.privacy.views))
            units.append(torch.full_like(rows[-1], number))
        nothing = torch.empty(0, dtype=torch.int64)
        return torch.cat([nothing, *rows]), torch.cat([nothing, *units])

    def gradients(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Fill every `.grad` with the noised sum over the declared number of units; return the mean loss, [].

        The loss is for the site's own eyes. A part whose loss is no number counts for nothing in it.
        """
        rows, units = batch
        inputs = self.inputs(rows)
        sums = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}
        losses = [torch.zeros(0, device=self.device)]
        for place, part in enumerate(self.parts(units)):
            if place % self.fabric.world_size != self.fabric.global_rank:
                continue  # another process's
            clipped = self._part(units[part], tuple(x[part] for x in inputs))
            losses.append(clipped.losses)
            for name, total in clipped.sums.items():
                sums[name] += total
        flat = torch.cat([total.flatten() for total in sums.values()])
        if self.fabric.global_rank == 0:  # once in the sum of all processes
            noise = standard_normal(flat.shape, self.privacy.randomness).to(flat.device)
            flat += self.mechanism.noise * self.privacy.clip * noise
        if self.fabric.world_size > 1:
            flat = torch.as_tensor(self.fabric.all_reduce(flat, reduce_op="sum"))
        flat /= self.recipe.training.batch_size
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        for parameter, gradient in zip(self.parameters.values(), torch.split(flat, sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)
        finite = torch.cat(losses).double()  # whose mean is finite, too
        finite = finite[finite.isfinite()]
        return finite.mean() if len(finite) else torch.zeros((), device=self.device)

    def parts(self, units: Tensor) -> Iterator[slice]:
        """Yield the rows of whole units, as many at a time as the micro-batch takes, and one unit at least."""
        first = 0
        ends = [*(units.diff() != 0).nonzero().flatten().add(1).tolist(), len(units)] if len(units) else []
        for place, end in enumerate(ends):
            after = ends[place + 1] if place + 1 < len(ends) else None
            if after is None or after - first > self.micro_batch:
                yield slice(first, end)
                first = end

    def inputs(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return the method's inputs of all images of a step, alike in all processes.

        They are made at once: what a method draws for a whole batch, such as public negatives, must not
        depend on how one patient more or less cuts it into parts.
        """
        words = self.fabric.broadcast(fresh_words())
        if not len(rows):
            return ()
        images = torch.from_numpy(self.images[rows.numpy()]).to(self.device).float().div_(255.0)
        return self.method.prepare(images, generator_from(words))

    def _part(self, units: Tensor, inputs: tuple[Tensor, ...]) -> Clipped:
        """Return what some units add."""
        units = units - units[0]
        group = Grouping(units.to(self.device), int(units[-1]) + 1)
        low = self.recipe.training.precision != "float32"
        with fast_layers(self.device), self.fabric.autocast():
            return self.clip(inputs, group, self.privacy.clip * (_LOW_PRECISION_CLIP if low else 1.0))


def clipper(method: Decomposing, recipe: Recipe) -> Clipper:
    """Return the engine that the config names, after it has shown itself exact for this method.

    Raises ConfigError where the method couples images, or the engine has no exact rule for it.
    """
    assert isinstance(recipe.privacy, UnitPrivacyConfig)
    refuse_coupled(method, recipe.privacy.unit)
    if recipe.privacy.engine == "opacus":
        return PerImageHooks(method, recipe.data.shape)
    if recipe.privacy.engine == "opacus-ghost":
        return GhostClipping(method, recipe.data.shape, recipe.privacy)
    known: dict[int, list[int]] = {}  # rows of the calls, by size of view

    def rows() -> list[int]:
        if method.view_size not in known:
            known[method.view_size] = rows_of_calls(method, recipe.data.shape)
        return known[method.view_size]

    rows()
    return lambda inputs, group, clip: clipped_sum(method, inputs, group, clip, rows())


def refuse_coupled(method: Decomposing, unit: str) -> None:
    """Raise ConfigError where an image's loss depends on other images: no clipping bounds what a unit does then."""
    if method.coupling is not None:
        raise ConfigError(
            f"[privacy] unit = '{unit}': {method.coupling}, so that clipping does not bound what one {unit} changes. "
            "Take mae, ijepa or dino with centre = 'public', on [backbone] norm = 'group'; or [privacy] unit = 'site'. "
            "Sound too, and seen to collapse: byol, simsiam, simclr with negatives = 'public'."
        )
