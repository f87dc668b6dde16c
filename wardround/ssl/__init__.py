"""Self-supervised methods: a literal dictionary, one file each, and the one training loop."""

from collections.abc import Callable

import torch

from wardround.config.federation import Recipe
from wardround.ssl.mae import MAE
from wardround.ssl.method import Method
from wardround.ssl.travel import get_site_tensors, get_state, set_site_tensors, set_state, travelling

METHODS: dict[str, Callable[[Recipe], Method]] = {"mae": MAE}


def build(recipe: Recipe) -> Method:
    """Return the method's module with the initial weights that the recipe's seed gives."""
    with torch.random.fork_rng(devices=[]):  # the caller's own draws go on as if nothing was built
        torch.manual_seed(recipe.seed)
        return METHODS[recipe.method.name](recipe)


__all__ = ["METHODS", "Method", "build", "get_site_tensors", "get_state", "set_site_tensors", "set_state", "travelling"]
