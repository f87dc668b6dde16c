"""Does an image look as if text were burnt into its pixels? A suspicion, by shape alone; it reads no letter.

Scanners write names, dates and settings in their brightest grey near the edges: small, sharp shapes of one
height, in a row, on ground that is much darker. That is all that is looked for. A single letter, such as the
marker of a side, is no row; dark, faint, huge or slanted text is missed, and ticks of a scale look like it.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wardround.data.facts import Frame

_BRIGHT = 0.85  # of the image's brightest grey
_DARKER = 0.6  # what is two pixels beside a letter, of the letter
_MOST = 0.25  # of the image that is bright: more is ground, and no text
_LOW, _TALL = 4, 0.08  # pixels; of the image's height
_LETTERS = 4  # in a row
_MIDDLE = 0.5  # of each side: text that lies there is not looked for


def looks_burnt(frame: Frame) -> bool:
    """Return whether an image, [H, W, C] on [0, 1], has a row of bright, sharp, letter-sized shapes near an edge."""
    grey = frame.max(axis=2)
    bright = grey >= _BRIGHT * grey.max()
    if not 0 < bright.mean() <= _MOST:
        return False
    boxes = _letters(grey, bright)
    return any(_in_a_row(boxes, one) >= _LETTERS for one in boxes)


def _letters(grey: NDArray[np.float32], bright: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the shapes of a letter's size and contrast outside the middle: [n, 4] of top, bottom, left, right."""
    height, width = grey.shape
    named = ndimage.label(bright, np.ones((3, 3)))[0]
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(named), start=1):
        tall, wide = rows.stop - rows.start, columns.stop - columns.start
        if not (_LOW <= tall <= max(8, _TALL * height) and wide <= 1.5 * tall):
            continue
        middle = abs(rows.start + tall / 2 - height / 2) < _MIDDLE / 2 * height
        if middle and abs(columns.start + wide / 2 - width / 2) < _MIDDLE / 2 * width:
            continue
        around = (slice(max(0, rows.start - 3), rows.stop + 3), slice(max(0, columns.start - 3), columns.stop + 3))
        own = named[around] == number
        ring = ndimage.binary_dilation(own, iterations=3) & ~ndimage.binary_dilation(own, iterations=1)
        ring &= ~bright[around]  # another letter is no ground
        if ring.any() and np.median(grey[around][ring]) < _DARKER * grey[around][own].mean():
            found.append((rows.start, rows.stop, columns.start, columns.stop))
    return np.array(found, np.float64).reshape(-1, 4)


def _in_a_row(boxes: NDArray[np.float64], first: NDArray[np.float64]) -> int:
    """Return how many shapes follow each other from this one on to the right, each like it and near the one before."""
    tall = first[1] - first[0]
    alike = boxes[
        (np.abs(boxes[:, 1] - first[1]) <= 0.35 * tall)
        & (np.abs((boxes[:, 1] - boxes[:, 0]) - tall) <= 0.35 * tall)
        & (boxes[:, 2] >= first[2])
    ]
    alike = alike[np.argsort(alike[:, 2])]
    gaps = alike[1:, 2] - alike[:-1, 3]
    near = (gaps <= 1.5 * tall) & (gaps >= 0)
    return 1 + int(np.argmin(np.append(near, False)))
