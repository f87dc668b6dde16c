"""Training without differential privacy: epochs, one joint gradient, clipped.

The joint gradient is the same whether a batch is taken at once, in micro-batches, or by several
processes. Where the loss compares images, embeddings are computed first without a graph, the loss's
gradient with respect to all of them is taken, and each micro-batch then carries its share back
(Gao et al. 2021, arXiv:2101.06983).
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.backbones import fast_layers
from wardround.config.federation import Recipe
from wardround.errors import UpdateError
from wardround.ssl.devices import Machine, open_fabric
from wardround.ssl.draws import generator
from wardround.ssl.method import Method

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)
Inputs = tuple[Tensor, ...]


class Plain:
    """Training without differential privacy: epochs without replacement, one joint gradient."""

    def __init__(
        self,
        method: Method,
        images: NDArray[np.uint8],
        recipe: Recipe,
        site: str,
        fabric: "Fabric | None" = None,
        micro_batch: int = 0,
    ) -> None:
        self.method, self.images, self.recipe, self.site = method, images, recipe, site
        self.fabric = fabric or open_fabric(Machine(), recipe.training.precision)
        self.device = next(method.parameters()).device
        self.micro_batch = micro_batch or recipe.training.batch_size
        self._epoch = (-1, np.empty(0, np.int64))

    def batch(self, step: int) -> Inputs:
        """Return views of the images whose turn it is, and whatever else the method draws."""
        self.method.view_size = self.recipe.view_size(step)
        rows = self.images[self.rows(step)]
        images = torch.from_numpy(rows).to(self.device).float().div_(255.0)
        return self.method.prepare(images, generator(self.recipe.seed, self.site, step, "views"))

    def rows(self, step: int) -> NDArray[np.int64]:
        """Return which images a step takes: every image once an epoch, epochs back to back."""
        size, count = self.recipe.training.batch_size, len(self.images)
        places = np.arange(step * size, (step + 1) * size)
        return np.array([self._order(place // count)[place % count] for place in places.tolist()])

    def gradients(self, batch: Inputs) -> Tensor:
        """Back-propagate the mean loss of the joint batch and clip its gradient.

        Where memory runs out, micro-batches are halved until they fit, which is said each time.
        Raises UpdateError where not even one image fits.
        """
        while True:
            try:
                loss = self._joint(batch)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve()
        if self.fabric.world_size > 1:
            loss = self._sum_over_processes(loss)
        clip_norm = self.recipe.training.clip_norm
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(self.method.parameters(), clip_norm)
        return loss

    def _joint(self, batch: Inputs) -> Tensor:
        """Fill this process's share of the gradient of the mean loss; return its share of the loss, []."""
        count = len(batch[0])
        mine = slice(*(count * place // self.fabric.world_size for place in (self._rank, self._rank + 1)))
        parts = list(zip(*(torch.split(rows[mine], self.micro_batch) for rows in batch), strict=True))
        if self.fabric.world_size == len(parts) == 1:
            with self._forward():
                loss: Tensor = self.method(*batch).mean()
            self.fabric.backward(loss)
            return loss.detach()
        if self.method.loss_coupling() is None:
            return torch.stack([self._own_loss(part, count) for part in parts]).sum()
        return self._compared(parts, count, mine)

    def _own_loss(self, part: Inputs, count: int) -> Tensor:
        """Add the gradient of one micro-batch, whose losses are of each image by itself."""
        with self._forward():
            loss: Tensor = self.method(*part).sum() / count
        self.fabric.backward(loss)
        return loss.detach()

    def _compared(self, parts: list[Inputs], count: int, mine: slice) -> Tensor:
        """Add the gradient of micro-batches whose embeddings the loss compares with each other."""
        with torch.no_grad(), self._forward():
            embedded = [torch.cat(rows) for rows in zip(*(self.method.embed(*part) for part in parts), strict=True)]
        joint = [self._of_all_processes(rows, count).requires_grad_() for rows in embedded]
        with self._forward():
            loss = self.method.loss(*joint).mean()
        slopes = [slope[mine] for slope in torch.autograd.grad(loss, joint, materialize_grads=True)]
        for place, part in enumerate(parts):
            with self._forward():
                rows = self.method.embed(*part)
            first = place * self.micro_batch
            shares = [slope[first : first + self.micro_batch] for slope in slopes]
            carried = [(row, share) for row, share in zip(rows, shares, strict=True) if row.requires_grad]
            torch.autograd.backward([row for row, _ in carried], [share for _, share in carried])
        return loss.detach() / self.fabric.world_size

    def _of_all_processes(self, rows: Tensor, count: int) -> Tensor:
        """Return the rows of the whole batch, of which each process has embedded a share."""
        if self.fabric.world_size == 1:
            return rows
        joint = rows.new_zeros((count, *rows.shape[1:]))
        joint[count * self._rank // self.fabric.world_size :][: len(rows)] = rows
        return torch.as_tensor(self.fabric.all_reduce(joint, reduce_op="sum"))

    def _sum_over_processes(self, loss: Tensor) -> Tensor:
        """Sum the gradients of all processes, in one message, and return the sum of their losses."""
        found = [p.grad for p in self.method.parameters() if p.grad is not None]
        block = torch.cat([loss.reshape(1), *(grad.reshape(-1) for grad in found)])
        block = torch.as_tensor(self.fabric.all_reduce(block, reduce_op="sum"))
        first = 1
        for grad in found:
            grad.copy_(block[first : first + grad.numel()].view_as(grad))
            first += grad.numel()
        return block[0]

    def _halve(self) -> None:
        """Take half as many images at once, and say so."""
        self.method.zero_grad(set_to_none=True)
        largest = min(self.micro_batch, -(-self.recipe.training.batch_size // self.fabric.world_size))
        if self.fabric.world_size > 1 or largest == 1 or self.recipe.backbone.norm == "batch":
            own, less = "Set micro_batch in site.toml lower, or checkpointing = true, or", "[training] batch_size"
            if largest == 1:
                own, less = "Set checkpointing = true in site.toml, or", "[data] image_size"
            if self.recipe.backbone.norm == "batch":  # whose batches stay whole
                own, less = "Batch statistics need them all:", "[training] batch_size"
            raise UpdateError(
                f"site '{self.site}': memory ran out with {largest} images at once. {own} ask for a smaller {less}."
            )
        self.micro_batch = (largest + 1) // 2
        log.warning(
            "site '%s': memory ran out with %d images at once; goes on with %d, which gives the same gradient",
            self.site,
            largest,
            self.micro_batch,
        )

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        """Compute in the config's precision, the fastest way that this processor has."""
        with fast_layers(self.device), self.fabric.autocast():
            yield

    @property
    def _rank(self) -> int:
        return self.fabric.global_rank

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of an epoch, a function of (seed, site, epoch) alone."""
        if self._epoch[0] != epoch:
            draw = torch.randperm(len(self.images), generator=generator(self.recipe.seed, self.site, epoch, "order"))
            self._epoch = (epoch, draw.numpy())
        return self._epoch[1]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error is an allocator's: torch has a class for it on GPUs only, and oneDNN no word."""
    texts = ("can't allocate memory", "could not create a primitive", "could not create a memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)
