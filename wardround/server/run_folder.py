"""The run folder: one federation's whole life on the coordinator's disk.

federation.json    the config as resolved          rounds/00000/checkpoint/   the initial state
protocol.json      what the sites approved         rounds/00001/cohort.json   who was asked
members.json       who takes part, by which key   rounds/00001/updates/      what has come in
run.json           where it is tracked             rounds/00001/closed.json   who counts
                                                   rounds/00001/checkpoint/   the commit
"""

import json
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wardround.config import FederationConfig, Protocol, parse
from wardround.errors import CheckpointError, ConfigError
from wardround.registry import checkpoint
from wardround.registry.checkpoint import Checkpoint
from wardround.registry.durable import sync, write_file
from wardround.server.membership import Members, read_members, write_members

if TYPE_CHECKING:
    from wardround.plan import Plan  # loads torch, and a run folder is read without it

# What may lie in a folder before it is a whole run: a start that was cut off, or the sites of one process.
OURS = {"federation.json", "members.json", "run.json", "rounds", "sites", "hospitals"}
_OF_A_ROUND = {"sites", "refused", "bytes_sent", "bytes_received", "seconds"}  # what each round's record has


@dataclass(frozen=True)
class RunFolder:
    """A run folder that exists; make one with `create` or `open_run`."""

    path: Path
    config: FederationConfig
    protocol: Protocol
    members: dict[str, str]  # site name -> public key, as text
    tracking: str  # MLflow's URI
    id: str  # random: tells two runs of one protocol apart in MLflow
    start: str | None = None  # SHA-256 of the released weights that it started from

    @property
    def digest(self) -> str:
        """The protocol digest."""
        return self.protocol.digest()

    def round(self, number: int) -> Path:
        """Return a round's folder."""
        return self.path / "rounds" / f"{number:05d}"

    def committed(self) -> list[int]:
        """Return the committed rounds, ascending; 0, the initial state, is always the first."""
        rounds = self.path / "rounds"
        return sorted(int(p.parent.name) for p in rounds.glob("*/checkpoint") if p.parent.name.isdigit())

    def checkpoint(self, number: int) -> Checkpoint:
        """Return a committed round's checkpoint, verified. Raises CheckpointError."""
        found = checkpoint.read(self.round(number) / "checkpoint")
        if found.protocol != self.digest or found.round != number:
            raise CheckpointError(
                f"checkpoint {self.round(number)}: belongs to round {found.round} of protocol {found.protocol[:12]}, "
                f"expected round {number} of {self.digest[:12]}. It was moved; restore the right one."
            )
        return found

    def newest(self) -> Checkpoint:
        """Return the newest committed checkpoint that verifies; rounds whose checkpoint does not are set aside.

        Such a round is trained again: sites replay what they have. Raises CheckpointError where a second
        state would be another release of the same round, and where not even the initial state is whole.
        """
        *_, number = self.committed()
        try:
            return self.checkpoint(number)
        except CheckpointError as error:
            if number == 0:
                raise
            if self.config.privacy.unit == "site":
                raise CheckpointError(
                    f"{error} It cannot be trained again: with [privacy] unit = 'site' that releases the round twice."
                ) from error
            aside = self.round(number).with_name(f"damaged-{number:05d}-{secrets.token_hex(2)}")
            self.round(number).rename(aside)
            sync(aside.parent)
            print(f"warning: {error} It is set aside as {aside.name}; round {number} is trained again.", flush=True)
        return self.newest()

    def record(self, number: int) -> dict[str, Any]:
        """Return a committed round's record: sites, figures, seconds, bytes. Raises CheckpointError."""
        folder = self.round(number) / "checkpoint"
        record: dict[str, Any] = checkpoint.read_manifest(folder)["record"]
        if number and (lacking := sorted(_OF_A_ROUND - record.keys())):
            raise CheckpointError(checkpoint.damaged(folder, f"its record lacks '{lacking[0]}'"))
        return record

    def mark(self, number: int) -> Path:
        """Return the file that says which run of MLflow has a round."""
        return self.round(number) / "logged.json"

    def logged(self, number: int) -> str | None:
        """Return the id of the run of MLflow that has a round, as far as is known."""
        try:
            return str(json.loads(self.mark(number).read_bytes())["run"])
        except (OSError, ValueError, TypeError, KeyError):
            return None


