"""Masks are read whole or refused with what is wrong."""

import csv
from pathlib import Path

import numpy as np
import pytest
from conftest import write_labelled
from PIL import Image

from wardround.config.federation import DataConfig
from wardround.data import read_masked
from wardround.errors import DataError

SIZE = 20


def write_masked(folder: Path, count: int = 20, size: int = SIZE) -> Path:
    """Write a labelled folder with a mask each: 255 where a pixel is above the middle."""
    write_labelled(folder, {"lyon": count}, size=size)
    (folder / "masks").mkdir()
    for row in rewrite(folder, lambda row: row.update(mask=row["file"].replace("images/", "masks/"))):
        pixels = np.array(Image.open(folder / row["file"]))
        Image.fromarray((pixels > 127).astype(np.uint8) * 255).save(folder / row["mask"])
    return folder


def rewrite(folder: Path, change) -> list[dict[str, str]]:  # type: ignore[no-untyped-def]
    """Change each row of labels.csv; return the rows."""
    with (folder / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        change(row)
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return rows


def test_masks_stand_beside_their_images_in_classes(tmp_path: Path) -> None:
    folder = write_masked(tmp_path)
    Image.fromarray(np.full((SIZE, SIZE), 7, np.uint8)).save(folder / "masks/lyon-3.png")
    found = read_masked(folder, DataConfig(image_size=SIZE))
    assert found.values == (0, 7, 255)
    assert (found.masks[3] == 1).all()
    np.testing.assert_array_equal(found.masks[4], 2 * (found.images[4, 0] > 127))
    assert found.patients[:5].tolist() == [0, 0, 1, 1, 2] and found.splits[6] == "val"


def test_a_smaller_mask_takes_the_nearest_pixel_and_invents_no_class(tmp_path: Path) -> None:
    folder = write_masked(tmp_path, size=40)
    found = read_masked(folder, DataConfig(image_size=20))
    assert found.values == (0, 255)
    whole = np.array(Image.open(folder / "masks/lyon-0.png")) == 255
    np.testing.assert_array_equal(found.masks[0] == 1, whole[1::2, 1::2])


def smooth(folder: Path) -> None:
    for place in range(3):
        Image.fromarray(np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)).save(
            folder / f"masks/lyon-{place}.png"
        )


BAD = {
    "it is missing": (lambda f: (f / "masks/lyon-2.png").unlink(), "row 4: the file 'masks/lyon-2.png' does not exist"),
    "it has no name": (
        lambda f: rewrite(f, lambda row: row.update(mask="")),
        "row 2: column 'mask' is empty; an image w",
    ),
    "there is no column": (lambda f: write_labelled(f, {"lyon": 4}), "lacks the column 'mask'"),
    "it lies outside": (lambda f: rewrite(f, lambda row: row.update(mask="../x.png")), "is no path inside the folder"),
    "it is of another size": (
        lambda f: Image.fromarray(np.zeros((8, 9), np.uint8)).save(f / "masks/lyon-1.png"),
        "mask 'masks/lyon-1.png' has 8 x 9 pixels, its image 'images/lyon-1.png' 20 x 20",
    ),
    "it is in colour": (
        lambda f: Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8)).save(f / "masks/lyon-1.png"),
        "is no mask: of mode RGB, expected grey or palette",
    ),
    "it is damaged": (
        lambda f: (f / "masks/lyon-1.png").write_bytes(b"\x89PNG\r\n\x1a\n"),
        "'masks/lyon-1.png' damaged",
    ),
    "it is smooth": (smooth, "hold 256 different values; expected one a class"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_mask_is_refused_where(what: str, tmp_path: Path) -> None:
    folder = write_masked(tmp_path)
    spoil, said = BAD[what]
    spoil(folder)
    with pytest.raises(DataError, match=said.replace(".", r"\.")) as found:
        read_masked(folder, DataConfig(image_size=SIZE))
    assert "\n" not in str(found.value)
