"""Where answers come from, as plain values: for a picture."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Explanation:
    """Some test images, a probe's answers, and how much each pixel has to do with them."""

    way: str  # how it was found, in words
    places: NDArray[np.int64]  # [M], in the set
    answers: NDArray[np.int64]  # [M], places in the classes
    probabilities: NDArray[np.float64]  # [M]
    maps: NDArray[np.float32]  # [M, S, S], each from 0 to 1
