"""ONNX, in float32 and in int8: the only file that knows onnx and onnxruntime.

Which int8 is by the network: products of activations, as attention has them, are quantised as they come (dynamic);
convolutions by ranges that images show beforehand (static). The other way round either is slower or loses more.
"""

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from wardround.errors import ConfigError

Floats = NDArray[np.float32]
CALIBRATED_ON = 64  # images
_BATCH = 16


def write(model: nn.Module, path: Path, images: Floats) -> Callable[[Floats], Floats]:
    """Write a float32 graph, input `images`, output `features`, any number of images at once; return what runs it.

    Raises ConfigError where the extra is not installed.
    """
    _installed()
    dynamic = {"images": {0: torch.export.Dim("batch")}}
    with _quiet():
        torch.onnx.export(
            model,
            (torch.from_numpy(images[:2]),),
            str(path),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=dynamic,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return _runner(path)


def write_int8(model: nn.Module, path: Path, images: Floats) -> Callable[[Floats], Floats]:
    """Write a graph whose large products are of int8; the rest stays float32.

    A network that `convolves` takes its ranges from `images`, which must then be such as it will see.
    """
    _installed()
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(quantization.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            shown = images[:CALIBRATED_ON]
            self.batches = iter([shown[start : start + _BATCH] for start in range(0, len(shown), _BATCH)])

        def get_next(self) -> dict[str, Floats] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    with tempfile.TemporaryDirectory() as aside, _quiet():
        whole, ready = Path(aside) / "whole.onnx", Path(aside) / "ready.onnx"
        write(model, whole, images)
        quant_pre_process(str(whole), str(ready))
        if convolves(model):
            quantization.quantize_static(
                str(ready),
                str(path),
                Images(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "Gemm", "MatMul"],  # it fails on the reshapes of group normalisation
                per_channel=True,
            )
        else:
            quantization.quantize_dynamic(str(ready), str(path), weight_type=quantization.QuantType.QInt8)
    return _runner(path)


def convolves(model: nn.Module) -> bool:
    """Return whether most of a network's weights are in convolutions."""
    sizes = {
        kind: sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, kind))
        for kind in (nn.Conv2d, nn.Conv3d, nn.Linear)
    }
    return sizes[nn.Conv2d] + sizes[nn.Conv3d] > sizes[nn.Linear]


def _runner(path: Path) -> Callable[[Floats], Floats]:
    """Return onnxruntime's run of a graph, on one thread of the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(batch: Floats) -> Floats:
        out: Floats = session.run(["features"], {"images": batch})[0]
        return out

    return run


def _installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError("--format onnx: onnx is not installed; pip install 'wardround[onnx]'.") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what exporter and quantiser log of their own steps."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
