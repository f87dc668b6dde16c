"""Methods and backbones small enough to be compared with a loop over single images, and that loop."""

from typing import Any

import torch
from conftest import tiny
from torch import Tensor

from wardround import ssl
from wardround.config import FederationConfig

HEADS = {"hidden_dim": 32, "output_dim": 16}
METHODS: dict[str, dict[str, Any]] = {  # those whose loss decomposes, small
    "mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "mask_ratio": 0.5},
    "byol": HEADS,
    "simsiam": HEADS,
    "simclr": {**HEADS, "negatives": "public", "bank_size": 16, "bank_draw": 8},
    "dino": {"hidden_dim": 32, "bottleneck_dim": 16, "output_dim": 32, "centre": "public", "local_views": 2},
    "ijepa": {"predictor_dim": 24, "predictor_depth": 1, "target_scale": [0.06, 0.2], "targets": 2},
}
PATIENT = {"unit": "patient", "epsilon": 8.0, "delta": 1e-3}
VIT: dict[str, Any] = {"name": "vit_tiny_patch16_224", "patch_size": 8, "depth": 2}


def private(method: str = "mae", backbone: dict[str, Any] | str = "", size: int = 32, **more: Any) -> FederationConfig:
    """Return a federation that trains privately."""
    chosen = VIT if backbone == "" else {"name": backbone} if isinstance(backbone, str) else backbone
    privacy = {**PATIENT, **more.pop("privacy", {})}
    data = {"image_size": size, **more.pop("data", {})}
    return tiny(method={"name": method, **METHODS[method]}, backbone=chosen, data=data, privacy=privacy, **more)


def disturbed(config: FederationConfig) -> ssl.Method:
    """Return a method in float64 none of whose weights are zero, as after some training."""
    method = ssl.build(config).double()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return method


def inputs_of(method: ssl.Method, images: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Return what the method makes of random images, in float64."""
    pixels = torch.rand(images, *method.recipe.data.shape, generator=torch.Generator().manual_seed(seed))
    made = method.prepare(pixels, torch.Generator().manual_seed(seed))
    return tuple(x.double() if x.is_floating_point() else x for x in made)


def unit_gradients(method: ssl.Method, inputs: tuple[Tensor, ...], units: list[int]) -> list[dict[str, Tensor]]:
    """Return each unit's mean gradient by a loop over single images: the reference."""
    parameters = {name: p for name, p in method.named_parameters() if p.requires_grad}
    found = []
    for unit in sorted(set(units)):
        rows = [row for row, of in enumerate(units) if of == unit]
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for row in rows:
            loss = method(*(x[row : row + 1] for x in inputs)).sum() / len(rows)
            slopes = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
            for name, slope in zip(parameters, slopes, strict=True):
                total[name] += slope
        found.append(total)
    return found


def norm(gradient: dict[str, Tensor]) -> float:
    """Return the norm over all parameters."""
    return float(torch.stack([part.detach().square().sum() for part in gradient.values()]).sum().sqrt())


def clipped_reference(each: list[dict[str, Tensor]], clip: float) -> dict[str, Tensor]:
    """Return the sum of the units' gradients, each scaled to a norm of `clip` at most."""
    shares = [min(1.0, clip / norm(gradient)) for gradient in each]
    return {name: torch.stack([s * g[name] for s, g in zip(shares, each, strict=True)]).sum(0) for name in each[0]}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the norm of the difference relative to the norm of what is expected."""
    assert found.keys() == expected.keys()
    return norm({name: found[name] - expected[name] for name in expected}) / norm(expected)
