"""Self-supervised methods: a literal dictionary, one file each, and the one training loop."""

from collections.abc import Callable

import numpy as np
import torch

from wardround.config.federation import Recipe
from wardround.ssl.mae import MAE
from wardround.ssl.method import Method
from wardround.update import State

METHODS: dict[str, Callable[[Recipe], Method]] = {"mae": MAE}


def build(recipe: Recipe) -> Method:
    """Return the method's module with the initial weights that the recipe's seed gives."""
    with torch.random.fork_rng(devices=[]):  # the caller's own draws go on as if nothing was built
        torch.manual_seed(recipe.seed)
        return METHODS[recipe.method.name](recipe)


def get_state(method: Method) -> State:
    """Return a copy of what travels: every parameter of backbone and head, float32."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in method.state_dict().items()}


def set_state(method: Method, state: State) -> None:
    """Load what travels into the module, in place; names and shapes are those of `get_state`."""
    method.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state.items()})


__all__ = ["METHODS", "Method", "build", "get_state", "set_state"]
