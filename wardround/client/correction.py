"""What a site does against its drift from the others: FedProx, SCAFFOLD, FedEMA and FedU.

Each touches a round at three points: the state that training starts from (`start`), what is added to
every gradient (`gradient_term`), and what the site keeps and what leaves beside the delta (`finish`).
None of them sees an image: under differential privacy they are post-processing of noised gradients.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from wardround.config.correction import (
    VARIATE,
    CorrectionConfig,
    FedEMAConfig,
    FedProxConfig,
    FedUConfig,
    ScaffoldConfig,
)
from wardround.config.federation import TrainingConfig
from wardround.ssl.method import Method
from wardround.ssl.optimiser import learning_rate
from wardround.update import Array, State

PREDICTOR = "head.predictor."  # where a method has one; all else of its state is the encoder

Correct = Callable[[Method], None]


def parted(received: State) -> tuple[State, State]:
    """Return what came in as the state and the server's control variates, both by the tensors' own names."""
    variates = {name.removeprefix(VARIATE): array for name, array in received.items() if name.startswith(VARIATE)}
    return {name: array for name, array in received.items() if not name.startswith(VARIATE)}, variates


def start(correction: CorrectionConfig, incoming: State, own: State) -> State:
    """Return the state that a site trains from; `own` is what `finish` kept of the round before, or empty."""
    if own and isinstance(correction, FedEMAConfig):
        return mixed(incoming, own, min(correction.scale * drift(incoming, own), 1.0))
    if own and isinstance(correction, FedUConfig) and drift(incoming, own) >= correction.threshold:
        return {name: own[name] if name.startswith(PREDICTOR) else array for name, array in incoming.items()}
    return incoming


def gradient_term(
    correction: CorrectionConfig, incoming: State, server: State, own: State, device: torch.device
) -> Correct | None:
    """Return what adds a correction to a method's gradients, or None where there is none.

    `server` and `own` are SCAFFOLD's control variates, c and c_i; what is missing in them is zero.
    Parameters that do not travel are left alone.
    """
    if isinstance(correction, FedProxConfig):
        there, mu = _tensors(incoming, device), correction.mu

        @torch.no_grad()
        def pull(method: Method) -> None:
            """Add mu * (w - w_global): the slope of Li et al. 2020 (arXiv:1812.06127), equation 2."""
            for name, parameter in method.named_parameters():
                if parameter.grad is not None and name in there:
                    parameter.grad.add_(parameter - there[name], alpha=mu)

        return pull
    if isinstance(correction, ScaffoldConfig):
        shift = _tensors(
            {name: _or_zero(server, name, a) - _or_zero(own, name, a) for name, a in incoming.items()}, device
        )

        def turn(method: Method) -> None:
            """Add c - c_i (Karimireddy et al. 2020, arXiv:1910.06378, Algorithm 1, line 10)."""
            for name, parameter in method.named_parameters():
                if parameter.grad is not None and name in shift:
                    parameter.grad.add_(shift[name])

        return turn
    return None


def finish(
    training: TrainingConfig, round: int, incoming: State, server: State, own: State, trained: State
) -> tuple[State, State]:
    """Return what a correction keeps in the site memory, and the tensors that leave beside the delta."""
    if isinstance(training.correction, FedEMAConfig | FedUConfig):
        return trained, {}
    if isinstance(training.correction, ScaffoldConfig):
        first = (round - 1) * training.local_steps
        rates = sum(learning_rate(training, step) for step in range(first, first + training.local_steps))
        after = next_variates(incoming, server, own, trained, rates)
        return after, {f"{VARIATE}{name}": array - _or_zero(own, name, array) for name, array in after.items()}
    return {}, {}


def drift(incoming: State, own: State) -> float:
    """Return the L2 distance of two states' encoders: backbone and projector, without the predictor."""
    encoder = (name for name in incoming if not name.startswith(PREDICTOR))
    return math.sqrt(sum(float(np.square(own[n].astype(np.float64) - incoming[n]).sum()) for n in encoder))


def mixed(incoming: State, own: State, share: float) -> State:
    """Return share * own + (1 - share) * incoming (FedEMA, Zhuang et al. 2022, arXiv:2204.04385, equations 2 and 3).

    >>> mixed({"w": np.array([0.0, 8.0])}, {"w": np.array([4.0, 8.0])}, share=0.25)
    {'w': array([1., 8.])}
    """
    return {
        name: (array + share * (own[name].astype(np.float64) - array)).astype(array.dtype)
        for name, array in incoming.items()
    }


def next_variates(incoming: State, server: State, own: State, trained: State, rates: float) -> State:
    """Return c_i - c + (x - y) / rates: a site's next control variates (SCAFFOLD's option II, equation 4).

    `rates` is the sum of the steps' learning rates, which is K * eta_l where the rate is constant. Of what
    is no parameter, such as a running mean, the result is never used.
    """
    return {
        name: np.asarray(
            _or_zero(own, name, x) - _or_zero(server, name, x) + (x.astype(np.float64) - trained[name]) / rates, x.dtype
        )
        for name, x in incoming.items()
    }


def _or_zero(variates: State, name: str, like: Array) -> Array:
    return variates.get(name, np.zeros_like(like))


def _tensors(state: State, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(array)).to(device) for name, array in state.items()}
