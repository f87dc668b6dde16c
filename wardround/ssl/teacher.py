"""A slow copy of the student, which gives the targets of BYOL, MoCo, DINO and I-JEPA."""

import copy

import torch
from torch import Tensor, nn


class Teacher(nn.Module):
    """Copies of parts of the student, by name; no gradient reaches them."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: copy.deepcopy(part) for name, part in parts.items()})
        self.requires_grad_(False)

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
