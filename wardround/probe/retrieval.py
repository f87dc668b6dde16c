"""Retrieval of images by content (CBIR): which labelled images are nearest to a query on frozen features."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler, normalize

QUERIES = 1000  # at most, drawn: their mean is right to about 0.01
AT = (1, 5, 10)


@dataclass(frozen=True)
class Shelf:
    """Images to search with or among: features [N, D], labels as 0 and 1 [N, K], patients [N]."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    patients: NDArray[np.int64]


@dataclass(frozen=True)
class Retrieved:
    """What was found for some queries."""

    queries: int
    gallery: int
    mean_average_precision: float
    precision: dict[int, float]  # among the first k
    chance: float  # both, where images came back in any order


def retrieve(queries: Shelf, gallery: Shelf, seed: int = 0) -> tuple[Retrieved, dict[int, list[int]]] | None:
    """Return figures, and for each query's place the places in the gallery of its ten nearest, nearest first.

    Nearest by the cosine of features that the gallery standardises. An image is relevant where it shares a
    label with the query, or where neither has one. Images of the query's own patient are never in its
    gallery; a query to which the gallery holds nothing relevant is not counted, and None is returned of none.
    """
    from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_precision  # takes seconds

    scaler = StandardScaler().fit(gallery.features)
    shelf, asked = (torch.from_numpy(normalize(scaler.transform(one.features))) for one in (gallery, queries))
    order = np.random.default_rng([seed, 3]).permutation(len(queries.features))[:QUERIES]
    precisions: list[float] = []
    first: list[list[float]] = []
    shares: list[float] = []
    nearest: dict[int, list[int]] = {}
    for place in np.sort(order):
        others = np.flatnonzero(gallery.patients != queries.patients[place])
        alike = torch.from_numpy(_relevant(queries.labels[place], gallery.labels[others]))
        if not alike.any():
            continue
        # Above 0: since 1.8 torchmetrics takes what has a score of 0 or less as not relevant, whatever it is.
        closeness = 2.0 + shelf[others] @ asked[place]
        precisions.append(float(retrieval_average_precision(closeness, alike)))
        first.append([float(retrieval_precision(closeness, alike, top_k=k)) for k in AT])
        shares.append(float(alike.float().mean()))
        nearest[int(place)] = others[closeness.topk(min(AT[-1], len(others))).indices.numpy()].tolist()
    if not nearest:
        return None
    means = np.mean(first, axis=0).tolist()
    figures = Retrieved(
        len(nearest),
        len(gallery.features),
        float(np.mean(precisions)),
        dict(zip(AT, means, strict=True)),
        float(np.mean(shares)),
    )
    return figures, nearest


def _relevant(query: NDArray[np.int64], gallery: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which images of the gallery share a label with the query: [K], [N, K] -> [N]."""
    alike = gallery & query if query.any() else 1 - gallery.max(axis=1, keepdims=True)
    return np.asarray(alike.any(axis=1))