def check_owner(path: Path, plan: "Plan") -> None:
    """Raise CheckpointError where a folder holds the run of another config, or something else."""
    if (path / "protocol.json").exists():
        found = _read(path / "protocol.json")
        if parse(found, Protocol, str(path / "protocol.json")).digest() != plan.digest:
            difference = _first_difference(found, plan.protocol.model_dump(mode="json"))
            raise CheckpointError(
                f"run folder {path}: belongs to another config ({difference}). "
                "Give another --out, or the config it began with."
            )
    elif path.exists() and any(child.name not in OURS for child in path.iterdir()):
        raise CheckpointError(f"run folder {path}: is not empty and no run of Wardround; give another --out.")


def create(path: Path, plan: "Plan", members: dict[str, str], tracking: str, version: int = 0) -> RunFolder:
    """Return the run folder of a plan, made if it is not there.

    Raises CheckpointError where the folder belongs to another config, ConfigError where the coordinator's public
    images are not here. Members and tracking may change; `version` is that of the signed membership that they are from.
    """
    chosen = plan.config.evaluation_set
    if chosen is not None and chosen.folder is not None and not chosen.folder.is_dir():
        raise ConfigError(f"[evaluation_set] folder = '{chosen.folder}': is no folder; name one, or leave it out.")
    check_owner(path, plan)
    known = _read(path / "run.json", "id")["id"] if (path / "run.json").exists() else secrets.token_hex(8)
    run = RunFolder(path, plan.config, plan.protocol, members, tracking, known, plan.start)
    write_members(path / "members.json", Members(version=version, settings=plan.config.membership, keys=members))
    write_file(path / "run.json", json.dumps({"tracking": tracking, "id": known, "start": plan.start}).encode())
    write_file(path / "federation.json", plan.config.model_dump_json(indent=2).encode())
    if 0 not in run.committed():
        checkpoint.write(run.round(0) / "checkpoint", 0, plan.digest, checkpoint.initial(plan.state))
    # Last: a folder with a protocol is a whole one.
    write_file(path / "protocol.json", plan.protocol.model_dump_json(indent=2).encode())
    return run


def open_run(path: Path) -> RunFolder:
    """Return the run folder at a path. Raises CheckpointError where there is none."""
    if not (path / "protocol.json").exists():
        raise CheckpointError(
            f"{path}: is no run folder (it has no protocol.json); give the --out of an earlier command."
        )
    config = parse(_read(path / "federation.json"), FederationConfig, str(path / "federation.json"))
    protocol = parse(_read(path / "protocol.json"), Protocol, str(path / "protocol.json"))
    said = _read(path / "run.json", "tracking", "id")
    return reread(RunFolder(path, config, protocol, {}, said["tracking"], said["id"], said.get("start")))


def reread(run: RunFolder) -> RunFolder:
    """Return a run as its members are now: they may change between two rounds.

    Raises ConfigError where what they changed to does not go with the rest of the config.
    """
    path = run.path / "members.json"
    found = read_members(path)
    if found.settings == run.config.membership:
        return replace(run, members=found.keys)
    changed = {**run.config.model_dump(mode="json"), "membership": found.settings.model_dump(mode="json")}
    return replace(run, config=parse(changed, FederationConfig, str(path)), members=found.keys)


def _read(path: Path, *needed: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        [content[key] for key in needed]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read; the run folder is damaged. Restore it from a copy.") from error
    return content


def _first_difference(found: Any, expected: Any, where: str = "") -> str:
    """Return the first value in which two protocols differ, as a person would look for it."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            if found.get(key) != expected.get(key):
                return _first_difference(found.get(key), expected.get(key), f"{where}.{key}" if where else key)
    return f"{where} is {found} there, {expected} here"
