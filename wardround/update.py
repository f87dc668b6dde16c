"""State and Update: what travels, as pure values, and the checks that anything from outside passes.

A state is a dictionary of named arrays. Both directions travel as one block of bytes in the
safetensors format, which holds names, shapes and numbers and can hold no code. The same bytes are
what the site journals, what is signed, what the server spools and what crosses: one encoding, four uses.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from safetensors.numpy import save_file

from wardround.config.privacy import PrivacyConfig, SitePrivacyConfig, UnitPrivacyConfig
from wardround.errors import UpdateError

Array = NDArray[Any]
State = dict[str, Array]  # name -> array of float32, of any shape
Layout = dict[str, tuple[tuple[int, ...], str]]  # name -> (shape, dtype)

META = "wardround"  # the one metadata key: safetensors writes several in no fixed order


# LENGTH:HASH; the ledger's with a seal of the site's.
_HEADS = {"ledger": r"[0-9]{1,9}:[0-9a-f]{64}([0-9a-f]{32})?", "audit": r"[0-9]{1,9}:[0-9a-f]{64}"}
DRIFT = ("none", "some", "strong")  # how far images that came later are from those that a site began with
# What is more comes from no honest site: of images, units or steps, and of what float32 holds. Python's whole numbers
# have no end, which math.isfinite has no word for; and of a loss of 1e308 nobody can draw a curve.
_MOST: dict[Any, float] = {int: 10**12, float: float(np.finfo(np.float32).max)}
_KINDS: dict[Any, str] = {int: "a whole number from 0", float: "a finite number from 0", str: "a short text"}
_BRACKETS = 100  # an update's header has two; a parser that meets thousands within each other gives up
_HEADER = 10_000_000  # bytes, ten times what names and shapes take: a parser makes a kilobyte of sixty bytes


@dataclass(frozen=True)
class Declared:
    """The fields that may leave a site beside its delta. What is not listed here cannot cross.

    Where `withholds` says so, what was measured on images is None: it would leave without noise. What
    then stands here follows from declared constants and the ledger alone.
    """

    steps: int  # local steps taken
    version: str  # Wardround's at the site
    images: int | None = None  # distinct images indexed
    patients: int | None = None  # distinct patients indexed
    loss_first: float | None = None  # mean loss over the first tenth of the round's steps; minus a cosine in some
    loss: float | None = None  # mean loss over the last tenth
    seconds: float | None = None  # wall time of training
    effective_rank: float | None = None  # the figures of probe.monitor.Monitor, over at most 256 images
    feature_spread: float | None = None
    alignment: float | None = None
    uniformity: float | None = None
    drift: str | None = None  # one of DRIFT
    units: int | None = None  # with a privacy unit at the site: the declared number of them
    epsilon: float | None = None  # spent in this federation so far, of the federation's unit, at its delta
    ledger: str | None = None  # length and head of the site's ledger, LENGTH:HASH, sealed by the site
    audit: str | None = None  # of its audit log, with this round's task; of what is in it, it tells nothing

    def __post_init__(self) -> None:
        """Raise UpdateError for values that no honest site sends; they come from outside."""
        for field in fields(self):
            value = getattr(self, field.name)
            kind, *may_lack = get_args(field.type) or (field.type,)
            if value is None and may_lack:
                continue
            least, expected = 0.0, _KINDS[kind]
            if field.name in ("loss", "loss_first"):
                least, expected = -_MOST[float], "a finite number"
            is_text = (
                isinstance(value, str) and len(value) <= (120 if field.name in _HEADS else 100) and value.isprintable()
            )
            if not (is_text if kind is str else _is_measure(value, kind, least)):
                raise UpdateError(f"declared field '{field.name}' is {str(value)[:40]!r}, expected {expected}.")
        for name, form in _HEADS.items():
            head = getattr(self, name)
            if head is not None and not re.fullmatch(form, head):
                raise UpdateError(f"declared field '{name}' is {head[:40]!r}, expected LENGTH:HASH.")
        if self.drift is not None and self.drift not in DRIFT:
            raise UpdateError(f"declared field 'drift' is {self.drift[:40]!r}, expected one of {', '.join(DRIFT)}.")

    @property
    def private(self) -> bool:
        """Whether nothing here was measured on images: what a patient- or image-level guarantee asks for."""
        return all(getattr(self, name) is None for name in MEASURED)

    @property
    def lacking(self) -> list[str]:
        """The measured fields that are None, by name: none where nothing is withheld."""
        return [name for name in MEASURED if getattr(self, name) is None]


_CONSTANT = {"steps", "version", "units", "epsilon", "ledger", "audit"}
MEASURED = [field.name for field in fields(Declared) if field.name not in _CONSTANT]


_LEAST_RANK, _LEAST_SPREAD = 1.5, 0.05


def collapsed(effective_rank: float, feature_spread: float) -> bool:
    """Return whether features are so much alike that all images look the same to the backbone."""
    return effective_rank < _LEAST_RANK or feature_spread < _LEAST_SPREAD


WITHHELD = "withheld"  # what a person reads in the place of a figure that stays at the sites


def withholds(privacy: PrivacyConfig) -> bool:
    """Return whether sites may declare nothing that was measured on images.

    So where the unit is a patient or an image, and where a site puts the noise on its own update: then
    the server is among those it is private against. With a site unit and noise at the server, the
    server is trusted with what is measured, which stays in its run folder.
    """
    at_site = isinstance(privacy, SitePrivacyConfig) and privacy.noise == "site"
    return at_site or isinstance(privacy, UnitPrivacyConfig)


@dataclass(frozen=True)
class Update:
    """What a site releases in a round: new minus old state, and its declared fields."""

    site: str
    protocol: str  # protocol digest
    round: int  # from 1
    state: str  # state_hash of the state that the site started from
    declared: Declared
    delta: State  # as `encoding` has it
    encoding: str = "float32"  # that of the protocol

    def to_bytes(self) -> bytes:
        """Return the update as one safetensors block; the same update gives the same bytes."""
        header = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("delta", "declared")}
        return pack(self.delta, {**header, "declared": asdict(self.declared)})

    @classmethod
    def from_bytes(cls, block: bytes) -> "Update":
        """Return the update in a block. Raises UpdateError where it is none, without running any of it."""
        delta, header = unpack(block)
        try:
            update = cls(**{**header, "declared": Declared(**header["declared"]), "delta": delta})
        except (TypeError, KeyError) as error:
            raise UpdateError("the update's header lacks or adds fields; the site runs another release.") from error
        for field in fields(cls):
            if field.type in (int, str) and type(getattr(update, field.name)) is not field.type:
                raise UpdateError(f"its header's '{field.name}' is no {field.type.__name__}; it was altered.")
        return update


def pack(tensors: Mapping[str, Array], header: Mapping[str, Any]) -> bytes:
    """Return named arrays and a JSON header as one safetensors block, bit-stable."""
    block: bytes = save_tensors(_in_order(tensors), metadata=_metadata(header))
    return block


def pack_file(path: Path, tensors: Mapping[str, Array], header: Mapping[str, Any]) -> None:
    """Write what `pack` returns without having it in memory. Raises OSError where the disk refuses."""
    try:
        save_file(_in_order(tensors), path, metadata=_metadata(header))
    except SafetensorError as error:  # it has no kind of its own for a full disk, whose number stands in its text
        found = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(found[1]), os.strerror(int(found[1]))) if found else OSError(str(error))) from error


def _in_order(tensors: Mapping[str, Array]) -> dict[str, Array]:
    return {name: np.asarray(array, order="C") for name, array in tensors.items()}


def _metadata(header: Mapping[str, Any]) -> dict[str, str]:
    return {META: json.dumps(header, sort_keys=True)}


def unpack(block: bytes) -> tuple[State, dict[str, Any]]:
    """Return the arrays and the header of a block. Raises UpdateError where it is cut or is none."""
    try:
        (length,) = struct.unpack("<Q", block[:8])
        if length > _HEADER:
            raise ValueError("has a header that is too long")
        tensors = load_tensors(block)
        text = json.loads(block[8 : 8 + length])["__metadata__"][META]
        if text.count("[") + text.count("{") > _BRACKETS:
            raise ValueError("is nested too deeply")
        header = json.loads(text)
    except (SafetensorError, struct.error, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UpdateError(
            f"a block of {len(block)} bytes is no whole update or state; it was cut or altered."
        ) from error
    if not isinstance(header, dict):
        raise UpdateError("the block's header is no object; it was altered.")
    return tensors, header


def state_hash(state: Mapping[str, Array]) -> str:
    """Return the SHA-256 over names, shapes, dtypes and bytes, whatever the order of the names."""
    sha = StateHash()
    for name in sorted(state):
        sha.add(name, state[name])
    return sha.hexdigest()


class StateHash:
    """The hash of a state whose tensors come one by one, in the order of their names."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def add(self, name: str, tensor: Array) -> None:
        """Take a tensor."""
        array = np.asarray(tensor, order="C")  # ascontiguousarray would make scalars 1-d
        self._sha.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        self._sha.update(array.data)

    def hexdigest(self) -> str:
        """Return the hash of what has come."""
        return self._sha.hexdigest()


