"""Self-supervised methods: a literal dictionary, one file each, and the one training loop."""

from collections.abc import Callable
from contextlib import nullcontext

import torch

from wardround.backbones import family_of
from wardround.config.federation import Recipe
from wardround.ssl.byol import BYOL
from wardround.ssl.dino import DINO
from wardround.ssl.ijepa import IJEPA
from wardround.ssl.mae import MAE
from wardround.ssl.method import Method
from wardround.ssl.moco import MoCo
from wardround.ssl.optimiser import freeze
from wardround.ssl.simclr import SimCLR
from wardround.ssl.simsiam import SimSiam
from wardround.ssl.spark import SparK
from wardround.ssl.travel import get_site_tensors, get_state, set_site_tensors, set_state, travelling
from wardround.ssl.undrawn import Undrawn
from wardround.ssl.vicreg import VICReg


def _masked_autoencoder(recipe: Recipe) -> Method:
    tokens = family_of(recipe.backbone.name).masking == "tokens"
    return MAE(recipe) if tokens else SparK(recipe)


METHODS: dict[str, Callable[[Recipe], Method]] = {
    "byol": BYOL,
    "dino": DINO,
    "ijepa": IJEPA,
    "mae": _masked_autoencoder,
    "moco": MoCo,
    "simclr": SimCLR,
    "simsiam": SimSiam,
    "vicreg": VICReg,
}


def build(recipe: Recipe, *, drawn: bool = True) -> Method:
    """Return the method's module with the initial weights that the recipe's seed gives.

    Where all of its state comes from elsewhere, `drawn=False` saves the drawing: what would be random is then
    zero. What stays at a site begins with constants, or as the student.
    """
    with torch.random.fork_rng(devices=[]), nullcontext() if drawn else Undrawn():  # the caller's own draws go on
        torch.manual_seed(recipe.seed)
        method = METHODS[recipe.method.name](recipe)
    freeze(method, recipe.backbone.frozen_stages)
    return method


__all__ = ["METHODS", "Method", "build", "get_site_tensors", "get_state", "set_site_tensors", "set_state", "travelling"]
