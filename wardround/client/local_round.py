"""One round at one site: train from the federation's state, release the difference."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wardround import __version__
from wardround import ssl as methods
from wardround.client import correction, midway
from wardround.client.charge import Charged
from wardround.client.midway import Midway
from wardround.config import Protocol
from wardround.config.federation import TrainingConfig
from wardround.config.privacy import SitePrivacyConfig, UnitPrivacyConfig
from wardround.data import SiteImages
from wardround.encoding import encode, keep, kept
from wardround.errors import ConfigError
from wardround.privacy.accounting import Mechanism
from wardround.privacy.engine import Private
from wardround.privacy.site_level import privatise
from wardround.probe.monitor import Monitor, watch
from wardround.ssl.devices import Machine, launch
from wardround.ssl.engine import Plain
from wardround.ssl.pretrain import Engine, Trained, pretrain
from wardround.update import Declared, Start, State, Update, withholds

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Before the names of the site's own tensors in its memory, and of what a correction keeps there; moments have none.
_STAYS, _CORRECTION = "site.", "correction."


@dataclass(frozen=True)
class Job:
    """What each of a site's processes needs for a round."""

    protocol: Protocol
    site: str
    round: int
    start: Start
    memory: State
    images: Callable[[], NDArray[np.uint8]]  # [N, C, S, S]
    machine: Machine
    units: NDArray[np.int32]  # [N], which privacy unit each image belongs to; -1 takes no part
    mechanism: Mechanism | None  # of DP-SGD, where the protocol asks for it
    midway: Path | None  # where it is kept how far the round has come


@dataclass(frozen=True)
class Done:
    """What the first of a site's processes has after a round."""

    state: State
    beside: State  # what leaves with the delta, such as control variates
    memory: State
    losses: list[float]
    monitor: Monitor | None  # None where it would be withheld


def local_round(
    protocol: Protocol,
    site: str,
    round: int,
    start: Start,
    memory: State,
    images: SiteImages,
    machine: Machine,
    charged: Charged | None = None,
    midway_file: Path | None = None,
) -> tuple[Update, State]:
    """Return the site's update and its site memory after the round.

    Without differential privacy the same arguments give the same bits, `seconds` aside, on the same kind
    of CPU with as many threads. `charged` is what the ledger was charged for this training. In `midway_file`
    it is kept how far the round has come; a round that was cut goes on from it. Raises ConfigError where this
    machine's settings would change the gradient.
    """
    started = time.monotonic()
    _refuse_unfit(protocol, machine)
    units = np.where(images.named, images.patients, -1)  # nobody can vouch for an image of nobody
    if protocol.privacy.unit == "image":
        units = np.arange(images.num_images, dtype=np.int32)
    mechanism = charged.mechanism if charged else None
    assert (mechanism is not None) == isinstance(protocol.privacy, UnitPrivacyConfig), "trained without a charge"
    residual, memory = kept(memory)
    job = Job(protocol, site, round, start, memory, source(images.images), machine, units, mechanism, midway_file)
    done = launch(train, machine, protocol.training.precision, job)
    delta = {name: new - start.state[name] for name, new in done.state.items()} | done.beside
    if isinstance(protocol.privacy, SitePrivacyConfig) and protocol.privacy.noise == "site":
        delta = privatise(delta, protocol.privacy, protocol.training.rounds)
    declared = declare(protocol, done, images, time.monotonic() - started, charged)
    encoded, lost = encode(delta, protocol.encoding, residual)  # after the last noise
    update = Update(site, protocol.digest(), round, start.hash, declared, encoded, protocol.encoding)
    return update, done.memory | keep(lost)


