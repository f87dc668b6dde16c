"""What only the process of the rounds knows of its sites, in a small file for whoever looks: RUN/live.json.

It is written aside and renamed, so a reader never sees a part of it, and not fsynced: it tells of this
moment, and nothing is taken up from it after a power cut but when a site was last seen.
"""

import json
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

EVERY = 5.0  # seconds between two words where nothing changes
_FILE = "live.json"


@dataclass(frozen=True)
class Now:
    """A moment of a federation; times are seconds since 1970."""

    at: float = 0.0
    online: list[str] = field(default_factory=list)
    seen: dict[str, float] = field(default_factory=dict)  # site -> when it was last connected
    asked: dict[str, tuple[int, float]] = field(default_factory=dict)  # who has a task -> its round, its deadline
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)  # site -> the round it gave nothing for, and why
    until: float | None = None  # sites are waited for to connect, at the longest until then


class Live:
    """The writer's side: one file, written where something changed, or every few seconds."""

    def __init__(self, run: Path) -> None:
        self.run, self.last = run, read_live(run)
        self._said: dict[str, object] = {}

    @property
    def due(self) -> bool:
        """Whether it is time for a word even if nothing changed."""
        return not 0 <= time.time() - self.last.at < EVERY

    def tell(self, now: Now) -> None:
        """Say how things stand. A disk that refuses is no reason to stop a round."""
        said = {key: value for key, value in asdict(now).items() if key not in ("at", "seen")}
        if said == self._said and not self.due:
            return
        self._said, self.last = said, now
        with suppress(OSError):
            handle, name = tempfile.mkstemp(prefix=f".{_FILE}.", dir=self.run)  # mode 0600
            with os.fdopen(handle, "w") as file:
                json.dump(asdict(now), file)
            Path(name).replace(self.run / _FILE)


def read_live(run: Path) -> Now:
    """Return the last word of a run's process; an empty one where there is none."""
    try:
        return Now(**json.loads((run / _FILE).read_bytes()))
    except (OSError, ValueError, TypeError):  # of another release
        return Now()
