"""MONAI's Dice: as what a segmentation is trained by, and as its score."""

import numpy as np
import torch
from monai.losses.dice import DiceCELoss
from monai.metrics.meandice import compute_dice
from numpy.typing import NDArray
from torch import Tensor

_LOSS = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Return Dice loss and cross-entropy, added: [B, K, S, S], [B, 1, S, S] of classes -> a number."""
    out: Tensor = _LOSS(logits.float(), masks)
    return out


def dice(answers: NDArray[np.uint8], masks: NDArray[np.uint8], classes: int) -> NDArray[np.float64]:
    """Return each image's Dice, the mean over the classes but the background: [N, S, S], [N, S, S] -> [N].

    Of a class that an image does not show it is 1 where the answer has none of it either, else 0.
    """
    found, truth = (torch.from_numpy(one.astype(np.int64))[:, None] for one in (answers, masks))
    scores = compute_dice(found, truth, include_background=False, ignore_empty=False, num_classes=classes)
    return np.asarray(scores.double().mean(1).numpy())
