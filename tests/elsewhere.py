"""A device that is not there: tensors that say they lie on another one, and are computed on this CPU.

A tensor that was left behind on the CPU is what breaks first on a GPU, and no machine that runs these tests has one.
Here both kinds meet as they would there: an operation on tensors of two devices is refused, but for numbers and
indices, and reading a value back is noted, since a GPU's queue would run empty over it. The device is called `meta`,
the only one that torch lets be named without a driver.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "meta"
_BETWEEN = {"aten.copy_.default", "aten._to_copy.default", "aten._local_scalar_dense.default"}


class Elsewhere(Tensor):
    """A tensor of the other device; `host` is where its numbers are."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "Elsewhere":
        """Return a tensor that looks like `host`, and no longer belongs to a graph."""
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype, device=NAME
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the CPU."""
        return _computed(function, args, kwargs or {})

    def tolist(self) -> Any:
        """Return the numbers, for which a GPU would be waited for."""
        waits.append("tolist")
        return self.host.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse, as CUDA's tensors do."""
        raise TypeError("can't convert a tensor of another device to numpy")


waits: list[str] = []  # values that were read back


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(function, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """What torch makes of Python's numbers below any operation that could be seen."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            made = function(*args, **kwargs)
            return Elsewhere(made) if device.type == NAME else made
        if function is Tensor.new_tensor and isinstance(args[0], Elsewhere):
            return Elsewhere(torch.tensor(args[1], dtype=kwargs.get("dtype") or args[0].dtype))
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            places = tuple(torch.tensor(one) if isinstance(one, list) else one for one in places)
            args = (args[0], places if isinstance(args[1], tuple) else places[0], *args[2:])
        return function(*args, **kwargs)


def _computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return an operation's result, on the device of its tensors or the one that is asked for."""
    given, name = tree_flatten((args, kwargs))[0], str(function)
    there = [one for one in given if isinstance(one, Elsewhere)]
    here = [one for one in given if isinstance(one, Tensor) and not isinstance(one, Elsewhere) and one.ndim > 0]
    indices = name.startswith("aten.index") and all(one.dtype in (torch.int64, torch.bool) for one in here)
    if there and here and name not in _BETWEEN and not indices:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    if name == "aten._local_scalar_dense.default" and there:
        waits.append(name)
    wanted = kwargs.get("device")
    to = bool(there) if wanted is None else torch.device(wanted).type == NAME
    if wanted is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args_here, kwargs_here = tree_map(lambda one: one.host if isinstance(one, Elsewhere) else one, (args, kwargs))
    found = function(*args_here, **kwargs_here)
    if name.split(".")[1].endswith("_"):  # in place
        return None if found is None else args[0]
    known = {id(one.host): one for one in there}

    def returned(one: Any) -> Any:
        if not isinstance(one, Tensor) or not to:
            return one
        return known[id(one)] if id(one) in known else Elsewhere(one)

    return tree_map(returned, found)


def move(module: nn.Module) -> nn.Module:
    """Move a module's parameters and buffers there; what is shared stays shared."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter, Elsewhere):
                new = moved.setdefault(
                    id(parameter), nn.Parameter(Elsewhere(parameter.detach()), parameter.requires_grad)
                )
                part._parameters[name] = new
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, Elsewhere):
                part._buffers[name] = Elsewhere(buffer)
    return module


@contextlib.contextmanager
def another_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `meta` be a device to compute on. What takes a driver is left out: fused steps, autocast, its own seed."""
    to, autocast, fork = nn.Module.to, torch.autocast, torch.random.fork_rng

    def moved(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device = kwargs.get("device", args[0] if args else None)
        there = isinstance(device, str | torch.device) and torch.device(device).type == NAME
        return move(module) if there else to(module, *args, **kwargs)

    def unfused(optimiser: type[torch.optim.Optimizer]) -> Callable[..., None]:
        made = optimiser.__init__
        return lambda *args, **kwargs: made(*args, **kwargs | {"fused": False, "foreach": False})

    def cast(device: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if device == NAME else autocast(device, *args, **kwargs)

    changes: dict[tuple[Any, str], Callable[..., Any]] = {
        (nn.Module, "to"): moved,
        (torch, "autocast"): cast,
        (torch, "inference_mode"): torch.no_grad,
        (torch.random, "fork_rng"): lambda devices=(), **kwargs: fork(devices=[], **kwargs),
        (torch.optim.AdamW, "__init__"): unfused(torch.optim.AdamW),
        (torch.optim.SGD, "__init__"): unfused(torch.optim.SGD),
    }
    waits.clear()
    with monkeypatch.context() as patch:
        for (place, name), change in changes.items():
            patch.setattr(place, name, change)
        with _Calls(), _Operations():
            yield
