"""Which tensors of a method travel and which stay at the site."""

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from wardround.ssl.method import Method
from wardround.update import State

_AT_SITE = {  # Andreux et al. 2020 (arXiv:2008.07424); Li et al. 2021 (arXiv:2102.07623)
    "silobn": {"running_mean", "running_var"},
    "fedbn": {"running_mean", "running_var", "weight", "bias"},
}


def travelling(method: Method) -> list[str]:
    """Return the names of the state: backbone, head and their buffers, without what stays at the site."""
    staying = _AT_SITE[method.recipe.backbone.batch_norm] | {"num_batches_tracked"}
    kept = {
        f"{name}.{tensor}"
        for name, layer in method.named_modules()
        if isinstance(layer, _BatchNorm)
        for tensor in staying
    }
    return [name for name in method.state_dict() if not name.startswith("teacher.") and name not in kept]


def get_state(method: Method) -> State:
    """Return a copy of what travels, float32."""
    return _taken(method, set(travelling(method)))


def set_state(method: Method, state: State) -> None:
    """Load what travels into the module, in place; a teacher becomes the student.

    Names and shapes are those of `get_state`.
    """
    assert state.keys() == set(travelling(method))
    _give(method, state)
    if method.teacher is not None:
        method.teacher.reset(method.taught())


def get_site_tensors(method: Method) -> State:
    """Return a copy of what stays at the site: the teacher, and what batch normalisation keeps."""
    names = method.state_dict().keys() - travelling(method)
    return _taken(method, {name for name in names if not name.endswith("num_batches_tracked")})


def set_site_tensors(method: Method, tensors: State) -> None:
    """Load what `get_site_tensors` took, in place; a teacher that is not among it becomes the student."""
    _give(method, tensors)
    if method.teacher is not None and not any(name.startswith("teacher.") for name in tensors):
        method.teacher.reset(method.taught())  # again: the scale and shift of fedbn have come only now


def _taken(method: Method, names: set[str]) -> State:
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in method.state_dict().items() if name in names}


def _give(method: Method, tensors: State) -> None:
    wrong = method.load_state_dict({n: torch.from_numpy(np.array(a)) for n, a in tensors.items()}, strict=False)
    assert not wrong.unexpected_keys
