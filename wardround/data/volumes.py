"""Volumes in one orientation and spacing, cut into the cubes that are trained on: MONAI's transforms.

Whatever the file's own axes, a cube's run from foot to head, from back to front and from left to
right [D, H, W]: a view's horizontal flip then mirrors left and right, as it does on a picture.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    CenterSpatialCrop,
    CropForeground,
    GaussianSmooth,
    Orientation,
    RandSpatialCropSamples,
    Spacing,
    SpatialPad,
)
from numpy.typing import NDArray
from torch import Tensor

from wardround.config.federation import DataConfig
from wardround.data import dicom_series, nifti
from wardround.data.dicom_series import Affine
from wardround.data.facts import MAX_VOXELS, ReadError
from wardround.data.intensities import Values
from wardround.data.readers import format_of, reasons

AXES = "SAR"  # towards superior, anterior, right: nibabel's letters


def random_cubes(paths: Sequence[Path], key: str, data: DataConfig) -> NDArray[np.uint8]:
    """Return the cubes that a volume gives, [cubes_per_volume, C, S, S, S]; 0..255 for [0, 1].

    `key` is the hash of the content: it seeds the places, so that the same files give the same
    cubes. Raises ReadError, and nothing else.
    """
    with reasons("voxels"):
        sampler = RandSpatialCropSamples(data.shape[1:], data.cubes_per_volume, random_size=False)
        sampler.set_random_state(seed=int(key[:8], 16))
        return np.stack([_bytes(cube, data) for cube in sampler(_volume(paths, data))])


def central_cube(path: Path, data: DataConfig) -> NDArray[np.uint8]:
    """Return the cube in the middle of a volume in one file: [C, S, S, S]. Raises ReadError, and nothing else."""
    with reasons("voxels"):
        return _bytes(CenterSpatialCrop(data.shape[1:])(_volume([path], data)), data)


def resampled(values: Values, affine: Affine, spacing: Sequence[float]) -> Tensor:
    """Return a volume [X, Y, Z] along AXES at a spacing in millimetres: [1, D, H, W].

    Blurred first along axes that lose resolution, as MONAI's Resize does it, so that fine structures
    do not turn into false coarse ones.
    """
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ReadError("damaged: its affine is no map from voxels to millimetres")
    volume = Orientation(AXES, labels=None)(MetaTensor(torch.from_numpy(values.copy())[None], torch.from_numpy(affine)))
    reductions = np.array(spacing) / volume.pixdim.numpy()
    if np.prod(np.array(volume.shape[1:]) / reductions) > MAX_VOXELS:
        raise ReadError("too large: at the agreed spacing it has more than 512 x 512 x 512 voxels")
    blurred = GaussianSmooth(np.maximum(0.0, (reductions - 1) / 2).tolist())(volume)
    out: Tensor = Spacing(spacing, padding_mode="border", dtype=torch.float32)(blurred)
    return out


def _volume(paths: Sequence[Path], data: DataConfig) -> Tensor:
    """Return a volume as cubes are cut from it: without the air around, and at least a cube large."""
    assert data.spacing is not None
    read = dicom_series.volume if format_of(paths[0]) == "DICOM" else nifti.volume
    values, affine = read(paths, data.window)
    if values.min() == values.max():
        raise ReadError("blank: all its voxels show the same value")
    whole = resampled(values, affine, data.spacing)
    body = CropForeground(lambda volume: volume > volume.mean(), allow_smaller=True)(whole)
    padded: Tensor = SpatialPad(data.shape[1:])(body)
    return padded


def _bytes(cube: Tensor, data: DataConfig) -> NDArray[np.uint8]:
    """Return [1, S, S, S] on [0, 1] as [C, S, S, S] bytes."""
    levels = np.rint(np.asarray(cube) * 255).clip(0, 255).astype(np.uint8)
    return np.repeat(levels, data.channels, axis=0)
