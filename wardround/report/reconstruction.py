"""The picture of a round: what a masked autoencoder makes of images that the coordinator owns."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wardround import ssl as methods
from wardround.config.federation import Recipe
from wardround.report.sheet import draw_sheet
from wardround.ssl.draws import generator
from wardround.ssl.mae import MAE, patchify, random_order, unpatchify
from wardround.ssl.spark import SparK
from wardround.ssl.views import normalise
from wardround.update import State


def draw_reconstructions(recipe: Recipe, state: State, images: NDArray[np.uint8], path: Path, title: str) -> bool:
    """Write a PNG of images, of what the encoder sees, and of the reconstruction; False where the method has none.

    images: [N, C, S, S]; the first eight are drawn, with the same masks in every round. Of volumes,
    [N, C, S, S, S], the middle slice is drawn.
    """
    shown = images[:8]
    panels = reconstructed(recipe, state, shown)
    if panels is None:
        return False
    seen, filled = panels
    pixels = torch.from_numpy(np.array(shown)).float() / 255.0
    draw_sheet({"image": pixels, "seen": seen, "reconstructed": filled}, path, title)
    return True


def reconstructed(recipe: Recipe, state: State, images: NDArray[np.uint8]) -> tuple[Tensor, Tensor] | None:
    """Return what the encoder sees of images and what it makes of it, or None where the method fills nothing in.

    [N, C, S, S] or [N, C, S, S, S] -> twice the same shape, in about [0, 1]; the same masks whatever the state.
    """
    method = methods.build(recipe, drawn=False)
    if not isinstance(method, MAE | SparK):
        return None
    methods.set_state(method, state)
    method.eval()
    with torch.no_grad():
        return _panels(method, recipe, torch.from_numpy(np.array(images)).float() / 255.0)


def _panels(method: MAE | SparK, recipe: Recipe, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the encoder sees (grey elsewhere) and the image with its hidden patches filled in."""
    patch = method.backbone.patch if isinstance(method, MAE) else method.patch
    channels = recipe.data.channels
    views = normalise(images, recipe.data)
    pixels, target = patchify(images, patch), patchify(views, patch)  # [N, T, P * P * C]
    order = random_order(len(images), pixels.shape[1], generator(recipe.seed, "report"))
    predicted = method.predict(views, order)
    if method.settings.normalised_pixels:
        # The network predicts each patch up to brightness and contrast; for the eye they are put back.
        predicted = predicted * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)
    std, mean = (
        torch.tensor(constant).repeat(pixels.shape[2] // channels) for constant in (recipe.data.std, recipe.data.mean)
    )
    visible = torch.zeros(pixels.shape[:2]).scatter_(1, order[:, : method.num_visible], 1.0).unsqueeze(-1)
    seen = pixels * visible + 0.5 * (1 - visible)
    filled = pixels * visible + (predicted * std + mean) * (1 - visible)
    return unpatchify(seen, patch, channels), unpatchify(filled, patch, channels)
