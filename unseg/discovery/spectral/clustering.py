"""Clusters of embedded patches, and how many there are.

Legend: f points, d dimensions, K clusters.
"""

import warnings
from functools import cache

import numpy as np
from threadpoolctl import ThreadpoolController

# The mean silhouette is taken over a sample of so many points: it needs all distances. Clusters of
# which the sample would hold fewer points than this must not fall out of it: then all are taken.
_SILHOUETTE_POINTS = 1000
_SILHOUETTE_MEMBERS = 10


@cache
def _threads() -> ThreadpoolController:
    """Made once, since the search for the libraries takes as long as k-means."""
    return ThreadpoolController()


def kmeans(points: np.ndarray, count: int, *, seed: int = 0, num_init: int = 10) -> np.ndarray:
    """scikit-learn's k-means++; clusters are numbered in the order of their first points.

    Args:
        points: (f, d) float.
        count: K, from 1 to the number of points. Fewer distinct points make fewer clusters.

    Returns:
        (f,) int64 from 0.

    Raises:
        ValueError: `count` is not in that range.
    """
    if not 1 <= count <= len(points):
        raise ValueError(f"count must be from 1 to {len(points)} points, got {count}")
    if count == 1:
        return np.zeros(len(points), dtype=np.int64)
    from sklearn.cluster import KMeans  # a second, which `import unseg` need not take
    from sklearn.exceptions import ConvergenceWarning

    model = KMeans(count, n_init=num_init, random_state=seed)
    # Threads cost far more than they save on a few thousand points.
    with _threads().limit(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters
        # scikit-learn takes single precision to double in every distance, and twice the time.
        labels = model.fit_predict(points.astype(np.float64))
    _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[labels].astype(np.int64)


def cluster_by_silhouette(
    points: np.ndarray, max_count: int, *, min_silhouette: float, seed: int = 0, num_init: int = 10
) -> np.ndarray:
    """k-means with the number of clusters, up to `max_count`, of the greatest mean silhouette.

    Returns:
        (f,) int64 from 0; one cluster where no silhouette reaches `min_silhouette`.
    """
    best, labels = -np.inf, np.zeros(len(points), dtype=np.int64)
    for count in range(2, min(max_count, len(points) - 1) + 1):
        candidate = kmeans(points, count, seed=seed, num_init=num_init)
        if candidate.max() + 1 < count:  # there are no more distinct points
            break
        quality = _silhouette(points, candidate, seed)
        if quality >= min_silhouette and quality > best:
            best, labels = quality, candidate
    return labels


def _silhouette(points: np.ndarray, labels: np.ndarray, seed: int) -> float:
    """Mean silhouette, of a sample where there are many points."""
    from sklearn.metrics import silhouette_score
    from sklearn.utils import check_random_state

    if len(points) > _SILHOUETTE_POINTS:
        sample = check_random_state(seed).permutation(len(points))[:_SILHOUETTE_POINTS]
        members = np.bincount(labels[sample], minlength=labels.max() + 1)
        if members.min() >= _SILHOUETTE_MEMBERS:
            points, labels = points[sample], labels[sample]
    with _threads().limit(limits=1):
        return silhouette_score(points, labels)


def count_by_eigengap(eigenvalues: np.ndarray, max_count: int, *, background: bool) -> int:
    """The number of clusters after which eigenvalues rise most, the first gap left out.

    A graph of K + 1 parts, the background among them, has K + 1 small eigenvalues.

    Args:
        eigenvalues: in rising order, the trivial one first.
        max_count: the largest answer.
        background: whether the graph has a node that is background.
    """
    gaps = np.diff(np.asarray(eigenvalues, dtype=np.float64))[1 : max_count + 1]
    if len(gaps) == 0:
        return 1
    count = int(np.argmax(gaps)) + 1
    return min(count if background else count + 1, max_count)
