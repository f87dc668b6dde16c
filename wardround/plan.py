"""From a config to what it means: the first state, the protocol, and what a round costs.

`wardround check`, the server and the sites all ask here, so that they cannot disagree.
"""

import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from wardround import ssl as methods
from wardround.backbones import batch_normalised, load_into
from wardround.config import FederationConfig, Protocol
from wardround.config.federation import Recipe
from wardround.config.privacy import SitePrivacyConfig, UnitPrivacyConfig
from wardround.encoding import encoded_layout
from wardround.errors import ConfigError
from wardround.privacy import site_level
from wardround.privacy.accounting import Mechanism, curve, mechanism
from wardround.privacy.engine import Private, clipper, refuse_coupled
from wardround.registry.release import WEIGHTS, file_hashes
from wardround.registry.source import release_folder
from wardround.ssl.devices import Machine, open_fabric
from wardround.ssl.engine import Plain
from wardround.ssl.pretrain import Engine, pretrain
from wardround.update import Layout, State, layout, state_hash


@dataclass(frozen=True)
class Plan:
    """A config resolved."""

    config: FederationConfig
    protocol: Protocol
    state: State  # what round 1 starts from
    start: str | None = None  # SHA-256 of the released weights that its backbone is from

    @property
    def digest(self) -> str:
        """The protocol digest."""
        return self.protocol.digest()


@dataclass(frozen=True)
class Cost:
    """What a site spends; measured on this machine by running a step."""

    backbone_parameters: int
    head_parameters: int
    bytes_per_state: int  # what a site receives at first
    bytes_per_message: int  # one update, or the step to the next state, encoded and before zstd
    memory_bytes: int  # weights, gradients, two moments, a teacher, and what the forward pass keeps
    seconds_per_step: float
    coupling: str | None  # why an image's loss depends on other images, or None


@dataclass(frozen=True)
class Budget:
    """What differential privacy means at one site, by its declared number of units."""

    units: int
    rate: float  # chance of a unit to be drawn in a step; 1 where the site is the unit
    noise: float  # over the clipping norm
    curve: list[tuple[int, float]]  # (round, epsilon after it), the last round among them


