"""A slow copy of the student, which gives the targets of BYOL, MoCo, DINO and I-JEPA."""

import copy

import torch
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn

from wardround.backbones import Backbone


class Teacher(nn.Module):
    """Copies of parts of the student, by name; no gradient reaches them."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: copy.deepcopy(part) for name, part in parts.items()})
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return what the parts make of images one after the other: [B, C, S, S] -> [B, D]."""
        x = images
        for part in self.parts.values():
            x = part.features(x) if isinstance(part, Backbone) else part(x)
        return x

    def reset(self, parts: dict[str, nn.Module]) -> None:
        """Become the student."""
        for name, part in parts.items():
            self.parts[name].load_state_dict(part.state_dict())

    @torch.no_grad()
    def follow(self, parts: dict[str, nn.Module], momentum: float) -> None:
        """Move to momentum * teacher + (1 - momentum) * student, parameter by parameter.

        Statistics of batch normalisation are the teacher's own, from the batches it sees.
        """
        for name, part in parts.items():
            mine: list[Tensor] = list(self.parts[name].parameters())
            torch._foreach_lerp_(mine, [student.detach() for student in part.parameters()], 1.0 - momentum)


def cosine_momentum(step: int, total_steps: int, first: float) -> float:
    """Return the momentum after a step: a cosine from `first` towards 1 (Grill et al. 2020, section 3.2).

    >>> [round(cosine_momentum(step, 2, 0.9), 3) for step in (0, 1)]
    [0.9, 0.95]
    """
    # One step more than there is: lightly's schedule ends at its last step, the paper's one step after it.
    return float(cosine_schedule(step, total_steps + 1, first, 1.0))
