"""The k-nearest-neighbours probe."""

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

TEMPERATURE = 0.07  # of the votes, as Wu et al. 2018 (arXiv 1805.01978) and Caron et al. 2021 have it


def knn_probabilities(
    train: NDArray[np.float32], labels: NDArray[np.int64], test: NDArray[np.float32], classes: int, k: int = 20
) -> NDArray[np.float64]:
    """Return each class's share of the votes of the k nearest training images by cosine: [N, D] -> [N, K].

    Features are standardised by the training images: without it a constant part of the features, such as
    an image's brightness, makes all cosines alike. A vote weighs exp(cosine / 0.07), so that even where
    fewer than k images are labelled the nearest decide. Of labels [N, K], several an image, each has its own vote.

    >>> train = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], np.float32)
    >>> knn_probabilities(train, np.array([0, 0, 1, 1]), np.array([[2.0, 2.0]], np.float32), classes=2, k=2)
    array([[0.5, 0.5]])
    """
    scaler = StandardScaler().fit(train)
    search = NearestNeighbors(n_neighbors=min(k, len(train)), metric="cosine", algorithm="brute")
    distance, nearest = search.fit(scaler.transform(train)).kneighbors(scaler.transform(test))  # [N, k]; 1 - cosine
    weights = np.exp(-distance.astype(np.float64) / TEMPERATURE)
    known = np.eye(classes)[labels] if labels.ndim == 1 else labels  # [N, K]
    votes: NDArray[np.float64] = np.einsum("nk,nkc->nc", weights, known[nearest])
    votes /= (votes if labels.ndim == 1 else weights).sum(axis=1, keepdims=True)
    return votes
