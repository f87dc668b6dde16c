"""What a file says of itself before any pixel is decoded, and how it is refused."""

from dataclasses import dataclass, field
from datetime import date

import numpy as np
from numpy.typing import NDArray

from wardround.errors import DataError

Frame = NDArray[np.float32]  # [H, W, C], on [0, 1]
Window = tuple[float, float]  # centre and width, in the modality's own units

# A full-field mammogram has 14 million pixels, a 512-slice CT series 134 million voxels. What declares
# more is damaged or hostile, and would take the site's memory.
MAX_PIXELS = 8192 * 8192
MAX_VOXELS = 512 * 512 * 512
MAX_FRAMES = 65_536


class ReadError(DataError):
    """One file cannot be read; the text says why, and holds no value of any of its tags but codes."""


class PassingError(ReadError):
    """One file cannot be read now, which says nothing of its content: it is tried again at the next index."""


@dataclass(frozen=True)
class Facts:
    """The header of one file. `patient` and `series` are identifiers: they are turned into pseudonyms and dropped."""

    frames: int
    height: int
    width: int
    channels: int  # 1 or 3
    modality: str = ""  # DICOM codes; "" where the file does not say
    body_part: str = ""
    view: str = ""
    study_date: date | None = None
    burnt: bool = False  # whether it says that text is burnt into its pixels
    patient: str = field(default="", repr=False)
    series: str = field(default="", repr=False)  # which DICOM slices are one volume

    def __post_init__(self) -> None:
        sides = f"{self.height} x {self.width} pixels"
        if self.frames < 1 or self.height < 1 or self.width < 1:
            raise ReadError(f"damaged: its header declares {self.frames} frames of {sides}")
        if self.height * self.width > MAX_PIXELS or self.frames > MAX_FRAMES:
            raise ReadError(
                f"too large: {self.frames} frames of {sides}; at most {MAX_PIXELS // 2**20} megapixels "
                f"a frame and {MAX_FRAMES} frames are read"
            )