def declare(protocol: Protocol, done: Done, images: SiteImages, seconds: float, charged: Charged | None) -> Declared:
    """Return what may leave beside the delta: where privacy withholds what is measured, constants alone."""
    known = Declared(steps=protocol.training.local_steps, version=__version__)
    if charged is not None:
        return replace(known, units=charged.units, epsilon=charged.epsilon, ledger=charged.ledger)
    if done.monitor is None:
        return known
    tenth = max(1, len(done.losses) // 10)
    return replace(
        known,
        images=images.num_images,
        patients=images.num_patients,
        loss_first=float(np.mean(done.losses[:tenth])),
        loss=float(np.mean(done.losses[-tenth:])),
        seconds=seconds,
        **vars(done.monitor),
    )


def train(fabric: "Fabric", job: Job) -> Done:
    """Train a round in this process, beside the site's others."""
    protocol, training = job.protocol, job.protocol.training
    images = job.images()
    method = methods.build(protocol, drawn=False)
    incoming, server = correction.parted(job.start.state)
    moments, site_tensors, own = split(job.memory)
    begun = midway.read(job.midway, job.start.hash) if job.midway else None
    if begun is None:
        begun = Midway([], correction.start(training.correction, incoming, own), site_tensors, moments)
    methods.set_state(method, begun.state)
    methods.set_site_tensors(method, begun.site)
    if job.machine.checkpointing:
        method.backbone.checkpoint_activations()
    method.to(fabric.device)
    engine: Engine = Plain(method, images, protocol, job.site, fabric, job.machine.micro_batch)
    if job.mechanism is not None:
        engine = Private(method, images, job.units, protocol, job.mechanism, fabric, job.machine.micro_batch)
    first = (job.round - 1) * training.local_steps + len(begun.losses)
    left = training.local_steps - len(begun.losses)

    def remember(trained: Trained) -> None:
        if job.midway and fabric.global_rank == 0:
            losses = begun.losses + trained.losses
            made = Midway(losses, methods.get_state(method), methods.get_site_tensors(method), trained.moments)
            midway.write(job.midway, job.start.hash, made)

    label = f"site '{job.site}', round {job.round}"
    correct = correction.gradient_term(training.correction, incoming, server, own, fabric.device)
    trained = pretrain(method, engine, first, left, begun.moments, label, correct, remember)
    state = methods.get_state(method)
    own, beside = correction.finish(training, job.round, incoming, server, own, state)
    memory = join(trained.moments, methods.get_site_tensors(method), own, training)
    unseen = withholds(protocol.privacy)
    monitor = None if unseen else watch(method.backbone, images, protocol, job.site, engine.micro_batch)
    return Done(state, beside, memory, begun.losses + trained.losses, monitor)


def _refuse_unfit(protocol: Protocol, machine: Machine) -> None:
    """Raise ConfigError where this machine's settings would change the gradient, or the clipping of it."""
    cut = machine.devices > 1 or 0 < machine.micro_batch < protocol.training.batch_size or machine.checkpointing
    if cut and protocol.backbone.norm == "batch":
        raise ConfigError(
            "site.toml: the federation's [backbone] norm = 'batch' needs its "
            f"{protocol.training.batch_size} images at once, once, on one device; remove devices, micro_batch and "
            "checkpointing."
        )
    if machine.checkpointing and isinstance(protocol.privacy, UnitPrivacyConfig):
        raise ConfigError(
            "site.toml: with differential privacy activations are not computed twice; remove checkpointing, and set "
            "micro_batch where memory is short."
        )


def source(images: NDArray[np.uint8]) -> Callable[[], NDArray[np.uint8]]:
    """Return how each process gets at the images: from the file that they are mapped from, not by a copy."""
    if isinstance(images, np.memmap) and isinstance(images.base, mmap):  # whole: a part would lose its place
        return partial(np.memmap, images.filename, images.dtype, "r", images.offset, images.shape)
    return partial(np.asarray, images)


def join(moments: State, site_tensors: State, corrections: State, training: TrainingConfig) -> State:
    """Return the site memory: moments, what stays at the site, and a correction's, as far as the config keeps them."""
    lasting = moments if training.optimiser_state == "kept" else {}
    staying = {
        name: array
        for name, array in site_tensors.items()
        if training.teacher_state == "kept" or not name.startswith("teacher.")
    }
    return lasting | _marked(_STAYS, staying) | _marked(_CORRECTION, corrections)


def split(memory: State) -> tuple[State, State, State]:
    """Return the moments, the site's tensors and the correction's that `join` put together."""
    marks = (_STAYS, _CORRECTION)
    staying, corrections = (
        {name.removeprefix(mark): array for name, array in memory.items() if name.startswith(mark)} for mark in marks
    )
    return {name: array for name, array in memory.items() if not name.startswith(marks)}, staying, corrections


def _marked(mark: str, tensors: State) -> State:
    return {f"{mark}{name}": array for name, array in tensors.items()}
