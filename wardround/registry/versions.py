"""Which software made a checkpoint, and a release."""

import hashlib
import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

PACKAGES = ("wardround", "torch", "timm", "flwr", "numpy", "safetensors")
_HOME = Path(__file__).parent.parent  # the package; a checkout's root is above it


def versions() -> dict[str, str]:
    """Return the versions that bit-equality depends on, the processor and the thread count."""
    torch = sys.modules.get("torch")  # not loaded where nothing is trained
    found = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()) if torch else "none",
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # the training core also runs where flwr is not installed
            found[package] = "absent"
    return found


def software() -> dict[str, str]:
    """Return Wardround's version, one SHA-256 over its sources, and that of what it ran with.

    The latter is of the checkout's requirements.lock, or, where there is none, of the installed distributions.
    """
    sources = hashlib.sha256()
    for path in sorted(_HOME.rglob("*.py")):
        sources.update(
            f"{path.relative_to(_HOME).as_posix()}|{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    block, of = "\n".join("==".join(one) for one in installed()).encode(), "what is installed"
    lock = _HOME.parent / "requirements.lock"
    if lock.is_file():
        block, of = lock.read_bytes(), "requirements.lock"
    return {
        "wardround": version("wardround"),
        "sources": sources.hexdigest(),
        "lock": hashlib.sha256(block).hexdigest(),
        "lock_of": of,
    }


@cache
def installed() -> tuple[tuple[str, str], ...]:
    """Return every installed distribution's name, in lower case, and version, by name. Takes half a second once."""
    found = (one.metadata for one in distributions())
    return tuple(sorted({(one["Name"].lower().replace("_", "-"), one["Version"]) for one in found}))