def printable(text: str) -> str:
    """Return a text from outside as one line that moves no cursor: a person reads it in a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _is_measure(value: Any, kind: Any, least: float) -> bool:
    """Return whether a value is a number of the kind, from the least to the kind's most, and no truth value."""
    numbers = int if kind is int else (int, float)
    return isinstance(value, numbers) and not isinstance(value, bool) and least <= value <= _MOST[kind]


def layout(state: Mapping[str, Array]) -> Layout:
    """Return the shape and dtype of every array.

    >>> layout({"w": np.zeros((2, 3), np.float32)})
    {'w': ((2, 3), 'float32')}
    """
    return {name: (tuple(array.shape), array.dtype.name) for name, array in state.items()}


LARGEST = 1000.0  # root mean square of a tensor, of a state or of its change; trained networks stay below ten


def check_tensors(who: str, tensors: Mapping[str, Array], expected: Layout) -> None:
    """Raise UpdateError unless the tensors are exactly those expected, all numbers finite and bounded."""
    remedy = "Its backbone differs from the federation's; compare its protocol digest with 'wardround check'."
    if missing := sorted(expected.keys() - tensors.keys()):
        raise UpdateError(f"{who}: lacks {len(missing)} of {len(expected)} tensors (first: '{missing[0]}'). {remedy}")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise UpdateError(f"{who}: has {len(extra)} tensors too many (first: '{extra[0][:80]}'). {remedy}")
    for name, (shape, dtype) in expected.items():
        array = tensors[name]
        if tuple(array.shape) != shape or array.dtype.name != dtype:
            found = f"{array.dtype.name}{list(array.shape)}"
            raise UpdateError(f"{who}: tensor '{name}' is {found}, expected {dtype}{list(shape)}. {remedy}")
        if not np.isfinite(array).all():
            raise UpdateError(f"{who}: tensor '{name}' holds NaN or infinity. Its training diverged; it is not folded.")
        check_size(who, name, array)


