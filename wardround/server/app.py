"""The coordinator's end of Flower: the durable loop over a Grid, the same in one process and over the network."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from flwr.app import Context, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from wardround.config.hours import after
from wardround.errors import UpdateError
from wardround.server.buffer import fill
from wardround.server.live import Live, Now
from wardround.server.roster import Roster
from wardround.server.rounds import run_rounds
from wardround.server.run_folder import RunFolder, open_run, reread
from wardround.server.tracking import Tracking
from wardround.update import Refusal, Task
from wardround.wire import block_record, message_to_answer, task_to_records

log = logging.getLogger(__name__)
app = ServerApp()

POLL_SECONDS = 0.2
# Flower's word for a site that has gone since it was asked, and for an answer that broke off on the way.
LEFT = {ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE}
MESSAGES = {"task": "train", "evaluation": "evaluate"}  # Flower's name of a task's message
REVOKED = Refusal("revoked", "takes part no more")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation of the run folder that the run config names."""
    run_federation(grid, open_run(Path(str(context.run_config["run-folder"]))))


def run_federation(
    grid: Grid,
    run: RunFolder,
    key: EllipticCurvePrivateKey | None = None,
    roster: Roster | None = None,
    release_key: Ed25519PrivateKey | None = None,
) -> None:
    """Run a federation to its end, record it and register its backbone; `key` signs what sites are asked.

    With a roster, its members change while it runs, as the coordinator signs. `release_key` signs the release.
    """
    fleet = Fleet(grid, run, key, roster)
    tracking = Tracking(run, release_key)
    tracking.open()

    def committed(number: int) -> None:
        tracking.committed(number)
        fleet.take_over()

    run_rounds(run, fleet.ask, committed, partial(fill, post=fleet))
    tracking.register()


class Sent(NamedTuple):
    """A task that a site has not answered; answers that are there at once are taken in this order."""

    round: int
    site: str
    deadline: float  # of time.monotonic
    task: Task
    asked: bool = True  # False of a site that was not there yet


