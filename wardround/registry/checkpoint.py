"""Checkpoints: a state, the server optimiser's state and a manifest that vouches for both."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from wardround.errors import CheckpointError, UpdateError
from wardround.registry.durable import new_folder, write_file, write_tensors
from wardround.update import State, state_hash, unpack

MANIFEST = "manifest.json"
STATE, SERVER, STEP = "state.safetensors", "server.safetensors", "step.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What a round commits."""

    round: int  # 0 is the initial state
    protocol: str  # protocol digest
    state: State
    server: State  # the server's own tensors: its optimiser's, and the residual of what it sends
    record: dict[str, Any]  # who took part and how: what the manifest shows a person
    step: State = field(default_factory=dict)  # encoded, from the state before; empty where none is sent
    named: str = ""  # the state's hash, where a manifest says it

    @cached_property
    def hash(self) -> str:
        """The state's hash, which takes a while and is asked for at every hand-over."""
        return self.named or state_hash(self.state)


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Commit a checkpoint: the folder appears whole or not at all."""
    files = {STATE: checkpoint.state, SERVER: checkpoint.server} | ({STEP: checkpoint.step} if checkpoint.step else {})
    hashes: dict[str, str] = {}
    with new_folder(folder) as aside:
        for name, tensors in files.items():
            write_tensors(aside / name, tensors)
            with (aside / name).open("rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
        manifest = {
            "format": 1,
            "round": checkpoint.round,
            "protocol": checkpoint.protocol,
            "state": checkpoint.hash,
            "files": hashes,
            "record": checkpoint.record,
        }
        write_file(aside / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode())


def read(folder: Path) -> Checkpoint:
    """Return a committed checkpoint. Raises CheckpointError where a file is missing, cut or altered."""
    manifest = read_manifest(folder)
    tensors: dict[str, State] = {STEP: {}}
    for name in (STATE, SERVER, *({STEP} & manifest["files"].keys())):
        try:
            block = (folder / name).read_bytes()
            if hashlib.sha256(block).hexdigest() != manifest["files"][name]:
                raise CheckpointError(_damaged(folder, f"'{name}' differs from its hash in the manifest"))
            tensors[name] = unpack(block)[0]
        except (OSError, KeyError, UpdateError) as error:
            raise CheckpointError(_damaged(folder, f"'{name}' cannot be read")) from error
    round, protocol, record, named = (manifest[key] for key in ("round", "protocol", "record", "state"))
    return Checkpoint(round, protocol, tensors[STATE], tensors[SERVER], record, tensors[STEP], named)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest without its tensors. Raises CheckpointError."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        if not manifest.keys() >= {"round", "protocol", "state", "files", "record"}:
            raise CheckpointError(_damaged(folder, "its manifest lacks fields"))
    except (OSError, ValueError) as error:
        raise CheckpointError(_damaged(folder, "its manifest cannot be read")) from error
    return manifest


def _damaged(folder: Path, what: str) -> str:
    return f"checkpoint {folder}: {what}; it is damaged. Restore it from a copy, or remove its round to train it again."
