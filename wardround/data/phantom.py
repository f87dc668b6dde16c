"""Chest-like phantoms: anatomy that varies by patient, pose and exposure that vary by image, four findings.

They look like X-rays only as far as a method needs: large structures at varying places, fine texture,
and findings that are told apart by shape and texture rather than by any single pixel.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

Plane = NDArray[np.float32]  # [G, G], about 0..1, bright where X-rays are absorbed

FINDINGS = ("consolidation", "effusion", "nodule", "normal")
_GRID = 128  # drawn at this size; scanners resample to their own matrix


@dataclass(frozen=True)
class Anatomy:
    """One patient: all lengths in half image widths."""

    body: tuple[float, float]  # half width and half height of the trunk
    lung: tuple[float, float]
    lung_apart: float  # from the midline to a lung's axis
    heart: tuple[float, float, float]  # x, y, radius
    rib_spacing: float
    rib_phase: float
    spine_tilt: float
    side: int  # of the finding: -1 or 1
    spot: tuple[float, float]  # of the finding within a lung, each -1..1
    finding: str
    texture: int  # seed of the tissue's texture, the same in all images of the patient


def draw_anatomy(finding: str, rng: Generator) -> Anatomy:
    """Return a patient with a finding."""
    return Anatomy(
        body=(rng.uniform(0.78, 0.98), rng.uniform(1.0, 1.25)),
        lung=(rng.uniform(0.27, 0.36), rng.uniform(0.52, 0.68)),
        lung_apart=rng.uniform(0.37, 0.45),
        heart=(rng.uniform(0.05, 0.16), rng.uniform(0.22, 0.36), rng.uniform(0.20, 0.32)),
        rib_spacing=rng.uniform(0.15, 0.21),
        rib_phase=rng.uniform(0, 2 * np.pi),
        spine_tilt=rng.uniform(-0.08, 0.08),
        side=int(rng.choice((-1, 1))),
        spot=(rng.uniform(-0.55, 0.55), rng.uniform(-0.7, 0.6)),
        finding=finding,
        texture=int(rng.integers(2**32)),
    )


def draw_image(patient: Anatomy, rng: Generator, tilt: float | None = None) -> Plane:
    """Return one exposure of a patient, [128, 128] on [0, 1], in a pose of its own; `tilt` sets its degrees."""
    x, y = _coordinates(rng, tilt)
    tissue = np.random.default_rng(patient.texture)
    coarse, fine = _noise(6, tissue), _noise(28, tissue)
    body = _inside(np.hypot(x / patient.body[0], (y - 0.15) / patient.body[1]), 0.05)
    lungs = np.maximum(_lung(patient, -1, x, y), _lung(patient, 1, x, y))
    image = body * (0.62 + 0.10 * coarse) - lungs * (0.36 + 0.05 * coarse)
    image += lungs * 0.07 * fine  # vessels
    image += body * _skeleton(patient, x, y, lungs)
    heart_x, heart_y, radius = patient.heart
    image += 0.27 * _inside(np.hypot((x - heart_x) / radius, (y - heart_y) / (1.15 * radius)), 0.12)
    image += _finding(patient, x, y, coarse, fine)
    return _exposed(image, x, y, rng)


def resized(image: Plane, height: int, width: int) -> Plane:
    """Return an image resampled to another matrix."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _coordinates(rng: Generator, tilt: float | None) -> tuple[Plane, Plane]:
    """Return x to the right and y downwards on about [-1, 1], seen in a random pose."""
    line = np.linspace(-1, 1, _GRID, dtype=np.float32)
    x, y = np.meshgrid(line, line)
    drawn, zoom = rng.uniform(-9, 9), rng.uniform(0.88, 1.12)
    angle = np.deg2rad(drawn if tilt is None else tilt)
    shift_x, shift_y = rng.uniform(-0.10, 0.10, 2)
    cos, sin = np.float32(np.cos(angle) / zoom), np.float32(np.sin(angle) / zoom)
    return cos * (x - shift_x) - sin * (y - shift_y), sin * (x - shift_x) + cos * (y - shift_y)


def _inside(radius: Plane, softness: float) -> Plane:
    """Return 1 within radius 1 and 0 beyond, with an edge of this softness."""
    return np.asarray(1 / (1 + np.exp(np.clip((radius - 1) / softness, -30, 30))), np.float32)


