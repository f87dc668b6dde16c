"""A layer's weights as a product of two thinner matrices, chosen by what comes out of the layer.

Zhang et al. 2016 (arXiv:1505.06798), section 3.1: of all weights of rank r, those whose outputs are nearest over the
images are the weights projected on the r first principal components of the outputs. It is the optimum that
whitened singular values reach too (SVD-LLM, Wang et al. 2025, arXiv:2403.07378), without inverting a matrix.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.config.federation import DataConfig
from wardround.downstream.moments import Moments, moments


def low_rank(
    model: nn.Module, images: NDArray[np.uint8], data: DataConfig, keep: float, device: str, first: tuple[str, ...]
) -> dict[str, Tensor] | None:
    """Return a network's tensors with each linear layer and ungrouped convolution but the `first` in two; None of none.

    Each pair has at most the share `keep` of its layer's weights; biases stay.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) in (nn.Linear, nn.Conv2d)  # subclasses pad, standardise or share in ways of their own
        and getattr(layer, "groups", 1) == 1
        and name not in first
        and rank_of(layer.weight, keep) > 0
    }
    found = moments(model, layers, "out", images, data, device)
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    for name in found:  # a layer that no image passes through, such as one that timm keeps for training, stays
        weight, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias", None)
        inner, outer, bias = factors(weight, bias, found[name], rank_of(weight, keep))
        tensors |= {f"{name}.0.weight": inner, f"{name}.1.weight": outer}
        if bias is not None:
            tensors[f"{name}.1.bias"] = bias
    return tensors if found else None


def rank_of(weight: Tensor, keep: float) -> int:
    """Return the largest rank at which two factors of a weight have at most a share of its numbers.

    >>> rank_of(torch.zeros(6, 3), 0.5), rank_of(torch.zeros(8, 2, 3, 3), 0.5)
    (1, 2)
    """
    rows, columns = len(weight), weight[0].numel()
    return int(keep * rows * columns / (rows + columns))


def factors(weight: Tensor, bias: Tensor | None, out: Moments, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return U^T W, U and the bias: [O, I, ...] -> [r, I, ...], [O, r, 1, ...], [O].

    U [O, r] are the first eigenvectors of the outputs' covariance; without a bias, of their second moment about
    zero. The new bias carries the mean of what U leaves out.
    """
    second = out.second if bias is None else out.second - torch.outer(out.mean, out.mean)
    basis = torch.linalg.eigh(second).eigenvectors[:, -rank:]  # ascending
    inner = (basis.T @ weight.double().flatten(1)).reshape(rank, *weight.shape[1:])
    outer = basis.reshape(*basis.shape, *[1] * (weight.ndim - 2))
    if bias is not None:
        left_out = out.mean - bias.double()
        bias = bias.double() + left_out - basis @ (basis.T @ left_out)
    return inner.float(), outer.float().contiguous(), None if bias is None else bias.float()
