"""Rounds that wait for nobody: FedBuff (Nguyen et al. 2022, arXiv:2106.06639) as a mode of the durable loop.

A round is one commit of a buffer: the first K updates that come, whatever round each was asked in. Who is
in it is asked again from the state that it made; the others train on, and count less in a later round.

An update's key is its site and the round that it was asked in. A site is asked once for each round, and
anew only when its update is committed or refused: so a buffer has one update of it at the most, and its
site memory goes on from what was folded, as in rounds that wait.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from wardround.errors import UpdateError
from wardround.registry.checkpoint import Checkpoint, read_manifest
from wardround.server import cohort
from wardround.server.rounds import Tally, ledger_of, newest_heads, take, tasks_of, too_few
from wardround.server.run_folder import RunFolder
from wardround.server.spool import Closed, Spool
from wardround.update import Refusal, Task

log = logging.getLogger(__name__)


class Post(Protocol):
    """How sites are asked one by one."""

    def idle(self) -> list[str]:
        """Return the connected sites that have nothing to answer, by name."""

    def send(self, tasks: Mapping[str, Task]) -> None:
        """Send each site its task, as far as it is connected."""

    def busy(self) -> bool:
        """Return whether an answer is still out."""

    def receive(self) -> tuple[str, bytes | Refusal] | None:
        """Return the next answer, or None where none has come for a moment. Who is silent too long is refused."""

    def wait_for(self, sites: list[str], least: int) -> Mapping[str, int]:
        """Return which sites are connected, as soon as so many are or the patience is over."""


def fill(run: RunFolder, last: Checkpoint, spool: Spool, number: int, post: Post) -> Closed:
    """Return the decision on a round: ask whoever is idle, check and keep what comes, close with the K-th update.

    Raises UpdateError where nobody is left to wait for.
    """
    buffer = Buffer(run, last, spool, number)
    while not buffer.full:
        post.send(buffer.tasks(post.idle()))
        if not post.busy() and not post.wait_for(buffer.left, 1):
            raise buffer.too_few()
        if came := post.receive():
            buffer.take(*came)
    return buffer.close()


class Buffer:
    """A round while it is open."""

    def __init__(self, run: RunFolder, last: Checkpoint, spool: Spool, number: int) -> None:
        self.run, self.last, self.spool, self.number = run, last, spool, number
        self.members = cohort.choose(run.config, list(run.members), number)
        self.tally, self.dropped = Tally(), dict[str, int]()
        self.over, self.whole = set[str](), set[str]()  # who gave nothing for this round; who lacks a step's beginning
        opened = spool.cohort()
        asked = last.record.get("training", {}) if opened is None else opened
        # Who was asked in which round and has not answered: from disk, so that a restart asks the same again.
        self.training: dict[str, int] = {site: asked[site] for site in self.left if site in asked}

    @property
    def left(self) -> list[str]:
        """The sites that may still give an update for this round, by name."""
        return sorted(set(self.members) - set(self.spool.arrived()) - self.over)

    @property
    def full(self) -> bool:
        """Whether as many updates are here as make a round."""
        return len(self.spool.arrived()) >= (self.run.config.membership.buffer or 1)

    def tasks(self, idle: list[str]) -> dict[str, Task]:
        """Return what to ask of idle sites: what a restart interrupted once more, of all others this round."""
        ready = [site for site in self.left if site in idle]
        if new := [site for site in ready if site not in self.training]:
            self.training |= dict.fromkeys(new, self.number)
            self.spool.open(self.training)  # on disk before anybody is asked
        tasks: dict[str, Task] = {}
        kinds = {(self.training[site], site in self.whole) for site in ready}
        for base, whole in sorted(kinds):
            sites = [site for site in ready if (self.training[site], site in self.whole) == (base, whole)]
            tasks |= tasks_of(self.run, self._before(base), base, sites, whole)
        self.tally.sent += sum(len(task.state) for task in tasks.values())
        return tasks

    def take(self, site: str, answer: bytes | Refusal) -> None:
        """Spool an update, or note why there is none; what nobody waits for, such as one that came before, is left."""
        base = self.training.pop(site, None)
        if base is None:
            return
        if isinstance(answer, Refusal) and answer.code == "state" and site not in self.whole:
            self.whole.add(site)
            self.training[site] = base
            return
        shapes, most = self.last.state.layout, self.run.config.membership.max_staleness
        if isinstance(answer, bytes) and most is not None and self.number - base > most:
            self.tally.ledgers |= ledger_of(self.run, site, shapes, answer)
            answer = self._drop(site, base)
        start = read_manifest(self.run.round(base - 1) / "checkpoint")["state"]
        take(self.run, self.spool, self.tally, site, base, shapes, start, answer)
        if base == self.number and site in self.tally.refused:
            self.over.add(site)  # the same round, asked again at once, would go the same way

    def too_few(self) -> UpdateError:
        """Return the error of a round that nobody is left to fill."""
        absent = Refusal("silent", f"was not connected after {self.run.config.membership.wait_seconds:.0f} s")
        refused = dict.fromkeys(self.left, absent) | self.tally.refused
        needed = self.run.config.membership.buffer or 1
        return too_few(self.number, self.spool, len(self.members), needed, refused)

    def close(self) -> Closed:
        """Decide what is in this round, and who goes on training for a later one."""
        tally = self.tally
        return self.spool.close(tally.refused, tally.ledgers, tally.received, tally.sent, self.training, self.dropped)

    def _before(self, base: int) -> Checkpoint:
        """Return the checkpoint that a round is asked from, with the newest that is known of the sites' ledgers."""
        start = self.last if base == self.number else self.run.checkpoint(base - 1)
        heads = newest_heads(self.last.record.get("ledgers", {}), self.tally.ledgers)
        return replace(start, record={**start.record, "ledgers": heads})

    def _drop(self, site: str, base: int) -> Refusal:
        """Count an update that is too old, and say so."""
        self.dropped[site] = base
        before = sum(len(self.run.record(number).get("dropped", {})) for number in self.run.committed()[1:])
        log.warning(
            "warning: site '%s': its update of round %d came %d rounds late and is dropped (%d so far); raise "
            "[membership] max_staleness where that happens often",
            site,
            base,
            self.number - base,
            before + len(self.dropped),
        )
        return Refusal("stale", f"its update of round {base} came {self.number - base} rounds late")
