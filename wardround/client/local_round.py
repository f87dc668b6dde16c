"""One round at one site: train from the federation's state, release the difference."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from mmap import mmap
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wardround import __version__
from wardround import ssl as methods
from wardround.client.charge import Charged
from wardround.config import Protocol
from wardround.config.federation import TrainingConfig
from wardround.config.privacy import SitePrivacyConfig, UnitPrivacyConfig
from wardround.data import SiteImages
from wardround.errors import ConfigError
from wardround.privacy.accounting import Mechanism
from wardround.privacy.engine import Private
from wardround.privacy.site_level import privatise
from wardround.probe.monitor import Monitor, watch
from wardround.ssl.devices import Machine, launch
from wardround.ssl.engine import Plain
from wardround.ssl.pretrain import Engine, pretrain
from wardround.update import Declared, State, Update, state_hash, withholds

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_STAYS = "site."  # before the names of the site's own tensors in its memory


@dataclass(frozen=True)
class Job:
    """What each of a site's processes needs for a round."""

    protocol: Protocol
    site: str
    round: int
    state: State
    memory: State
    images: Callable[[], NDArray[np.uint8]]  # [N, C, S, S]
    machine: Machine
    units: NDArray[np.int32]  # [N], which privacy unit each image belongs to
    mechanism: Mechanism | None  # of DP-SGD, where the protocol asks for it


@dataclass(frozen=True)
class Done:
    """What the first of a site's processes has after a round."""

    state: State
    memory: State
    losses: list[float]
    monitor: Monitor | None  # None where it would be withheld


def local_round(
    protocol: Protocol,
    site: str,
    round: int,
    state: State,
    memory: State,
    images: SiteImages,
    machine: Machine,
    charged: Charged | None = None,
) -> tuple[Update, State]:
    """Return the site's update and its site memory after the round.

    Without differential privacy the same arguments give the same bits, `seconds` aside, on the same kind
    of CPU with as many threads. `charged` is what the ledger was charged for this training. Raises
    ConfigError where this machine's settings would change the gradient.
    """
    started = time.monotonic()
    _refuse_unfit(protocol, machine)
    units = np.arange(images.num_images, dtype=np.int32) if protocol.privacy.unit == "image" else images.patients
    mechanism = charged.mechanism if charged else None
    assert (mechanism is not None) == isinstance(protocol.privacy, UnitPrivacyConfig), "trained without a charge"
    job = Job(protocol, site, round, state, memory, source(images.images), machine, units, mechanism)
    done = launch(train, machine, protocol.training.precision, job)
    delta = {name: done.state[name] - old for name, old in state.items()}
    if isinstance(protocol.privacy, SitePrivacyConfig) and protocol.privacy.noise == "site":
        delta = privatise(delta, protocol.privacy, protocol.training.rounds)
    declared = declare(protocol, done, images, time.monotonic() - started, charged)
    return Update(site, protocol.digest(), round, state_hash(state), declared, delta), done.memory


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
    method = methods.build(protocol)
    methods.set_state(method, job.state)
    moments, site_tensors = split(job.memory)
    methods.set_site_tensors(method, site_tensors)
    if job.machine.checkpointing:
        method.backbone.checkpoint_activations()
    method.to(fabric.device)
    engine: Engine = Plain(method, images, protocol, job.site, fabric, job.machine.micro_batch)
    if job.mechanism is not None:
        engine = Private(method, images, job.units, protocol, job.mechanism, fabric, job.machine.micro_batch)
    first = (job.round - 1) * training.local_steps
    label = f"site '{job.site}', round {job.round}"
    trained = pretrain(method, engine, training, first, training.local_steps, moments, label)
    memory = join(trained.moments, methods.get_site_tensors(method), training)
    unseen = withholds(protocol.privacy)
    monitor = None if unseen else watch(method.backbone, images, protocol, job.site, engine.micro_batch)
    return Done(methods.get_state(method), memory, trained.losses, monitor)


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


def join(moments: State, site_tensors: State, training: TrainingConfig) -> State:
    """Return the site memory: the moments and what stays at the site, as far as the config keeps them."""
    kept = moments if training.optimiser_state == "kept" else {}
    return kept | {
        f"{_STAYS}{name}": array
        for name, array in site_tensors.items()
        if training.teacher_state == "kept" or not name.startswith("teacher.")
    }


def split(memory: State) -> tuple[State, State]:
    """Return the moments and the site's tensors that `join` put together."""
    staying = {name.removeprefix(_STAYS): array for name, array in memory.items() if name.startswith(_STAYS)}
    return {name: array for name, array in memory.items() if not name.startswith(_STAYS)}, staying
