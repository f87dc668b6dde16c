"""What the backbone of each round makes of the coordinator's own images: for a report, never to choose a round by."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from wardround.backbones import released_model
from wardround.config.federation import Recipe
from wardround.data import LabelledImages
from wardround.downstream.arms import raw_pixels
from wardround.downstream.splits import split
from wardround.errors import DataError
from wardround.probe.embedding import LEAST, plane
from wardround.probe.features import features
from wardround.probe.interval import interval
from wardround.probe.knn import knn_probabilities
from wardround.probe.monitor import figures
from wardround.probe.retrieval import Shelf, retrieve
from wardround.probe.scores import can_tell, score
from wardround.report.reconstruction import reconstructed
from wardround.report.seen import Map, Neighbours, Pixels, Probe, Reconstructions, Seen
from wardround.update import State

GALLERY, QUERIES = 768, 512  # images at most: a ViT-Base takes some minutes for the eight rounds on two cores
ROUNDS = 8  # at most, the first and the newest among them
PICTURES, DRAWN_ROUNDS = 6, 4
NEAREST = 5
TILE = 128  # pixels: more would make the page heavy
Features = NDArray[np.float32]


def look(
    recipe: Recipe,
    rounds: Sequence[int],
    state_of: Callable[[int], State],
    images: LabelledImages,
    sites: Sequence[str],
) -> Seen:
    """Return probe, effective rank, reconstructions, neighbours and map of some of the rounds, the newest among them.

    `rounds` begins with 0, the state before training; `sites` are the federation's. The same input gives the same
    values. Probes are of flat images; of volumes only the reconstructions are there.
    """
    chosen = _spaced(rounds, ROUNDS)
    shown = _spread(images)
    pictures, why = _reconstructions(recipe, _spaced(chosen, DRAWN_ROUNDS), state_of, images.images[shown])
    missing = {} if pictures else {"reconstructions": why}
    if recipe.data.dimensions == 3:
        flat = "k-NN, neighbours and the map are of flat images"
        missing |= dict.fromkeys(("probe", "neighbours", "map"), flat)
        return Seen(len(images.images), reconstructions=pictures, missing=missing)
    test, gallery, notes = _places(images)
    both = np.concatenate([gallery, test])
    by_round: dict[int, Features] = {}
    for number in tqdm(chosen, "rounds looked at", unit="round", disable=None, delay=2, leave=False):
        model = released_model(recipe, state_of(number), images.images[both])
        by_round[number] = features(model, images.images[both], recipe.data.mean, recipe.data.std)
    newest, count = by_round[chosen[-1]], len(gallery)
    rank = {
        number: figures(torch.from_numpy(found[count:]), torch.from_numpy(found[count:])).effective_rank
        for number, found in by_round.items()
    }
    return Seen(
        len(images.images),
        rank,
        None if notes else _probe(by_round, images, gallery, test, sites),
        _neighbours(newest, images, both, shown),
        pictures,
        _map(newest[count:], images, test) if len(test) >= LEAST else None,
        missing | ({"probe": notes} if notes else {}) | ({} if len(test) >= LEAST else {"map": "too few images"}),
    )


def _places(images: LabelledImages) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
    """Return the places of test and training images, drawn, and why they cannot be probed; then of all images."""
    draw = np.random.default_rng(0)
    try:
        found, why = split(images), ""
        test, train = (draw.permutation(places) for places in (found.test, found.train))
    except DataError as error:
        why = str(error)
        test, train = np.array_split(draw.permutation(len(images.images)), 2)
    return np.sort(test[:QUERIES]), np.sort(train[:GALLERY]), why


def _probe(
    by_round: dict[int, Features],
    images: LabelledImages,
    gallery: NDArray[np.int64],
    test: NDArray[np.int64],
    sites: Sequence[str],
) -> Probe:
    """Return k-NN's balanced accuracy by round, and on the test images of each site that has two classes there."""
    known, truth, patients = images.labels[gallery], images.labels[test], images.patients[test]
    groups = {site: np.flatnonzero(images.sites[test] == site) for site in sites}
    groups = {site: rows for site, rows in groups.items() if can_tell(truth[rows])}

    def answers(found: Features) -> NDArray[np.float64]:
        return knn_probabilities(found[: len(gallery)], known, found[len(gallery) :], len(images.classes))

    said = {number: answers(found) for number, found in by_round.items()}
    ends = interval(truth, [said[max(said)]], patients)
    pixels = answers(raw_pixels(images.images[np.concatenate([gallery, test])]))
    return Probe(
        {number: _accuracy(truth, one) for number, one in said.items()},
        {
            site: {number: _accuracy(truth[rows], one[rows]) for number, one in said.items()}
            for site, rows in groups.items()
        },
        None if ends is None else (ends[0].headline[0], ends[1].headline[0]),
        _accuracy(truth, pixels),
        len(gallery),
        len(test),
        len(np.unique(patients)),
        len(images.classes),
    )


