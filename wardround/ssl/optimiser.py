"""The optimiser over a method's parameters: rates by stage and step, and its moments by name."""

from typing import Any

import torch
from lightly.utils.scheduler import cosine_warmup_schedule
from torch import nn

from wardround.config.federation import TrainingConfig
from wardround.errors import ConfigError
from wardround.ssl.method import Method
from wardround.update import State


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine to zero over the federation's steps."""
    peak = training.learning_rate
    # One step more than there is, so that the last step still trains.
    return float(cosine_warmup_schedule(step, training.total_steps + 1, peak, 0.0, training.warmup_steps, 0.0, peak))


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of a rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["share"]


def local_optimiser(method: Method, training: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimiser that the config names, for the parameters that are trained."""
    if training.optimiser == "sgd":
        rate, momentum = training.learning_rate, training.local_momentum
        return torch.optim.SGD(_groups(method, training), lr=rate, momentum=momentum, fused=True)
    return adamw(method, training)


def adamw(method: Method, training: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""
    groups = _groups(method, training)
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, fused=True)


def _groups(method: Method, training: TrainingConfig) -> list[dict[str, Any]]:
    """Return the trained parameters by rate and decay; biases, norms and tokens have none, as in He et al. 2022.

    A stage learns at `layer_decay` times the rate of the stage above it; the head has the whole rate
    (Clark et al. 2020, arXiv:2003.10555, appendix A; numbered as in Bao et al. 2022).
    """
    shares = stage_shares(method, training.layer_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((shares.get(name, 1.0), parameter.ndim > 1), []).append(parameter)
    return [
        {"params": members, "share": share, "weight_decay": training.weight_decay if decays else 0.0}
        for (share, decays), members in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]


def stage_shares(method: Method, decay: float) -> dict[str, float]:
    """Return the share of the rate that each parameter of the backbone learns at, in (0, 1]."""
    stages = method.backbone.stages()
    return {f"backbone.{name}": decay ** (len(stages) - place) for place, stage in enumerate(stages) for name in stage}


def freeze(method: Method, stages: int) -> None:
    """Keep the first stages of the backbone as they are. Raises ConfigError where nothing is left to train."""
    names = method.backbone.stages()
    if stages >= len(names):
        raise ConfigError(
            f"[backbone] frozen_stages = {stages}: '{method.recipe.backbone.name}' has {len(names)} stages; "
            f"take at most {len(names) - 1}."
        )
    frozen = {name for stage in names[:stages] for name in stage}
    for name, parameter in method.backbone.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)


def get_moments(method: Method, optimiser: torch.optim.Optimizer) -> State:
    """Return the optimiser's tensors by parameter name, such as `exp_avg.NAME`; SGD without momentum has none."""
    return {
        f"{kind}.{name}": tensor.detach().cpu().numpy().copy()
        for name, parameter in method.named_parameters()
        if parameter.requires_grad
        for kind, tensor in optimiser.state[parameter].items()
    }


def set_moments(method: Method, optimiser: torch.optim.Optimizer, moments: State) -> None:
    """Give the optimiser what `get_moments` took; empty moments leave it new."""
    kinds = sorted({name.partition(".")[0] for name in moments})
    for name, parameter in method.named_parameters():
        if moments and parameter.requires_grad:
            optimiser.state[parameter] = {
                kind: torch.from_numpy(moments[f"{kind}.{name}"].copy()).to(parameter.device) for kind in kinds
            }
