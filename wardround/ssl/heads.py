"""What joint-embedding methods share: MLP heads, the way of views through them, and the cosines between embeddings."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(widths: Sequence[int], norm: str, *, out_norm: bool = False, out_bias: bool = True) -> nn.Sequential:
    """Return linear layers with a norm and a ReLU between them: [B, widths[0]] -> [B, widths[-1]].

    `norm` is the backbone's: batch takes batch normalisation as the papers do, group takes
    LayerNorm, which lets no image see another. `out_norm` puts batch normalisation, but no LayerNorm,
    after the last layer too, without affine. A layer before a norm has no bias.
    """
    hidden_norm = nn.BatchNorm1d if norm == "batch" else nn.LayerNorm
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths[:-1]):
        layers += [nn.Linear(inner, outer, bias=False), hidden_norm(outer), nn.ReLU()]
    out_norm = out_norm and norm == "batch"
    layers.append(nn.Linear(widths[-2], widths[-1], bias=out_bias and not out_norm))
    if out_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)


def each_view(network: Callable[[Tensor], Tensor], views: Sequence[Tensor], norm: str) -> Sequence[Tensor]:
    """Return the network's output of each view, k times [B, C, s, s] -> k times [B, D].

    One pass of k rows an image, view after view, where that is the same; with batch normalisation
    each view passes by itself and is normalised by its own statistics.
    """
    if norm == "batch":
        return [network(view) for view in views]
    return network(torch.cat(list(views))).chunk(len(views))


def widened(x: Tensor) -> Tensor:
    """Return a tensor in float32 where it was in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosine of each row of x with each of y, float32 under autocast too: [N, D], [M, D] -> [N, M]."""
    with torch.autocast(x.device.type, enabled=False):  # it would multiply in bfloat16, and exp(cosine / 0.1) shows it
        return F.normalize(widened(x)) @ F.normalize(widened(y)).T