def _accuracy(truth: NDArray[np.int64], answers: NDArray[np.float64]) -> float:
    return score(truth, answers).headline[0]


def _neighbours(
    found: Features, images: LabelledImages, both: NDArray[np.int64], shown: NDArray[np.int64]
) -> Neighbours | None:
    """Return what comes back among all images that were looked at, for some of them."""
    shelf = Shelf(found, images.one_hot[both], images.patients[both])
    retrieved = retrieve(shelf, shelf)
    if retrieved is None:
        return None
    told, nearest = retrieved
    asked = list(nearest)
    queries = [asked[place] for place in np.linspace(0, len(asked) - 1, min(len(shown), len(asked)), dtype=int)]
    lines = [[query, *nearest[query][:NEAREST]] for query in queries]
    places = sorted({place for line in lines for place in line})
    return Neighbours(
        tuple(tuple(places.index(place) for place in line) for line in lines),
        _pixels(torch.from_numpy(images.images[both[places]]).float() / 255.0),
        tuple(images.classes[images.labels[both[place]]] for place in places),
        told.precision[NEAREST],
        told.chance,
        told.queries,
    )


def _reconstructions(
    recipe: Recipe, rounds: Sequence[int], state_of: Callable[[int], State], images: NDArray[np.uint8]
) -> tuple[Reconstructions | None, str]:
    by_round: dict[int, Pixels] = {}
    seen = torch.empty(0)
    for number in rounds:
        panels = reconstructed(recipe, state_of(number), images)
        if panels is None:
            return None, f"the method '{recipe.method.name}' fills nothing in; its nearest neighbours are below"
        seen, filled = panels
        by_round[number] = _pixels(filled)
    return Reconstructions(_pixels(torch.from_numpy(images).float() / 255.0), _pixels(seen), by_round), ""


def _map(found: Features, images: LabelledImages, places: NDArray[np.int64]) -> Map:
    labels = np.array(images.classes)[images.labels[places]]
    return Map(plane(found), labels, images.sites[places], found.shape[1])


def _pixels(images: Tensor) -> Pixels:
    """[N, C, S, S] or [N, C, S, S, S] -> [N, H, W, C] in [0, 1], of volumes the middle slices; as tiles."""
    flat = images[:, :, images.shape[2] // 2] if images.ndim == 5 else images
    if flat.shape[-1] > TILE:
        flat = interpolate(flat, (TILE, TILE), mode="bilinear", antialias=True)
    return flat.clamp(0, 1).permute(0, 2, 3, 1).contiguous().numpy()


def _spread(images: LabelledImages) -> NDArray[np.int64]:
    """Return a few places over the whole set, of images that nobody trained on where it has such."""
    test = np.flatnonzero(images.splits == "test")
    among = test if len(test) >= PICTURES else np.arange(len(images.images))
    return among[np.linspace(0, len(among) - 1, min(PICTURES, len(among)), dtype=int)]


def _spaced(rounds: Sequence[int], most: int) -> list[int]:
    """Return so many rounds at most, evenly spaced, the first and the last among them."""
    places = np.linspace(0, len(rounds) - 1, min(most, len(rounds)))
    return [rounds[round(place)] for place in places]
