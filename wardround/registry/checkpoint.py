"""Checkpoints: a state, the server optimiser's state and a manifest that vouches for both."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wardround.errors import CheckpointError, UpdateError
from wardround.registry.durable import new_folder, write_file
from wardround.update import State, pack, state_hash, unpack

MANIFEST = "manifest.json"
FILES = ("state.safetensors", "server.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What a round commits."""

    round: int  # 0 is the initial state
    protocol: str  # protocol digest
    state: State
    server: State  # the server optimiser's own tensors
    record: dict[str, Any]  # who took part and how: what the manifest shows a person


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Commit a checkpoint: the folder appears whole or not at all."""
    blocks = dict(zip(FILES, (pack(checkpoint.state, {}), pack(checkpoint.server, {})), strict=True))
    manifest = {
        "format": 1,
        "round": checkpoint.round,
        "protocol": checkpoint.protocol,
        "state": state_hash(checkpoint.state),
        "files": {name: hashlib.sha256(block).hexdigest() for name, block in blocks.items()},
        "record": checkpoint.record,
    }
    with new_folder(folder) as aside:
        for name, block in blocks.items():
            write_file(aside / name, block)
        write_file(aside / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode())


def read(folder: Path) -> Checkpoint:
    """Return a committed checkpoint. Raises CheckpointError where a file is missing, cut or altered."""
    manifest = read_manifest(folder)
    tensors = []
    for name in FILES:
        try:
            block = (folder / name).read_bytes()
            if hashlib.sha256(block).hexdigest() != manifest["files"][name]:
                raise CheckpointError(_damaged(folder, f"'{name}' differs from its hash in the manifest"))
            tensors.append(unpack(block)[0])
        except (OSError, KeyError, UpdateError) as error:
            raise CheckpointError(_damaged(folder, f"'{name}' cannot be read")) from error
    state, server = tensors
    return Checkpoint(manifest["round"], manifest["protocol"], state, server, manifest["record"])


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