def _lung(patient: Anatomy, side: int, x: Plane, y: Plane) -> Plane:
    """Return the mask of a lung: an ellipse, narrow at the apex and cut by the diaphragm."""
    width, height = patient.lung
    apex = 1 - 0.35 * np.clip(-y, 0, 1)
    ellipse = np.hypot((x - side * patient.lung_apart) / (width * apex), (y + 0.05) / height)
    diaphragm = 0.42 + 0.25 * (x - side * patient.lung_apart) ** 2 / width - 0.04 * (side == -1)
    return np.multiply(_inside(ellipse, 0.06), _inside(1 + y - diaphragm, 0.02))


def _skeleton(patient: Anatomy, x: Plane, y: Plane, lungs: Plane) -> Plane:
    """Return the brightness of ribs, vertebrae and clavicles."""
    arch = y + 0.35 * x**2 + 0.12 * np.abs(x)
    ribs = np.clip(np.sin(2 * np.pi * arch / patient.rib_spacing + patient.rib_phase), 0, 1) ** 3
    across = x - patient.spine_tilt * y
    spine = np.exp(-((across / 0.10) ** 2)) * (0.8 + 0.2 * np.sin(2 * np.pi * y / 0.16 + patient.rib_phase))
    clavicles = np.exp(-(((y + 0.62 - 0.25 * (np.abs(x) - 0.3)) / 0.035) ** 2)) * (np.abs(x) < 0.62) * (np.abs(x) > 0.1)
    return np.asarray(0.09 * ribs * (0.4 + 0.6 * lungs) + 0.20 * spine + 0.13 * clavicles, np.float32)


def _finding(patient: Anatomy, x: Plane, y: Plane, coarse: Plane, fine: Plane) -> Plane:
    """Return the brightness that the patient's finding adds."""
    side, (across, along) = patient.side, patient.spot
    lung = _lung(patient, side, x, y)
    centre_x = side * patient.lung_apart + across * patient.lung[0]
    centre_y = -0.05 + along * 0.75 * patient.lung[1]
    if patient.finding == "nodule":
        radius = 0.055 + 0.03 * abs(across)
        return np.float32(0.30) * _inside(np.hypot(x - centre_x, y - centre_y) / np.float32(radius), 0.12)
    if patient.finding == "consolidation":
        cloud = np.exp(-(((x - centre_x) / 0.20) ** 2) - ((y - centre_y) / 0.24) ** 2)
        return np.asarray(0.34 * lung * np.clip(1.6 * cloud + 0.5 * coarse + 0.35 * fine - 0.45, 0, 1), np.float32)
    if patient.finding == "effusion":
        level = 0.22 - 0.22 * along
        meniscus = level - 0.55 * np.clip(side * x - patient.lung_apart, 0, 1) ** 2 / patient.lung[0]
        return np.float32(0.33) * lung * _inside(1 + meniscus - y, 0.025)
    return np.zeros_like(x)


def _exposed(image: Plane, x: Plane, y: Plane, rng: Generator) -> Plane:
    """Return the image under a random exposure, with a gradient and, at times, a cable or a marker."""
    if rng.random() < 0.4:  # what lies on the patient says nothing of the finding
        slope, offset = rng.uniform(-1.2, 1.2), rng.uniform(-0.5, 0.5)
        image = image + np.float32(0.2) * np.exp(-(((y - np.float32(slope) * x - np.float32(offset)) / 0.018) ** 2))
    if rng.random() < 0.4:
        left, top = rng.choice((-0.85, 0.72)), rng.uniform(-0.9, -0.6)
        image = image + 0.5 * ((x > left) & (x < left + 0.12) & (y > top) & (y < top + 0.12))
    slope_x, slope_y = rng.uniform(-0.05, 0.05, 2)
    gamma, gain = rng.uniform(0.8, 1.25), rng.uniform(0.85, 1.1)
    return np.asarray(np.clip(gain * (image + slope_x * x + slope_y * y) + 0.04, 0, 1) ** gamma, np.float32)


def _noise(cells: int, rng: Generator) -> Plane:
    """Return smooth noise of about unit range, [G, G]: so many cells across, interpolated."""
    grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return resized(grid, _GRID, _GRID)
