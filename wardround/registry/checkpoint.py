"""Checkpoints: a state, the server optimiser's state and a manifest that vouches for both."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wardround.errors import CheckpointError, UpdateError
from wardround.registry.durable import new_folder, write_file
from wardround.registry.tensors import TensorFile, TensorWriter
from wardround.update import Array, Layout, StateHash, layout

MANIFEST = "manifest.json"
STATE, SERVER, STEP = "state.safetensors", "server.safetensors", "step.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What a round committed. Its tensors stay on disk; each is read when it is asked for."""

    round: int  # 0 is the initial state
    protocol: str  # protocol digest
    state: TensorFile
    server: TensorFile  # the server's own tensors: its optimiser's, and the residual of what it sends
    record: dict[str, Any]  # who took part and how: what the manifest shows a person
    step: Mapping[str, Array]  # encoded, from the state before; empty where none is sent
    hash: str  # the state's


@dataclass(frozen=True)
class Draft:
    """The tensors of a checkpoint to be: each is made, written and forgotten, so that no file is in memory whole."""

    layouts: Mapping[str, Layout]  # by file
    tensors: Iterable[tuple[str, str, Array]]  # file, name, tensor; those of the state in the order of their names


def initial(state: Mapping[str, Array]) -> Draft:
    """Return the draft of a state without anything beside it."""
    return Draft({STATE: layout(state), SERVER: {}}, ((STATE, name, state[name]) for name in sorted(state)))


def write(
    folder: Path, round: int, protocol: str, draft: Draft, record: Callable[[], dict[str, Any]] = dict
) -> Checkpoint:
    """Commit a checkpoint and return it: the folder appears whole or not at all.

    `record` is called when all tensors are written.
    """
    sha = StateHash()
    with new_folder(folder) as aside:
        with contextlib.ExitStack() as stack:
            files = {
                name: stack.enter_context(TensorWriter(aside / name, shapes)) for name, shapes in draft.layouts.items()
            }
            for file, name, array in draft.tensors:
                files[file].put(name, array)
                if file == STATE:
                    sha.add(name, array)
        manifest = {
            "format": 1,
            "round": round,
            "protocol": protocol,
            "state": sha.hexdigest(),
            "files": {name: file.hexdigest() for name, file in files.items()},
            "record": record(),
        }
        write_file(aside / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode())
    return _opened(folder, read_manifest(folder))


def read(folder: Path) -> Checkpoint:
    """Return a committed checkpoint. Raises CheckpointError where a file is missing, cut or altered."""
    manifest = read_manifest(folder)
    for name in {STATE, SERVER} | manifest["files"].keys():
        try:
            if _hash(folder / name) != manifest["files"][name]:
                raise CheckpointError(damaged(folder, f"'{name}' differs from its hash in the manifest"))
        except (OSError, KeyError) as error:
            raise CheckpointError(damaged(folder, f"'{name}' cannot be read")) from error
    return _opened(folder, manifest)


def _opened(folder: Path, manifest: Mapping[str, Any]) -> Checkpoint:
    """Return a checkpoint whose files are known to be whole."""
    try:
        files = {name: TensorFile(folder / name) for name in manifest["files"]}
    except (OSError, UpdateError) as error:
        raise CheckpointError(damaged(folder, "its tensors cannot be read")) from error
    round, protocol, record, named = (manifest[key] for key in ("round", "protocol", "record", "state"))
    return Checkpoint(round, protocol, files[STATE], files[SERVER], record, files.get(STEP, {}), named)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest without its tensors. Raises CheckpointError."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        if not manifest.keys() >= {"round", "protocol", "state", "files", "record"}:
            raise CheckpointError(damaged(folder, "its manifest lacks fields"))
        manifest["files"].keys(), manifest["record"].keys()
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(damaged(folder, "its manifest cannot be read")) from error
    return manifest


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(folder: Path, what: str) -> str:
    """Return what is said of a damaged checkpoint of a round; one that later rounds began from is not trained again."""
    number = folder.parent.name
    later = any(number < other.parent.name for other in folder.parent.parent.glob(f"[0-9]*/{folder.name}"))
    remedy = "; later rounds go on from it" if later else ", or remove its round to train it again"
    return f"checkpoint {folder}: {what}; it is damaged. Restore it from a copy{remedy}."
