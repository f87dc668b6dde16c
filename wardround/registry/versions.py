"""Which software made a checkpoint."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("wardround", "torch", "timm", "flwr", "numpy", "safetensors")


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
