"""Running statistics of batch normalisation, taken from public images for a release.

Under `silobn` and `fedbn` they stay at the sites, so that the federation has none of its own.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim.swa_utils import update_bn

from wardround.config.federation import DataConfig
from wardround.errors import ConfigError

BATCH = 64


def recalibrate(net: nn.Module, images: NDArray[np.uint8] | None, data: DataConfig) -> None:
    """Set the statistics of a network to those of images [N, C, *size], in place: the mean over batches of all alike.

    Raises ConfigError where there are not two images.
    """
    count = 0 if images is None else len(images)
    if images is None or count < 2:
        raise ConfigError(
            f"[backbone] norm = 'batch': a release takes its statistics from public images, and there are {count}; "
            "name an [evaluation_set]."
        )
    shape = (1, -1, *[1] * (images.ndim - 2))
    mean, std = torch.tensor(data.mean).view(shape), torch.tensor(data.std).view(shape)
    # Of nearly equal size, since each counts alike; a last batch of one image would have no variance.
    parts = np.array_split(images, math.ceil(count / BATCH))
    update_bn(((torch.from_numpy(np.array(part)).float() / 255.0 - mean) / std for part in parts), net)
