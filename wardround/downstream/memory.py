"""What is done where memory runs out: half as many images, once."""

from collections.abc import Callable
from typing import TypeVar

from wardround.errors import ConfigError
from wardround.ssl.engine import is_out_of_memory

Made = TypeVar("Made")


def smaller_once(work: Callable[[int], Made], batch_size: int, who: str, notes: list[str]) -> Made:
    """Return what `work` makes with so many images at once, or with half of them where memory runs out.

    The notes then say so. Raises ConfigError where it runs out again.
    """
    try:
        return work(batch_size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: the error's trace would keep the tensors of the first try alive.
    half = max(1, batch_size // 2)
    notes.append(f"{who}: memory ran out with {batch_size} images at once; done with {half}")
    try:
        return work(half)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"{who}: memory ran out with {batch_size} images at once, and again with {half}. Free some, or take a "
            "machine with more."
        ) from error
