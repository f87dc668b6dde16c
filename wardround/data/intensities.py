"""Numbers to intensities on [0, 1], and an image of any size to the square that is trained on."""

from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wardround.data.facts import Frame

Values = NDArray[np.float32]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow and TV have it
_SAMPLED = 65_536  # pixels that a percentile is taken from: its error is far below a grey level


def windowed(values: Values, centre: float, width: float, function: str = "LINEAR") -> Values:
    """Return values seen through a display window, on [0, 1] (DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3).

    >>> windowed(np.array([0, 20, 60], np.float32), 40, 41).tolist()
    [0.0, 0.012500000186264515, 1.0]
    """
    if function == "SIGMOID":
        steepness = np.clip(-4 * (values - np.float32(centre)) / np.float32(width), -80, 80)
        return np.asarray(1 / (1 + np.exp(steepness)), np.float32)
    if function == "LINEAR":  # the standard's half-pixel shift: the lowest and highest value count as pixels
        centre, width = centre - 0.5, width - 1
    scaled = (values - np.float32(centre - width / 2)) / np.float32(max(width, 1e-6))
    return np.clip(scaled, 0, 1, out=scaled)


def stretched(values: Values, reference: Values | None = None) -> Values:
    """Return values with the 0.5th percentile at 0 and the 99.5th at 1; NaN and infinities become 0 and 1.

    The percentiles are those of the finite numbers of `reference`, or of the values themselves.
    """
    flat = (values if reference is None else reference).reshape(-1)
    step = max(1, flat.size // _SAMPLED)
    while gcd(step, flat.size) > 1:  # one that shares a factor with the width would see some of the columns alone
        step += 1
    flat = flat[::step]
    finite = flat[np.isfinite(flat)]
    low, high = np.percentile(finite, (0.5, 99.5)) if finite.size else (0.0, 0.0)
    if high <= low:  # nearly all pixels alike: the few others are the picture
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    with np.errstate(all="ignore"):  # infinities and NaN are expected, and clipped below
        scaled = (values.astype(np.float32, copy=False) - np.float32(low)) / np.float32(max(high - low, 1e-30))
    return np.clip(np.nan_to_num(scaled, copy=False, nan=0.0, posinf=1.0, neginf=0.0), 0, 1, out=scaled)


def shown_volume(values: Values, window: tuple[float, float] | None) -> Values:
    """Return a volume on [0, 1]: through a window, or stretched between its percentiles."""
    if window is not None:
        return windowed(np.nan_to_num(values), *window)
    return stretched(values, coarse(values))


def coarse(volume: NDArray[Any]) -> Values:
    """Return a grid of about a million voxels to take percentiles from: a copy of all would double the memory."""
    step = max(1, round((volume.size / 2**20) ** (1 / 3)))
    with np.errstate(all="ignore"):  # what is beyond float32's range becomes infinite
        return np.asarray(volume[::step, ::step, ::step], np.float32)


def to_square(frame: Frame, size: int, channels: int) -> NDArray[np.uint8]:
    """Return a frame [H, W, C] as [channels, size, size] bytes, 0..255 for [0, 1].

    The whole image is squeezed into the square, antialiased: nothing at its border is lost, and views
    change the aspect ratio anyway. One byte a pixel is what a display shows after windowing, and a
    quarter of float32's memory and bandwidth.
    """
    if frame.shape[2] == 3 and channels == 1:
        frame = (frame @ _LUMA)[:, :, None]
    planes = [_resized(frame[:, :, plane], size) for plane in range(frame.shape[2])]
    square = np.rint(np.stack(planes) * 255).clip(0, 255).astype(np.uint8)
    return np.repeat(square, 3, axis=0) if channels == 3 and len(planes) == 1 else square


def _resized(plane: Values, size: int) -> Values:
    """Return a plane [H, W] as [size, size], by a triangle filter as wide as the reduction."""
    if plane.shape == (size, size):
        return plane
    image = Image.fromarray(np.ascontiguousarray(plane, np.float32))  # float32 gives mode "F"
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
