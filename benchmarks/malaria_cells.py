"""Make the labelled folder malaria_cells of the evidence from the public archive of the same cells.

    python benchmarks/malaria_cells.py cell_images --to images/malaria_cells

`cell_images` is what the NIH/NLM archive of 27,558 segmented red blood cells unpacks to, with the folders Parasitized
and Uninfected (Rajaraman et al., PeerJ 2018). Patients, sites and splits are those that were measured. The cells are
not quite: at most 50 a class and patient are taken by the hash of their name, and those that were measured had been
made grey and 50 pixels by others, who do not say how.
"""

import argparse
import csv
import hashlib
import re
from collections import defaultdict
from pathlib import Path

from PIL import Image
from tqdm import tqdm

LABELS = {"Parasitized": "parasitized", "Uninfected": "uninfected"}
MOST = 50  # cells of a class and patient
SIDE = 50  # pixels
NAME = re.compile(r"(C\d+).*_IMG_2015(\d\d)\d\d_")
# Acquisition campaigns, by the month in a file's name; a patient was seen in one.
CAMPAIGNS = {
    **dict.fromkeys(("06", "07"), "c1_2015-06_07"),
    "08": "c2_2015-08",
    "09": "c3_2015-09",
    "10": "c4_2015-10",
    **dict.fromkeys(("11", "12"), "c5_2015-11_12"),
}
# Patients, drawn once, 15 and 25 % of each campaign's; the others train.
SPLITS = {
    "val": """C4 C38 C42 C53 C60 C61 C66 C82 C85 C95 C97 C105 C107 C119 C122 C127 C131 C140 C158 C176 C201 C205 C218
        C219 C227 C229 C232 C235 C237 C240""",
    "test": """C2 C5 C13 C46 C48 C50 C56 C58 C64 C65 C68 C78 C79 C80 C83 C87 C88 C103 C104 C113 C115 C117 C118 C125 C128
        C137 C141 C143 C144 C150 C151 C152 C153 C156 C165 C174 C179 C181 C183 C188 C206 C210 C211 C217 C222 C224 C225
        C236 C239 C241""",
}
SPLIT = {patient: split for split, patients in SPLITS.items() for patient in patients.split()}


def main() -> None:
    """Write the grey cells and labels.csv."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("cells", type=Path, help="the folder with Parasitized and Uninfected")
    options.add_argument("--to", type=Path, default=Path("images/malaria_cells"))
    given = options.parse_args()
    if (given.to / "labels.csv").exists():
        raise SystemExit(f"{given.to}: holds a labels.csv already; remove the folder, or name another.")
    rows = []
    for path, label in tqdm(taken(given.cells), "cells", unit="cell", disable=None):
        file = Path("images") / label / path.name
        (given.to / file).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(given.to / file)
        patient, site, split = told(path.name)
        rows.append([file.as_posix(), label, patient, site, split])
    with (given.to / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "label", "patient", "site", "split"], *rows])
    print(f"{len(rows):,} cells of {len({row[2] for row in rows})} patients in {given.to}. Next, with DATA its parent:")
    print(f"  make evidence SUITE=malaria DATA={given.to.parent} ARGS=--quick")


def taken(folder: Path) -> list[tuple[Path, str]]:
    """Return the cells to take, with their labels, by name."""
    found: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for place, label in LABELS.items():
        for path in (folder / place).glob("*.png"):
            found[label, told(path.name)[0]].append(path)
    if {label for label, _ in found} != set(LABELS.values()):
        raise SystemExit(f"{folder}: expected the folders {' and '.join(LABELS)} with PNG files.")
    drawn = [
        (path, label)
        for (label, _), paths in found.items()
        for path in sorted(paths, key=lambda path: hashlib.sha256(path.name.encode()).digest())[:MOST]
    ]
    return sorted(drawn, key=lambda one: (one[1], one[0].name))


def told(name: str) -> tuple[str, str, str]:
    """Return the patient, site and split that a cell's file name tells.

    >>> told("C13NThinF_IMG_20150614_131318_cell_179.png")
    ('C13', 'c1_2015-06_07', 'test')
    """
    found = NAME.match(name)
    if found is None or found[2] not in CAMPAIGNS:
        raise SystemExit(f"{name}: expected a name such as C13NThinF_IMG_20150614_131318_cell_179.png.")
    return found[1], CAMPAIGNS[found[2]], SPLIT.get(found[1], "train")


if __name__ == "__main__":
    main()
