"""A round that is being trained, as far as it has come: what a site that was cut off goes on from.

Every draw is a function of (seed, site, step), so a round that goes on from here ends with the same bits.
With noise of a patient or image it would not be the same round: there it starts anew, and is charged anew.
"""

from dataclasses import dataclass
from pathlib import Path

from wardround.errors import UpdateError
from wardround.registry.durable import write_tensors
from wardround.update import State, unpack

_PARTS = ("state", "site", "moments")


@dataclass(frozen=True)
class Midway:
    """What training has made of a round's first steps."""

    losses: list[float]  # one a step that is done
    state: State  # what travels
    site: State  # what stays at the site, such as a teacher
    moments: State  # the optimiser's


def write(path: Path, start: str, midway: Midway) -> None:
    """Keep a round's first steps; `start` is the hash of the state that it began from."""
    tensors = {f"{part}.{name}": a for part in _PARTS for name, a in getattr(midway, part).items()}
    write_tensors(path, tensors, {"start": start, "losses": midway.losses})


def read(path: Path, start: str) -> Midway | None:
    """Return what was kept of a round from this very start, or None: of another, damaged, or nothing."""
    try:
        tensors, header = unpack(path.read_bytes())
    except (OSError, UpdateError):
        return None
    if header.get("start") != start:
        return None
    parts: dict[str, State] = {part: {} for part in _PARTS}
    for name, array in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = array
    return Midway(header["losses"], **parts)
