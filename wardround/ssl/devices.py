"""Where a site trains: device, precision and several processes, by Lightning Fabric."""

import contextlib
import ctypes
import logging
import pickle
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.multiprocessing.spawn import ProcessException

from wardround.errors import ConfigError, WardroundError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Result = TypeVar("Result")
Job = TypeVar("Job")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed"}


@dataclass(frozen=True)
class Machine:
    """What of a site's hardware a round uses. It changes no gradient beyond rounding."""

    device: str = "cpu"  # cpu, cuda or cuda:N
    devices: int = 1  # processes, each with a device of its own
    threads: int = 0  # of each process; 0 means all
    micro_batch: int = 0  # images at once in each process; 0 means as many as memory takes
    checkpointing: bool = False  # compute activations again in the backward pass instead of keeping them


def checked_device(name: str, count: int = 1) -> str:
    """Return a device's name. Raises ConfigError for what is no such name, and for a GPU that is not seen here.

    `count` GPUs are wanted where the name has no number.
    """
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise ConfigError(f"device '{name}': expected cpu, cuda or cuda:N.")
    if name == "cpu":
        return name
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not seen:
        raise ConfigError(f"device '{name}': no GPU is seen here; take cpu, or mend the driver.")
    if max(count, int(name.partition(":")[2] or 0) + 1) > seen:
        wanted = f"devices = {count}" if count > 1 else f"device '{name}'"
        raise ConfigError(f"{wanted}: {seen} GPU(s) are seen here, cuda:0 to cuda:{seen - 1}; take of those, or cpu.")
    return name


def open_fabric(machine: Machine, precision: str) -> "Fabric":
    """Return the Fabric of this machine; its processes start with `launch`."""
    from lightning_fabric import Fabric  # takes a second, which commands that do not train need not wait for

    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)  # it would announce what the config says already
    kind, _, number = machine.device.partition(":")
    if kind == "cpu":
        keep_freed_memory()
    devices: int | list[int] = [int(number)] if number else machine.devices
    strategy = "ddp_spawn" if machine.devices > 1 else "auto"
    return Fabric(accelerator=kind, devices=devices, strategy=strategy, precision=_PRECISIONS[precision])  # type: ignore[arg-type]  # its literals


def keep_freed_memory() -> None:
    """Have this process's allocator keep what is freed; peak memory stays the same.

    glibc gives blocks above 32 MB back to the system at once, and each step gets them again page by page:
    a ResNet-18 step of 128 images took 1.15 to 1.3 times as long. Other allocators are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def launch(work: Callable[["Fabric", Job], Result], machine: Machine, precision: str, job: Job) -> Result:
    """Return what `work` returns in the first process; all of them run it. `job` is pickled where there are several."""
    fabric = open_fabric(machine, precision)
    if machine.devices == 1:
        return _work(fabric, work, machine, job)
    # By a file: Fabric waits for its processes before it reads their answer, so that a large one
    # never ends, and it takes answers apart, where it fails on frozen dataclasses.
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside)
        try:
            fabric.launch(partial(_to_file, folder, work, machine, job))
        except ProcessException:  # whatever was raised there comes as text, its class lost
            if (folder / "error").exists():
                raise pickle.loads((folder / "error").read_bytes()) from None  # noqa: S301  # of our own process
            raise
        result: Result = pickle.loads((folder / "result").read_bytes())  # noqa: S301  # of our own process
    return result


def _to_file(
    folder: Path, work: Callable[["Fabric", Job], Result], machine: Machine, job: Job, fabric: "Fabric"
) -> None:
    """Leave the first process's result on disk, or the error of ours that any process ends with."""
    try:
        result = _work(fabric, work, machine, job)
    except WardroundError as error:
        (folder / "error").write_bytes(pickle.dumps(error))
        raise
    if fabric.global_rank == 0:
        (folder / "result").write_bytes(pickle.dumps(result))


def _work(fabric: "Fabric", work: Callable[["Fabric", Job], Result], machine: Machine, job: Job) -> Result:
    if machine.threads:
        torch.set_num_threads(machine.threads)
    return work(fabric, job)
