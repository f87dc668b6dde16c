"""What a site can say of its features without labels: whether they collapse, and how they spread."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wardround.backbones import Backbone
from wardround.config.federation import Recipe
from wardround.errors import UpdateError
from wardround.ssl.draws import generator
from wardround.ssl.views import view
from wardround.update import collapsed

IMAGES = 256  # at most: enough for a rank, a second or so of a CPU for a ViT-Tiny


@dataclass(frozen=True)
class Monitor:
    """Label-free figures of a backbone's features of two views of each image."""

    effective_rank: float  # RankMe, 1 to D
    feature_spread: float  # standard deviation of normalised features times the root of D: 0 collapsed, 1 isotropic
    alignment: float  # mean squared distance of an image's two views on the unit sphere, 0 to 4
    uniformity: float  # -log of the mean of exp(-2 d²) over pairs of images, 0 (all alike) to 8

    @property
    def collapsed(self) -> bool:
        """Whether all images look alike."""
        return collapsed(self.effective_rank, self.feature_spread)


def watch(backbone: Backbone, images: NDArray[np.uint8], recipe: Recipe, site: str, micro_batch: int = 64) -> Monitor:
    """Return the figures of a backbone over a fixed draw of a site's images: [N, C, S, S] uint8.

    The backbone sees `micro_batch` images at once. Raises UpdateError where features are not finite.
    """
    draw = generator(recipe.seed, site, "monitor")
    chosen = torch.randperm(len(images), generator=draw)[:IMAGES].sort().values.numpy()
    device, was_training = next(backbone.parameters()).device, backbone.training
    backbone.eval()
    pair: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for part in np.array_split(chosen, -(-len(chosen) // 64)):
            batch = torch.from_numpy(images[part]).to(device).float() / 255.0
            for features in pair:
                views = view(batch, recipe, draw, recipe.data.image_size)
                features += [backbone.features(few).float().cpu() for few in torch.split(views, micro_batch)]
    backbone.train(was_training)
    first, second = torch.cat(pair[0]), torch.cat(pair[1])
    if not (first.isfinite().all() and second.isfinite().all()):
        raise UpdateError(
            f"site '{site}': the backbone's features are not finite after the round. Lower [training] learning_rate, "
            "set clip_norm, or train in float32."
        )
    return figures(first, second)


def figures(first: Tensor, second: Tensor) -> Monitor:
    """Return the figures of the features of two views of each image: [N, D], [N, D].

    Effective rank: Garrido et al. 2023 (arXiv:2210.02885), equation 1. Spread: Chen and He 2021, section
    4.1. Alignment and uniformity: Wang and Isola 2020 (arXiv:2005.10242), section 4, with t = 2.
    """
    first, second = first.double(), second.double()
    values = torch.linalg.svdvals(first)
    shares = values / values.sum().clamp(min=1e-12) + 1e-7
    one, two = F.normalize(first, dim=1), F.normalize(second, dim=1)
    spread = one.std(dim=0, correction=min(1, len(one) - 1)).mean() * first.shape[1] ** 0.5
    pairs = torch.pdist(one).square()
    return Monitor(
        effective_rank=torch.exp(-(shares * shares.log()).sum()).item(),
        feature_spread=spread.item(),
        alignment=(one - two).square().sum(1).mean().item(),
        uniformity=-torch.exp(-2 * pairs).mean().log().item() if len(pairs) else 0.0,
    )
