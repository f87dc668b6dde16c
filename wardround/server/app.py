"""The coordinator's end of Flower: the durable loop over a Grid, the same in one process and over the network."""

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from wardround.server.rounds import run_rounds
from wardround.server.run_folder import RunFolder, open_run
from wardround.server.tracking import Tracking
from wardround.update import Refusal, Task
from wardround.wire import message_to_answer, task_to_records

log = logging.getLogger(__name__)
app = ServerApp()

POLL_SECONDS = 0.2


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation of the run folder that the run config names."""
    run_federation(grid, open_run(Path(str(context.run_config["run-folder"]))))


def run_federation(grid: Grid, run: RunFolder, key: EllipticCurvePrivateKey | None = None) -> None:
    """Run a federation to its end, record it and register its backbone; `key` signs what sites are asked."""
    fleet = Fleet(grid, run, key)
    tracking = Tracking(run)
    run_rounds(run, fleet.ask, tracking.committed)
    tracking.register()


class Fleet:
    """The sites behind a Grid, each known by the public key that it connected with."""

    def __init__(self, grid: Grid, run: RunFolder, key: EllipticCurvePrivateKey | None) -> None:
        self.grid, self.key = grid, key
        self.keys = {site: _public_key(member) for site, member in run.members.items()}
        self.sites = {key.encode(): site for site, key in run.members.items()}
        membership = run.config.membership
        self.patience = membership.wait_seconds
        self.deadline = membership.round_seconds or membership.wait_seconds
        self.late: dict[str, tuple[str, int]] = {}  # message -> site and round of answers that are still out
        self.dropped = 0

    def ask(self, tasks: Mapping[str, Task]) -> Iterator[tuple[str, bytes | Refusal]]:
        """Yield the answers to the tasks as they come; who stays silent is refused as silent."""
        nodes = self.wait_for(list(tasks))
        for site in sorted(tasks.keys() - nodes.keys()):
            yield site, Refusal("silent", f"was not connected after {self.patience:.0f} s")
        messages = [
            Message(
                task_to_records(tasks[site], site, self.key),
                dst_node_id=node,
                message_type="train",
                group_id=str(tasks[site].round),
            )
            for site, node in nodes.items()
        ]
        waiting = dict(zip(self.grid.push_messages(messages), nodes, strict=True))
        deadline = time.monotonic() + self.deadline
        while waiting and time.monotonic() < deadline:
            # One at a time, so that no more than one update is in memory.
            for message_id in list(waiting):
                for reply in self.grid.pull_messages([message_id]):
                    site = waiting.pop(message_id)
                    yield site, message_to_answer(reply, site, str(tasks[site].round), self.keys[site])
            if waiting:
                self.drop_late()
                time.sleep(POLL_SECONDS)
        for message_id, site in waiting.items():
            self.late[message_id] = (site, tasks[site].round)
            yield site, Refusal("silent", f"sent nothing for {self.deadline:.0f} s")

    def drop_late(self) -> None:
        """Take what has come for rounds that are over, so that it lies nowhere, and say so."""
        for message_id, (site, number) in list(self.late.items()):
            for _ in self.grid.pull_messages([message_id]):
                del self.late[message_id]
                self.dropped += 1
                log.warning(
                    "warning: site '%s': its answer to round %d came after the round was over and is dropped "
                    "(%d so far); raise [membership] round_seconds where that happens often",
                    site,
                    number,
                    self.dropped,
                )

    def wait_for(self, sites: list[str]) -> dict[str, int]:
        """Return the node of each site that is connected; wait for all of them, but not for ever."""
        deadline = time.monotonic() + self.patience
        said = 0.0
        while True:
            online = {
                self.sites[node.public_key]: node.node_id
                for node in self.grid.get_nodes()
                if node.public_key in self.sites
            }
            nodes = {site: online[site] for site in sorted(sites) if site in online}
            left = deadline - time.monotonic()
            if len(nodes) == len(sites) or left <= 0:
                return nodes
            if time.monotonic() - said > 10:
                said = time.monotonic()
                log.warning("waiting for %s (%.0f s left)", ", ".join(sorted(set(sites) - set(nodes))), left)
            time.sleep(POLL_SECONDS)


def _public_key(member: str) -> EllipticCurvePublicKey | None:
    """Return a member's key; none of a site of this process, whose name stands in a key's place."""
    if not member.startswith("-----BEGIN"):
        return None
    key = load_pem_public_key(member.encode())
    assert isinstance(key, EllipticCurvePublicKey), "Flower takes no other"
    return key
