"""The picture of nearest images, read back from what was drawn."""

from pathlib import Path

import numpy as np
from conftest import tiny
from PIL import Image

import wardround
from wardround import ssl as methods
from wardround.downstream.load import load_backbone
from wardround.report.neighbours import draw_neighbours

CONFIG = tiny(method={"name": "simclr", "hidden_dim": 16, "output_dim": 8})
DARK, BRIGHT = np.full((1, 16, 16), 20, np.uint8), np.full((1, 16, 16), 235, np.uint8)


def test_a_dark_image_stands_above_dark_ones_and_a_bright_one_above_bright_ones(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    images = np.stack([(BRIGHT if number > 7 else DARK) + draw.integers(0, 9, (1, 16, 16)) for number in range(16)])
    state = methods.get_state(methods.build(CONFIG))
    draw_neighbours(CONFIG, state, images.astype(np.uint8), tmp_path / "pictures" / "round.png", "tiny, round 1")
    grey = np.asarray(Image.open(tmp_path / "pictures" / "round.png").convert("L"), float)
    # Eight columns below the title and right of the labels: a column is dark or bright as a whole.
    rows = grey[80:-20, 60:-10]
    columns = [np.median(part) for part in np.array_split(rows, 8, axis=1)]
    assert sum(value < 80 for value in columns) == sum(value > 170 for value in columns) == 4


def test_the_package_gives_load_backbone() -> None:
    assert wardround.load_backbone is load_backbone