def check_size(who: str, name: str, array: Array) -> None:
    """Raise UpdateError for a tensor that has blown up: no site would train from the state that it leads to."""
    if array.dtype.kind != "f":  # a count, or codes whose scales are looked at
        return
    with np.errstate(over="ignore"):
        size = float(np.linalg.norm(array)) / max(1, array.size) ** 0.5
    if size > LARGEST:
        raise UpdateError(
            f"{who}: tensor '{name}' has a root mean square of {size:.3g}, expected at most {LARGEST:g}; its training "
            "diverged, or somebody made it up."
        )


class Start(NamedTuple):
    """A state that a round begins from, and its hash, which takes a while."""

    state: State
    hash: str
    step: State | None = None  # encoded, by which it came from the state before


TaskKind = Literal["task", "evaluation"]


@dataclass(frozen=True)
class Task:
    """What the server asks of one site in one round: to train on its images, or to evaluate on its labels."""

    round: int  # from 1
    protocol: str  # the protocol as canonical JSON, from which the site computes the digest itself
    last_folded: int  # the last round in which this site's update counted; 0 for none
    state: bytes  # the packed state to start from; or, with the hashes `from` and `to` in its header, the step to it
    ledger: str = ""  # the newest length and head of the site's ledger that the coordinator has seen, LENGTH:HASH
    units: int = 0  # how many units the coordinator has this site down for; 0 without a unit at the site
    kind: TaskKind = "task"  # evaluation: `state` is the whole state that the round ended with

    @property
    def name(self) -> str:
        """What its answer is signed for: the round, or that round's evaluation."""
        return str(self.round) if self.kind == "task" else f"evaluation of {self.round}"


@dataclass(frozen=True)
class Refusal:
    """A site's answer where there is no update: a word for the record and one line for a person."""

    code: str  # policy, budget, images, training, failed, silent, invalid, version, state
    text: str  # no path, patient id or tag value

    def shown(self) -> "Refusal":
        """Return it as it may be kept and printed: of any words, one bounded line each that moves no cursor."""
        return Refusal(printable(self.code[:20]), printable(self.text[:500]))
