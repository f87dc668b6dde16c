"""Wardround: hospitals pretrain one imaging backbone together; no image leaves a hospital."""

import os
from typing import Any

__version__ = "0.1.0"

# Before torch is imported: on a machine that does anything else, OpenMP's threads spin while they
# wait for one another, and a training step took 8 times as long (benchmarks/LOG.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Before mlflow and onnxruntime are imported, here or by a program that we start: nothing phones home.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime's, which goes to Microsoft


def __getattr__(name: str) -> Any:
    """Give `load_backbone` and `load_segmenter`, imported when they are asked for: torch and timm take seconds."""
    if name == "load_backbone":
        from wardround.downstream.load import load_backbone

        return load_backbone
    if name == "load_segmenter":
        from wardround.downstream.monai_encoders import load_segmenter

        return load_segmenter
    raise AttributeError(f"module 'wardround' has no attribute '{name}'")
