"""One round at one site: train from the federation's state, release the difference."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from wardround import __version__
from wardround import ssl as methods
from wardround.config import Protocol
from wardround.config.federation import TrainingConfig
from wardround.data import SiteImages
from wardround.ssl.pretrain import Plain, pretrain
from wardround.update import Declared, State, Update, state_hash

_STAYS = "site."  # before the names of the site's own tensors in its memory


@dataclass(frozen=True)
class Machine:
    """What of a site's hardware a round uses."""

    device: torch.device
    threads: int  # 0 means all


def local_round(
    protocol: Protocol, site: str, round: int, state: State, memory: State, images: SiteImages, machine: Machine
) -> tuple[Update, State]:
    """Return the site's update and its site memory after the round.

    The same arguments give the same bits, `seconds` aside, on the same kind of CPU with as many threads.
    """
    if machine.threads:
        torch.set_num_threads(machine.threads)
    training = protocol.training
    method = methods.build(protocol)
    methods.set_state(method, state)
    method.to(machine.device)
    engine = Plain(method, images.images, protocol, site)
    first_step = (round - 1) * training.local_steps
    moments, site_tensors = split(memory)
    methods.set_site_tensors(method, site_tensors)
    started = time.monotonic()
    label = f"site '{site}', round {round}"
    trained = pretrain(method, engine, training, first_step, training.local_steps, moments, label)
    tenth = max(1, len(trained.losses) // 10)
    declared = Declared(
        images=images.num_images,
        patients=images.num_patients,
        steps=training.local_steps,
        loss_first=float(np.mean(trained.losses[:tenth])),
        loss=float(np.mean(trained.losses[-tenth:])),
        seconds=time.monotonic() - started,
        version=__version__,
    )
    new = methods.get_state(method)
    delta = {name: new[name] - old for name, old in state.items()}
    update = Update(site, protocol.digest(), round, state_hash(state), declared, delta)
    return update, join(trained.moments, methods.get_site_tensors(method), training)


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
