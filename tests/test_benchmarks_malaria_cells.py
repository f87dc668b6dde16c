"""The public archive of red blood cells becomes the labelled folder that was measured."""

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import malaria_cells
import numpy as np
import pytest
from PIL import Image

from wardround.config.federation import DataConfig
from wardround.data import read_labelled


def unpacked(folder: Path) -> Path:
    """Write what the archive unpacks to: colour cells of any size, and a file of a file manager's."""
    draw = np.random.default_rng(0)
    for place, patients in {"Parasitized": ("C100P61", "C38P3"), "Uninfected": ("C100P61", "C2", "C4")}.items():
        (folder / place).mkdir(parents=True)
        (folder / place / "Thumbs.db").write_bytes(b"not an image")
        for who in patients:
            for number in range(60 if who == "C100P61" else 3):
                size = draw.integers(90, 160, 2)
                name = f"{who}ThinF_IMG_20150918_144104_cell_{number}.png"
                Image.fromarray(draw.integers(0, 255, (*size, 3), np.uint8)).save(folder / place / name)
    return folder


def test_the_archive_becomes_a_labelled_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, made = unpacked(tmp_path / "cell_images"), tmp_path / "images" / "malaria_cells"
    monkeypatch.setattr(sys, "argv", ["malaria_cells.py", str(cells), "--to", str(made)])
    malaria_cells.main()
    found = read_labelled(made, DataConfig(image_size=48, channels=1, mean=[0.5], std=[0.25]), "label")
    with (made / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found.images) == 50 + 3 + 50 + 3 + 3
    assert {(row["patient"], row["split"]) for row in rows} == {
        ("C100", "train"),
        ("C38", "val"),
        ("C2", "test"),
        ("C4", "val"),
    }
    with Image.open(made / rows[0]["file"]) as image:
        assert (image.size, image.mode) == ((50, 50), "L")
    with pytest.raises(SystemExit, match=r"holds a labels\.csv already"):
        malaria_cells.main()


def test_another_folder_and_another_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected the folders Parasitized and Uninfected"):
        malaria_cells.taken(tmp_path)
    with pytest.raises(SystemExit, match="expected a name such as"):
        malaria_cells.told("cell_1.png")


def test_patients_sites_and_splits_are_those_that_were_measured(shared_data: Callable[[str], Path]) -> None:
    with (shared_data("malaria_cells") / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14595
    for row in rows:
        assert malaria_cells.told(Path(row["file"]).name) == (row["patient"], row["site"], row["split"])