class Fleet:
    """The sites behind a Grid, each known by the public key that it connected with."""

    def __init__(
        self, grid: Grid, run: RunFolder, key: EllipticCurvePrivateKey | None, roster: Roster | None = None
    ) -> None:
        self.grid, self.key, self.roster = grid, key, roster
        self.out: dict[str, Sent] = {}  # by the message's number
        self.away: dict[str, Sent] = {}  # by the site, which is asked once it is there, and replays what it has
        self.late: dict[str, tuple[str, int]] = {}  # site and round of those past their deadline, without the state
        self.dropped = 0
        self.live = Live(run.path)
        self.seen = dict(self.live.last.seen)  # site -> when it was last connected
        self.connected: list[str] = []
        self.missing: list[str] = []  # who was last said to be waited for; when that is said again, and after that
        self.say_at, self.pause = 0.0, 0.0
        self.waiting_since = time.monotonic()  # for an answer: the last one came then, or the last task went out
        self.rounds: dict[str, int] = {}  # site -> the round that it was last asked in
        self.refused: dict[str, tuple[int, str]] = {}  # site -> the round that it gave nothing for, and why
        self.meet(run)

    def meet(self, run: RunFolder) -> None:
        """Know from now on the sites that take part in a run."""
        self.run = run
        self.keys = {site: _public_key(member) for site, member in run.members.items()}
        self.sites = {key.encode(): site for site, key in run.members.items()}
        membership = run.config.membership
        self.patience = membership.wait_seconds
        self.deadline = membership.round_seconds or membership.wait_seconds
        self.hours = membership.hours

    def take_over(self) -> None:
        """Take over, between rounds, the membership that was signed since."""
        if self.roster is not None:
            self.roster.take_over()
            before = self.run.members
            self.meet(reread(self.run))
            same = {site for site, key in self.run.members.items() if before.get(site) == key}
            self.out = {message_id: sent for message_id, sent in self.out.items() if sent.site in same}

    def revoked(self, sites: Iterable[str]) -> list[str]:
        """Return which of some sites take part no more; who was revoked since is cut off."""
        if self.roster is not None and self.roster.cut_off():
            self.meet(reread(self.run))
        return sorted(set(sites) - self.keys.keys())

    def ask(self, tasks: Mapping[str, Task]) -> Iterator[tuple[str, bytes | Refusal]]:
        """Yield the answers to the tasks as they come; who is not there, or stays silent, is refused as silent."""
        online = self.online()
        for site in sorted(tasks.keys() - online.keys()):
            task = tasks[site]
            self.rounds[site] = task.round
            self.away[site] = Sent(task.round, site, self._until(site, self.patience), task, asked=False)
        self._push(tasks, {site: online[site] for site in sorted(tasks) if site in online})
        while self.busy():
            if (came := self.receive()) is not None:
                yield came

    def idle(self) -> list[str]:
        """Return the connected sites that have no task, by name."""
        return sorted(self.online().keys() - {sent.site for sent in self.out.values()} - self.away.keys())

    def send(self, tasks: Mapping[str, Task]) -> None:
        """Send each site its task, as far as it is connected."""
        if tasks:
            online = self.online()
            self._push(tasks, {site: online[site] for site in sorted(tasks) if site in online})

    def busy(self) -> bool:
        """Return whether an answer is still waited for."""
        return bool(self.out or self.away)

    def receive(self) -> tuple[str, bytes | Refusal] | None:
        """Return the next answer, or None where none has come for a moment; who is silent too long is refused."""
        came = self._next()
        if came is not None and isinstance(came[1], Refusal):
            self.refused[came[0]] = (self.rounds.get(came[0], 0), f"{came[1].code}: {came[1].text}")
        self._tell()
        return came

    def _next(self) -> tuple[str, bytes | Refusal] | None:
        self.drop_late()
        for site in self.revoked([*self.away, *(sent.site for sent in self.out.values())]):
            self.away.pop(site, None)
            self.out = {message_id: sent for message_id, sent in self.out.items() if sent.site != site}
            return site, REVOKED
        # One at a time, so that no more than one update is in memory.
        for message_id, sent in sorted(self.out.items(), key=lambda item: item[1][:3]):
            if (reply := self._reply(message_id)) is not None:
                del self.out[message_id]
                self.waiting_since = time.monotonic()  # the others may be close behind
                if isinstance(reply, Refusal):
                    return sent.site, reply
                if not (reply.has_error() and reply.error.code in LEFT):
                    return sent.site, message_to_answer(reply, sent.site, sent.task.name, self.keys[sent.site])
                self.away[sent.site] = sent
            elif time.monotonic() > sent.deadline:
                del self.out[message_id]
                self.late[message_id] = (sent.site, sent.round)
                return sent.site, Refusal("silent", f"sent nothing for {self.deadline:.0f} s")
        online = self.online() if self.away else {}
        for site, sent in sorted(self.away.items()):
            if site in online:
                del self.away[site]
                self._push({site: sent.task}, {site: online[site]}, sent.deadline if sent.asked else None)
            elif time.monotonic() > sent.deadline:
                del self.away[site]
                word = "went, and was not back for" if sent.asked else "was not connected after"
                return site, Refusal("silent", f"{word} {self.deadline if sent.asked else self.patience:.0f} s")
        self._say_missing({site: sent.deadline for site, sent in self.away.items() if not sent.asked})
        time.sleep(pause(time.monotonic() - self.waiting_since))
        return None

    def _reply(self, message_id: str) -> Message | Refusal | None:
        """Return the reply to a message, None where there is none yet; a refusal for one that Flower cannot read."""
        try:
            return next(iter(self.grid.pull_messages([message_id])), None)
        except UpdateError as error:  # it is taken all the same: SuperLink would have none, were it asked again
            return Refusal("invalid", str(error))

    def drop_late(self) -> None:
        """Take what has come for rounds that are over, so that it lies nowhere, and say so."""
        for message_id, (site, number) in list(self.late.items()):
            if self._reply(message_id) is not None:
                del self.late[message_id]
                self.dropped += 1
                log.warning(
                    "warning: site '%s': its answer to round %d came after the round was over and is dropped "
                    "(%d so far); raise [membership] round_seconds where that happens often",
                    site,
                    number,
                    self.dropped,
                )

    def wait_for(self, sites: list[str], least: int) -> dict[str, int]:
        """Return the node of each site that is connected, as soon as so many are; wait, but not for ever."""
        until = {site: self._until(site, self.patience) for site in sites}
        while True:
            online, gone = self.online(), self.revoked(sites)
            nodes = {site: online[site] for site in sorted(sites) if site in online and site not in gone}
            missing = {site: until[site] for site in sites if site not in nodes and site not in gone}
            if len(nodes) >= min(least, len(sites) - len(gone)) or time.monotonic() > max(missing.values()):
                return nodes
            self._say_missing(missing)
            self._tell(max(missing.values()))
            time.sleep(POLL_SECONDS)

    def _until(self, site: str, seconds: float) -> float:
        """Return when so many seconds of the hours that a site agreed to are over, as time.monotonic counts."""
        if site in self.hours:
            now = time.time()
            seconds = after(self.hours[site], now, seconds) - now
        return time.monotonic() + seconds

    def _say_missing(self, missing: Mapping[str, float]) -> None:
        """Say whom is waited for, by each one's deadline: at once where that has changed, then ever more rarely."""
        names, now = sorted(missing), time.monotonic()
        if names != self.missing:
            self.missing, self.say_at, self.pause = names, now, 10.0
        if names and now >= self.say_at:
            self.say_at, self.pause = now + self.pause, 2 * self.pause
            log.warning("waiting for %s (%.0f s left)", ", ".join(names), max(missing.values()) - now)

    def online(self) -> dict[str, int]:
        """Return the node of each member that is connected."""
        nodes = {node.public_key: node.node_id for node in self.grid.get_nodes()}
        found = {self.sites[key]: node for key, node in nodes.items() if key in self.sites}
        self.seen |= dict.fromkeys(found, time.time())
        self.connected = sorted(found)
        return found

    def _tell(self, until: float | None = None) -> None:
        """Say how things stand to whoever looks at the run folder; `until` is how long sites are waited for."""
        if self.live.due:
            self.online()
        now, ahead = time.time(), time.time() - time.monotonic()
        waited = [*self.out.values(), *self.away.values()]
        asked = {sent.site: (sent.round, float(round(ahead + sent.deadline))) for sent in waited if sent.asked}
        until = max([until or 0.0, *(sent.deadline for sent in waited if not sent.asked)])
        self.live.tell(
            Now(now, self.connected, self.seen, asked, self.refused, round(ahead + until) if until else None)
        )

    def _push(self, tasks: Mapping[str, Task], nodes: Mapping[str, int], deadline: float | None = None) -> None:
        blocks = {id(tasks[site].state): tasks[site].state for site in nodes}
        shared = {one: block_record(state) for one, state in blocks.items()}  # each of them once, for all its sites
        messages = [
            Message(
                task_to_records(tasks[site], site, self.key, shared[id(tasks[site].state)]),
                dst_node_id=node,
                message_type=MESSAGES[tasks[site].kind],
                group_id=tasks[site].name,
            )
            for site, node in nodes.items()
        ]
        sent = [
            Sent(tasks[site].round, site, deadline or self._until(site, self.deadline), tasks[site]) for site in nodes
        ]
        self.out |= zip(self.grid.push_messages(messages), sent, strict=True)
        self.waiting_since = time.monotonic()
        for one in sent:
            self.rounds[one.site] = one.round
            self.refused.pop(one.site, None)
        self._tell()


def pause(waited: float) -> float:
    """Return how long to wait before looking for answers again, after so many seconds without one.

    A look costs SuperLink a request for each site that is waited for, and a round at most a thirtieth of its time.

    >>> pause(1.0), pause(30.0), pause(3600.0)
    (0.2, 1.0, 2.0)
    """
    return min(10 * POLL_SECONDS, max(POLL_SECONDS, waited / 30))


def _public_key(member: str) -> EllipticCurvePublicKey | None:
    """Return a member's key; none of a site of this process, whose name stands in a key's place."""
    if not member.startswith("-----BEGIN"):
        return None
    key = load_pem_public_key(member.encode())
    assert isinstance(key, EllipticCurvePublicKey), "Flower takes no other"
    return key
