"""A frozen encoder's features of a set of images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from wardround.backbones import fast_layers
from wardround.errors import CheckpointError

BATCH = 64  # the fastest of 32 to 512 for a ViT-Tiny on two cores, and small in memory for a ViT-Base


def features(
    encoder: nn.Module,
    images: NDArray[np.uint8],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    device: str = "cpu",
    autocast: bool = False,
    batch_size: int = BATCH,
) -> NDArray[np.float32]:
    """Return the features of images: [N, C, S, S] uint8 -> [N, D] float32.

    `mean` and `std` are the declared ones of each channel on [0, 1]. `autocast` computes in
    bfloat16: three times as fast on processors that have it, and equal to about two digits.
    Raises CheckpointError where a feature is not finite.
    """
    shift = torch.tensor(mean, device=device).view(1, -1, 1, 1)
    scale = torch.tensor(std, device=device).view(1, -1, 1, 1)
    was_training = encoder.training
    encoder.to(device).eval()
    out: list[NDArray[Any]] = []
    with (
        torch.inference_mode(),
        fast_layers(torch.device(device)),
        torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast),
        tqdm(total=len(images), desc="features", unit="image", disable=None, delay=2, leave=False) as bar,
    ):
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(np.array(images[start : start + batch_size])).to(
                device
            )  # a copy: may be a memory map
            out.append(encoder((batch.float() / 255.0 - shift) / scale).float().cpu().numpy())
            bar.update(len(batch))
    encoder.train(was_training)
    found = np.concatenate(out)
    if bad := int((~np.isfinite(found)).any(axis=1).sum()):
        raise CheckpointError(
            f"backbone: {bad} of {len(found)} images have features that are NaN or infinite; its training diverged. "
            "Take an earlier round."
        )
    return found
