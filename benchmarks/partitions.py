"""A labelled folder's training images dealt out anew: to its own sites, by label skew, at random, or all to one."""

import csv
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SITES = 5
ALPHA = 0.1  # of the Dirichlet distribution: each class lies almost wholly at one or two sites
LEAST = 128  # training images that every site has
TRIES = 10_000


def partition(folder: Path, how: str, seed: int, label: str, to: Path) -> Path:
    """Return a labelled folder of `folder`'s training images, linked, with each patient at one site.

    how: sites, the folder's own; skew, Dirichlet(0.1) over five sites by the label that a patient has more of than
    others have; iid, patients at random over five sites; one, a single site. What an earlier call wrote is used again.
    """
    target = to / f"{folder.name}-{how}-{seed}"
    if (target / "labels.csv").exists():
        return target
    with (folder / "labels.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    patients, labels = (np.array([row[name] for row in rows]) for name in ("patient", label))
    dealt = {
        "sites": lambda: np.array([row["site"] for row in rows]),
        "skew": lambda: deal(labels, patients, ALPHA, np.random.default_rng(seed)),
        "iid": lambda: deal(labels, patients, None, np.random.default_rng(seed)),
        "one": lambda: np.full(len(rows), "all"),
    }[how]()
    for row, site in zip(rows, dealt.tolist(), strict=True):
        row["site"] = site
        link = target / row["file"]
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link_or_copy(folder / row["file"], link)
    with (target / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return target


def deal(
    labels: NDArray[np.str_], patients: NDArray[np.str_], alpha: float | None, rng: np.random.Generator
) -> NDArray[np.str_]:
    """Return each image's site, [N]: patients whole, by the draw of their label from Dirichlet(alpha).

    A patient's label is the one that they have most of, beside how frequent it is. Without alpha the sites are
    equally likely. Drawn again until every site has 128 images; site1 is the largest. Hsu et al. 2019
    (arXiv:1909.06335), with patients in the place of images.
    """
    names, whose = np.unique(patients, return_inverse=True)
    kinds, kind = np.unique(labels, return_inverse=True)
    counts = np.zeros((len(names), len(kinds)), np.int64)
    np.add.at(counts, (whose, kind), 1)
    main = (counts / counts.sum(axis=1, keepdims=True) / counts.sum(axis=0)).argmax(axis=1)
    for _ in range(TRIES):
        shares = np.full((len(kinds), SITES), 1 / SITES)
        if alpha is not None:
            shares = rng.dirichlet([alpha] * SITES, len(kinds))
        places = np.array([rng.choice(SITES, p=shares[one]) for one in main])
        sizes = np.bincount(places[whose], minlength=SITES)
        if sizes.min() >= LEAST:
            rank = np.argsort(np.argsort(-sizes))
            return np.array([f"site{rank[place] + 1}" for place in places[whose]])
    raise SystemExit(f"{len(names)} patients cannot be dealt to {SITES} sites with {LEAST} images each.")


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or where the file systems differ a copy."""
    try:
        os.link(source, target)
    except OSError:
        target.write_bytes(source.read_bytes())
