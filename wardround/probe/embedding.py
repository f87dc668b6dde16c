"""Features laid out on a plane, for the eye."""

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

LEAST = 8  # images, below which there is no neighbourhood to keep
PERPLEXITY = 30.0  # about how many neighbours of each point are kept, as van der Maaten and Hinton 2008 advise


def plane(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a place in the plane for each image: [N, D] -> [N, 2]; near stays near, far distances mean nothing.

    t-SNE from the first two principal components, so that nothing is left to chance. Raises ValueError for fewer
    than eight images.
    """
    if len(features) < LEAST:
        raise ValueError(f"{len(features)} images, expected {LEAST} at least")
    scaled = StandardScaler().fit_transform(features)
    count = min(32, *scaled.shape)  # the rest is noise, and time
    with threadpool_limits(1):  # the same bits whatever the number of cores
        reduced = PCA(count, random_state=0).fit_transform(scaled)
        perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
        found = TSNE(perplexity=perplexity, init="pca", random_state=0, method="barnes_hut").fit_transform(reduced)
    return np.asarray(found, np.float32)
