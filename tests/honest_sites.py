"""What tests of the durable loop share: a run folder, and three honest sites that train nothing."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from conftest import tiny

from wardround.encoding import inflate
from wardround.plan import resolve
from wardround.server.run_folder import RunFolder, create
from wardround.update import Declared, Refusal, Task, Update, layout, state_hash, unpack

SITES = ("lyon", "oslo", "wien")
MONITOR = {"effective_rank": 9.0, "feature_spread": 0.8, "alignment": 0.2, "uniformity": 2.0}
MEASURED = {"images": 10, "patients": 5, "loss_first": 1.0, "loss": 0.5, "seconds": 0.1, "drift": "none", **MONITOR}
DECLARED = Declared(steps=3, version="0.1.0", **MEASURED)


class Cut(BaseException):
    """The process ends here."""


def make_run(path: Path, **changes: Any) -> RunFolder:
    return create(path, resolve(tiny(**changes)), {site: site for site in SITES}, "")


class Sites:
    """Three honest sites: their update is a function of (site, round, state)."""

    def __init__(self, run: RunFolder, cut_after: int | None = None) -> None:
        self.run, self.cut_after, self.asked = run, cut_after, list[tuple[str, int]]()

    def __call__(self, tasks: Mapping[str, Task]) -> Iterator[tuple[str, bytes | Refusal]]:
        for number, site in enumerate(reversed(tasks)):
            if number == self.cut_after:
                raise Cut
            self.asked.append((site, tasks[site].round))
            yield site, self.answer(site, tasks[site])

    def answer(self, site: str, task: Task) -> bytes | Refusal:
        return self.update(site, task).to_bytes()

    def update(self, site: str, task: Task) -> Update:
        shapes = layout(self.run.checkpoint(0).state)
        state, _ = unpack(inflate(task.state, shapes, "float32", "the state"))
        draw = np.random.default_rng([*site.encode(), task.round])
        delta = {name: draw.normal(size=a.shape).astype(np.float32) for name, a in sorted(state.items())}
        declared = dataclasses.replace(DECLARED, images=len(site) + ord(site[0]))
        return Update(site, self.run.digest, task.round, state_hash(state), declared, delta)


def ignore(_: int) -> None:
    """Record nothing."""


def final(run: RunFolder) -> str:
    return state_hash(run.checkpoint(run.committed()[-1]).state)
