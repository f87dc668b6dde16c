"""The k-nearest-neighbours probe."""

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors


def knn_probabilities(
    train: NDArray[np.float32], labels: NDArray[np.int64], test: NDArray[np.float32], classes: int, k: int = 20
) -> NDArray[np.float64]:
    """Return the share of each class among the k nearest training images by cosine: [N, D] -> [N, K].

    Where fewer than k images are labelled, all of them vote.

    >>> train = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]], np.float32)
    >>> knn_probabilities(train, np.array([0, 0, 1]), np.array([[2.0, 0.0]], np.float32), classes=2, k=2)
    array([[1., 0.]])
    """
    search = NearestNeighbors(n_neighbors=min(k, len(train)), metric="cosine", algorithm="brute").fit(train)
    nearest = search.kneighbors(test, return_distance=False)  # [N, k]
    votes: NDArray[np.float64] = np.eye(classes)[labels[nearest]].mean(axis=1)
    return votes
