"""A released backbone as one file for other runtimes, and how far that file is from torch.

A file takes images in [0, 1], [B, C, S, S] float32 for any B, and gives features [B, D]: the declared mean and
standard deviation are part of it, so that nobody can forget them.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.config import Protocol
from wardround.data import procedural_set
from wardround.data.labelled import read_images
from wardround.data.labels import read_rows
from wardround.downstream import onnx_graph
from wardround.downstream.load import load_backbone, protocol_of, release_folder
from wardround.errors import ConfigError
from wardround.registry.durable import new_folder
from wardround.registry.release import WEIGHTS, file_hashes

Floats = NDArray[np.float32]
Runner = Callable[[Floats], Floats]  # images in [0, 1] [N, C, S, S] -> features [N, D]

MOST = 256  # images that are compared
BATCH = 16
SEED = 0
_BESIDE = {"provenance.json", "config.json", "README.md", "sbom.cdx.json"}  # of the release


@dataclass(frozen=True)
class Exported:
    """One file, measured against torch in float32 on the same images."""

    format: str
    file: str  # relative to the folder
    weights: str  # SHA-256 of the release's
    megabytes: float
    torch_megabytes: float  # of the release's weights
    images: int
    of: str  # which images
    largest_error: float  # of any feature
    least_cosine: float  # between an image's features here and there
    milliseconds: float  # an image on one thread, in batches of 16
    torch_milliseconds: float


@dataclass(frozen=True)
class Release:
    """What is exported."""

    folder: Path
    recipe: Protocol
    model: "FromPixels"  # its backbone, behind the declared normalisation


class FromPixels(nn.Module):
    """A backbone behind its declared normalisation: [B, C, S, S] in [0, 1] -> [B, D]."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, recipe: Protocol) -> None:
        super().__init__()
        self.backbone = backbone
        shape = (1, -1, *[1] * recipe.data.dimensions)
        self.register_buffer("mean", torch.tensor(recipe.data.mean).view(shape))
        self.register_buffer("std", torch.tensor(recipe.data.std).view(shape))

    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        out: Tensor = self.backbone((images - self.mean) / self.std)
        return out


def export(
    source: str | Path,
    format: str,
    to: Path,
    data: Path | None = None,
    uri: str | None = None,
    trust: str | None = None,
) -> Exported:
    """Write a backbone in a format as the folder `to`, beside its lineage and `parity.json`, and return the parity.

    `source`, `uri` and `trust` as for `load_backbone`. It is compared on at most 256 images of the labelled folder
    `data`, or on procedural ones; int8 of convolutions is also calibrated on the first 64 of them, and no image
    goes into the file. Raises ConfigError for a format that there is none of, a folder that is not empty, int8 of
    convolutions without `data`, and a network that a runtime cannot take.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: expected one of {', '.join(FORMATS)}.")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to}: is not empty; name a new folder.")
    with release_folder(source, uri, trust) as folder:
        recipe = protocol_of(folder)
        model = FromPixels(load_backbone(folder), recipe).eval().requires_grad_(False)
        if format == "onnx-int8" and data is None and onnx_graph.convolves(model):
            raise ConfigError(
                "--format onnx-int8: convolutions are calibrated on real images; give a folder by --data."
            )
        images, of = _images(recipe, data)
        weights = file_hashes(folder)[WEIGHTS]
        with new_folder(to) as aside:
            for path in folder.iterdir():
                if path.name in _BESIDE:
                    shutil.copy(path, aside)
            name, writer = FORMATS[format]
            try:
                runner = writer(Release(folder, recipe, model), aside / name, images)
            except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
                reason = " ".join(str(error).split())[:200]
                raise ConfigError(
                    f"backbone '{source}': cannot be exported as {format}: {reason}; take another format."
                ) from error
            found = Exported(
                format=format,
                file=name,
                weights=weights,
                megabytes=(aside / name).stat().st_size / 1e6,
                torch_megabytes=(folder / WEIGHTS).stat().st_size / 1e6,
                images=len(images),
                of=of,
                **_parity(model, runner, images),
            )
            (aside / "parity.json").write_text(json.dumps(asdict(found), indent=2) + "\n")
    return found


def _images(recipe: Protocol, data: Path | None) -> tuple[Floats, str]:
    """Return the images to compare on, [N, C, S, S] in [0, 1], and what they are."""
    if data is None and recipe.data.dimensions == 3:
        shape = (8, *recipe.data.shape)
        return np.random.default_rng(SEED).random(shape, np.float32), "volumes of noise"
    rng = np.random.default_rng(SEED)
    if data is None:
        made = procedural_set(64, SEED, recipe.data).images
        found = made[rng.permutation(len(made))[:MOST]]
    else:
        rows = read_rows(data)  # no column of labels: what the images show is not asked
        found = read_images(data, [rows[place] for place in rng.permutation(len(rows))[:MOST]], recipe.data)
    pixels: Floats = found.astype(np.float32) / 255.0
    return pixels, "procedural images" if data is None else "images of --data"


def _parity(model: nn.Module, runner: Runner, images: Floats) -> dict[str, float]:
    """Return how far features are from torch's, and how long both take, by `Exported`'s names."""
    expected, before = _timed(_in_torch(model), images)
    found, after = _timed(runner, images)
    norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
    cosines = (expected * found).sum(axis=1) / np.maximum(norms, 1e-12)
    return {
        "largest_error": float(np.abs(expected - found).max()),
        "least_cosine": float(cosines.min()),
        "milliseconds": after,
        "torch_milliseconds": before,
    }


def _timed(run: Runner, images: Floats) -> tuple[Floats, float]:
    """Return all features, and the milliseconds that an image took on one thread, after a batch to warm up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(images[:BATCH])
        begin = time.perf_counter()
        parts = [run(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        took = time.perf_counter() - begin
    finally:
        torch.set_num_threads(threads)
    return np.concatenate(parts), 1000 * took / len(images)


def _in_torch(model: nn.Module) -> Runner:
    """Return torch's run of a network."""

    def run(batch: Floats) -> Floats:
        with torch.inference_mode():
            out: Floats = model(torch.from_numpy(batch)).numpy()
        return out

    return run


def _onnx(release: Release, path: Path, images: Floats) -> Runner:
    return onnx_graph.write(release.model, path, images)


def _onnx_int8(release: Release, path: Path, images: Floats) -> Runner:
    return onnx_graph.write_int8(release.model, path, images)


def _monai(release: Release, path: Path, images: Floats) -> Runner:
    """Write a bundle, whose weights are the file; the normalisation is a transform of its own."""
    from wardround.downstream import monai_bundle  # MONAI takes seconds to import

    return monai_bundle.write(release.folder, release.recipe, release.model.backbone, path)


def _pt2(release: Release, path: Path, images: Floats) -> Runner:
    """Write the program of torch.export, which torch alone loads."""
    model = release.model
    batch = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (torch.from_numpy(images[:2]),), dynamic_shapes=batch)
    torch.export.save(program, path)
    return _in_torch(torch.export.load(path).module())


Writer = Callable[[Release, Path, Floats], Runner]
FORMATS: dict[str, tuple[str, Writer]] = {  # the file that holds the weights, and what writes it
    "onnx": ("model.onnx", _onnx),
    "onnx-int8": ("model.onnx", _onnx_int8),
    "pt2": ("model.pt2", _pt2),
    "monai": ("models/model.pt", _monai),
}
