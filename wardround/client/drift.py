"""How far the images that came to a site later are from those that it began with, without labels.

At a protocol's first index the site counts what it sees. What is new at a later index is compared with
that: by intensity, contrast, size, modality, and where the backbone puts it. A distance is the largest
difference between two cumulative shares (the statistic of Kolmogorov and Smirnov), or, of modalities,
between two shares. Only a level leaves the site, and where privacy withholds what is measured, not even that.

    WORK/drift/<digest>.json   the counts, keyed hashes of the files that were there, and the last answer
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wardround import ssl as methods
from wardround.client import correction
from wardround.config import Protocol, SiteConfig
from wardround.data import SiteImages
from wardround.data.patients import pseudonym, read_salt
from wardround.data.selection import Origin
from wardround.registry.durable import write_file
from wardround.ssl.devices import Machine
from wardround.ssl.draws import generator
from wardround.update import DRIFT, State

log = logging.getLogger(__name__)
Counts = dict[str, Counter[Any]]  # statistic -> value -> images

_SOME, _STRONG = 0.25, 0.5  # of a distance, which is 0 to 1
_CHANCE = 1.95  # (-ln(0.001 / 2) / 2) ** 0.5, with which one statistic passes by chance once in a thousand times
_COUNTED, _EMBEDDED = 2048, 256  # images at most: a distance is then within 0.04, or 0.12
_BATCH = 64


def measured(site: SiteConfig, protocol: Protocol, state: State, images: SiteImages, machine: Machine) -> str:
    """Return the level of what is new among a site's images, one of DRIFT; more than none is a line in the site's log.

    Costs a look at up to 2048 images, and 512 through the backbone, when images have come; else next to nothing.
    """
    path = site.work / "drift" / f"{protocol.digest()[:16]}.json"
    salt = read_salt(site.work)
    files = [pseudonym(salt, f"file {origin.key}") for origin in images.origins]
    kept = _kept(path)
    if not kept:
        first = counts(images, drawn(protocol, np.arange(images.num_images), _COUNTED))
        kept = {"files": sorted(set(files)), "counts": {name: list(one.items()) for name, one in first.items()}}
        write_file(path, json.dumps(kept).encode())
    known = set(kept["files"])
    new = np.flatnonzero([file not in known for file in files])
    if not len(new):
        return DRIFT[0]
    asked = sha256("".join(sorted({files[row] for row in new})).encode()).hexdigest()
    if kept.get("asked") != asked:
        before = {name: Counter(dict(pairs)) for name, pairs in kept["counts"].items()}
        found = distances(before, counts(images, drawn(protocol, new, _COUNTED)))
        found["features"] = embedded(protocol, state, images, new, machine)
        levels = {name: level_of(*one) for name, one in found.items()}
        kept |= {"asked": asked, "level": max(levels.values(), key=DRIFT.index)}
        write_file(path, json.dumps(kept).encode())
        if far := [f"{name} {found[name][0]:.2f}" for name, level in levels.items() if level != DRIFT[0]]:
            log.warning(
                "site '%s': %d new images drift from the first ones, %s: %s (0 is alike, 1 wholly apart). Look at them "
                "with 'wardround site check'; a scanner or an export may have changed.",
                *(site.name, len(new), kept["level"], ", ".join(far)),
            )
    return str(kept["level"])


def _kept(path: Path) -> dict[str, Any]:
    """Return what is kept; nothing before the first index, or where the file is damaged: the next then counts as it."""
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found


def distances(first: Counts, second: Counts) -> dict[str, tuple[float, int, int]]:
    """Return each statistic's distance, and how many images it was taken from on either side."""
    return {
        name: (distance(one, second[name], ordered=name != "modality"), one.total(), second[name].total())
        for name, one in first.items()
    }


def distance(first: Mapping[Any, int], second: Mapping[Any, int], ordered: bool = True) -> float:
    """Return the largest difference between two distributions' shares, cumulated where values have an order: 0 to 1.

    >>> distance({1: 1, 2: 3}, {2: 2, 3: 2}), distance({"CT": 3, "MR": 1}, {"MR": 4}, ordered=False)
    (0.5, 0.75)
    """
    values = sorted({*first, *second})
    shares = [np.array([side.get(value, 0) for value in values]) / sum(side.values()) for side in (first, second)]
    gap = shares[0] - shares[1]
    return float(np.abs(np.cumsum(gap) if ordered else gap).max())


def level_of(distance: float, first: int, second: int) -> str:
    """Return the level of a distance between so many images; none where so few come that far by chance.

    Smirnov's bound for two samples; for a single share, Hoeffding's is the same.

    >>> level_of(0.6, 100, 50), level_of(0.4, 100, 50), level_of(0.2, 1000, 1000), level_of(0.9, 100, 3)
    ('strong', 'some', 'none', 'none')
    """
    if distance <= _CHANCE * ((first + second) / max(1, first * second)) ** 0.5:
        return DRIFT[0]
    return DRIFT[(distance > _SOME) + (distance > _STRONG)]


def counts(images: SiteImages, rows: NDArray[np.int64]) -> Counts:
    """Return how many of these images have each mean and spread of intensity, in 64 steps, side and modality."""
    found: Counts = {name: Counter() for name in ("intensity", "contrast", "side", "modality")}
    for part in np.array_split(rows, -(-len(rows) // _BATCH)):
        flat = images.images[part].reshape(len(part), -1)
        found["intensity"].update((flat.mean(axis=1) // 4).astype(int).tolist())
        found["contrast"].update((flat.std(axis=1) // 2).astype(int).tolist())
    origins: Sequence[Origin] = [images.origins[row] for row in rows]
    found["side"].update(origin.side for origin in origins)
    found["modality"].update(origin.modality for origin in origins)
    return found


def drawn(protocol: Protocol, rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return at most so many of these rows, drawn by the protocol's seed alone."""
    order = torch.randperm(len(rows), generator=generator(protocol.seed, "drift")).numpy()[:most]
    return np.sort(rows[order])


def embedded(
    protocol: Protocol, state: State, images: SiteImages, new: NDArray[np.int64], machine: Machine
) -> tuple[float, int, int]:
    """Return how differently far old and new images lie from the middle of the old ones, to the state's backbone.

    The middle is that of every second old image, and the others are compared with the new: what it was
    taken from would lie closer to it by that alone.
    """
    old = drawn(protocol, np.setdiff1d(np.arange(images.num_images), new), _EMBEDDED)
    if len(old) < 2:
        return 0.0, 0, 0
    if machine.threads:
        torch.set_num_threads(machine.threads)
    method = methods.build(protocol, drawn=False)
    methods.set_state(method, correction.parted(state)[0])
    backbone = method.backbone.to(machine.device).eval()
    shape = (1, -1, *[1] * (images.images.ndim - 2))
    mean, std = (torch.tensor(values).view(shape) for values in (protocol.data.mean, protocol.data.std))

    def features(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        parts = []
        with torch.inference_mode():
            for few in np.array_split(rows, -(-len(rows) // (machine.micro_batch or _BATCH))):
                batch = (torch.from_numpy(images.images[few]).float() / 255.0 - mean) / std
                parts.append(backbone.features(batch.to(machine.device)).double().cpu().numpy())
        return np.concatenate(parts)

    middle = features(old[::2]).mean(axis=0)
    rows = (old[1::2], drawn(protocol, new, _EMBEDDED))
    first, second = (np.linalg.norm(features(some) - middle, axis=1).tolist() for some in rows)
    return distance(Counter(first), Counter(second)), len(first), len(second)