def budgets(config: FederationConfig) -> dict[str, Budget]:
    """Return each site's budget; of a site unit, one for the federation; none without differential privacy."""
    privacy, rounds = config.privacy, config.training.rounds
    if isinstance(privacy, SitePrivacyConfig):
        shown = sorted({-(-rounds * part // 20) for part in range(1, 21)})
        points = [(done, site_level.spent(privacy, rounds, done)) for done in shown]
        return {"every site": Budget(1, 1.0, site_level.noise(privacy, rounds).delta, points)}
    if not isinstance(privacy, UnitPrivacyConfig):
        return {}
    found = {}
    for site, units in sorted(config.membership.units.items()):
        spent = mechanism(config, units)
        found[site] = Budget(units, spent.rate, spent.noise, curve(spent, rounds, privacy.delta, points=20))
    return found


def resolve(config: FederationConfig) -> Plan:
    """Return the plan of a config.

    Raises ConfigError for what cannot be built or released, CheckpointError for damaged initial weights.
    """
    method = methods.build(config)
    if batch_normalised(method.backbone) and config.evaluation_set is None:
        raise ConfigError(
            "[backbone] norm = 'batch': a release takes its statistics from public images, and there are none; "
            "name an [evaluation_set], or take norm = 'group'."
        )
    _check_resolutions(method)
    _check_privacy(method, config)
    state, start = methods.get_state(method), None
    if config.initial_weights is not None:
        with release_folder(config.initial_weights) as folder:
            loaded, start = load_into(config, folder), file_hashes(folder)[WEIGHTS]
        state |= {name: array for name, array in loaded.items() if name in state}  # not what stays at the sites
    return Plan(config, config.protocol(state_hash(state)), state, start)


def _check_resolutions(method: methods.Method) -> None:
    """Raise ConfigError unless the method takes views of every size that a round has."""
    recipe = method.recipe
    two = torch.zeros(2, *recipe.data.shape)
    for _, edge in recipe.training.resolutions:
        method.view_size = edge
        try:
            with torch.no_grad():
                method(*method.prepare(two, torch.Generator()))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ConfigError(
                f"[training] resolutions: '{recipe.backbone.name}' does not take views of {edge} pixels: {reason}. "
                "Take another edge, such as a multiple of its patches."
            ) from error
    method.view_size = recipe.data.image_size


def _check_privacy(method: methods.Method, config: FederationConfig) -> None:
    """Raise ConfigError unless the promise holds for this method and backbone, and can be kept in these rounds."""
    privacy = config.privacy
    if isinstance(privacy, SitePrivacyConfig):
        site_level.noise(privacy, config.training.rounds)
    if isinstance(privacy, UnitPrivacyConfig):
        clipper(method, config)
        if not config.membership.units:
            raise ConfigError(
                f"[membership] units: the noise follows from each site's declared number of {privacy.unit}s; add "
                "SITE = NUMBER for each, round numbers below the true ones."
            )
        for units in set(config.membership.units.values()):
            if privacy.delta * units >= 1.0:
                raise ConfigError(
                    f"[privacy] delta = {privacy.delta}: at a site of {units} {privacy.unit}s it would allow to "
                    f"publish one of them whole; take it well below {1 / units:.2g}."
                )
            mechanism(config, units)


def refuse_unsound(recipe: Recipe) -> None:
    """Raise ConfigError where clipping a unit's gradient would not bound what the unit changes.

    By the method's types and settings alone, in no time; `resolve` and the engine watch it compute, too.
    """
    if isinstance(recipe.privacy, UnitPrivacyConfig):
        with torch.device("meta"):
            refuse_coupled(methods.build(recipe), recipe.privacy.unit)


def architecture(recipe: Recipe) -> Layout:
    """Return names, shapes and dtypes of the state that a recipe leads to."""
    with torch.device("meta"):  # shapes alone: no memory and no time for weights
        method = methods.build(recipe)
    tensors = method.state_dict()
    return {
        name: (tuple(tensors[name].shape), str(tensors[name].dtype).removeprefix("torch."))
        for name in methods.travelling(method)
    }


def cost(plan: Plan, steps: int = 3, machine: Machine | None = None) -> Cost:
    """Return what a round costs, by training `steps` steps on noise after one to warm up, on one device."""
    # At the size of the last rounds: what a site must be able to bear.
    recipe = plan.config.model_copy(update={"training": plan.config.training.model_copy(update={"resolutions": ()})})
    machine = replace(machine or Machine(), devices=1)
    fabric = open_fabric(machine, recipe.training.precision)
    method = methods.build(recipe).to(fabric.device)
    noise = np.random.default_rng(0).integers(0, 256, (recipe.training.batch_size, *recipe.data.shape))
    images = noise.astype(np.uint8)
    engine: Engine = Plain(method, images, recipe, "check", fabric, machine.micro_batch)
    kept = _kept_by_forward(method, engine.batch(0))
    if isinstance(recipe.privacy, UnitPrivacyConfig):
        everyone = Mechanism(rate=1.0, noise=1.0, steps=1)  # as many units as are expected of a step
        engine = Private(method, images, np.arange(len(images), dtype=np.int32), recipe, everyone, fabric)
    pretrain(method, engine, 0, 1, {}, "check")
    started = time.perf_counter()
    pretrain(method, engine, 0, steps, {}, "check")
    seconds = (time.perf_counter() - started) / steps
    sizes = {part: sum(a.size for n, a in plan.state.items() if n.startswith(part)) for part in ("backbone", "head")}
    state_bytes = sum(array.nbytes for array in plan.state.values())
    staying = sum(array.nbytes for array in methods.get_site_tensors(method).values())
    memory = 4 * state_bytes + staying + kept
    crossing = encoded_layout(layout(plan.state), recipe.encoding)
    message = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in crossing.values())
    return Cost(sizes["backbone"], sizes["head"], state_bytes, message, memory, seconds, method.coupling)


def _kept_by_forward(method: methods.Method, inputs: tuple[torch.Tensor, ...]) -> int:
    """Return the bytes that one forward pass keeps for the backward pass."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        method(*inputs)
    return sum(storages.values())
