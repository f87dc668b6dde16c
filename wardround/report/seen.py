"""What the backbones of a federation's rounds make of the coordinator's own images, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]  # [N, H, W, C] in [0, 1]; of volumes the middle slices


@dataclass(frozen=True)
class Probe:
    """k-NN by round: balanced accuracy on the test split of the evaluation set."""

    by_round: Mapping[int, float]  # 0 is the state before the first round
    by_site: Mapping[str, Mapping[int, float]]  # on the test images of each site of the federation that the set names
    ends: tuple[float, float] | None  # of the 95 % interval of the newest round
    raw_pixels: float
    gallery: int  # images
    queries: int
    patients: int  # of the queries
    classes: int


@dataclass(frozen=True)
class Neighbours:
    """Images of the set, and what the newest backbone finds nearest to them among those of other patients."""

    lines: tuple[tuple[int, ...], ...]  # a query, then the nearest first, as places in `pixels`
    pixels: Pixels
    labels: tuple[str, ...]  # of each of `pixels`
    precision: float  # share of the five nearest with the query's label, over all queries
    chance: float
    queries: int


@dataclass(frozen=True)
class Reconstructions:
    """Images, what a masked autoencoder sees of them, and what it fills in."""

    images: Pixels
    seen: Pixels
    by_round: Mapping[int, Pixels]


@dataclass(frozen=True)
class Map:
    """Features of the newest round in two dimensions."""

    points: NDArray[np.float32]  # [N, 2]
    labels: NDArray[np.str_]  # [N]
    sites: NDArray[np.str_]  # [N]
    of: int  # features


@dataclass(frozen=True)
class Seen:
    """What could be seen; `missing` says of a part that is None why, by the part's name."""

    images: int  # in the whole set
    rank: Mapping[int, float] = field(default_factory=dict)  # effective rank by round
    probe: Probe | None = None
    neighbours: Neighbours | None = None
    reconstructions: Reconstructions | None = None
    map: Map | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
