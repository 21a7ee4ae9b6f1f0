"""How well clusters agree with classes, and embeddings with wholes and parts.

Measures rise with the number of clusters (purity is 1 where every item is a cluster): compare at
the same K and on the same items. All are shares in [0, 1], not percents; NaN of nothing.

Legend: N items, K clusters, C classes, D dimensions, T pairs.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unseg.evaluation.matching import hungarian
from unseg.geometry import PoincareBall

# Elements of a matrix of distances at once.
_AT_ONCE = 2**24


def confusion(clusters: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """How many items have each pair of cluster and class: int64 (K, C), from one count.

    Args:
        clusters, classes: (N,) integers >= 0; K and C are the greatest number + 1.

    Raises:
        ValueError: of different lengths, not integers, or below 0.
    """
    clusters, classes = _labels(clusters, "clusters"), _labels(classes, "classes")
    if len(clusters) != len(classes):
        raise ValueError(f"{len(clusters)} clusters and {len(classes)} classes: one each is needed")
    k, c = (int(x.max(initial=-1)) + 1 for x in (clusters, classes))
    return np.bincount(clusters * c + classes, minlength=k * c).reshape(k, c)


def _labels(labels: np.ndarray, name: str) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or (labels.size and labels.dtype.kind not in "iu"):
        raise ValueError(f"{name}: integers (N,) are needed, got {labels.dtype} {labels.shape}")
    if labels.min(initial=0) < 0:
        raise ValueError(f"{name}: numbers of 0 or more are needed, got {labels.min()}")
    return labels.astype(np.int64)


def normalized_mutual_information(clusters: np.ndarray, classes: np.ndarray) -> float:
    """Mutual information over the arithmetic mean of the two entropies; arguments (N,)."""
    return _of_some(clusters, classes, "normalized_mutual_info_score")


def adjusted_mutual_information(clusters: np.ndarray, classes: np.ndarray) -> float:
    """Mutual information less that of random labels (arithmetic mean); arguments (N,).

    May be below 0.
    """
    return _of_some(clusters, classes, "adjusted_mutual_info_score")


def adjusted_rand_index(clusters: np.ndarray, classes: np.ndarray) -> float:
    """Share of pairs of items on which clusters and classes agree, less that of random labels.

    Arguments (N,). May be below 0.
    """
    return _of_some(clusters, classes, "adjusted_rand_score")


def _of_some(clusters: np.ndarray, classes: np.ndarray, score: str) -> float:
    """A score of sklearn.metrics by its name; NaN of nothing."""
    from sklearn import metrics  # takes a second to import

    clusters, classes = _labels(clusters, "clusters"), _labels(classes, "classes")
    return float(getattr(metrics, score)(classes, clusters)) if len(classes) else float("nan")


def purity(clusters: np.ndarray, classes: np.ndarray) -> float:
    """Share of items that are of the most frequent class of their cluster; arguments (N,)."""
    counts = confusion(clusters, classes)
    return float(counts.max(1, initial=0).sum() / counts.sum()) if counts.size else float("nan")


def clustering_accuracy(clusters: np.ndarray, classes: np.ndarray) -> float:
    """Share of items that are right if each class is one cluster at most and the reverse.

    The best such assignment (Hungarian, rectangular): items of clusters left over are wrong.
    Arguments (N,).
    """
    counts = confusion(clusters, classes)
    if not counts.size:
        return float("nan")
    return float(sum(counts[pair] for pair in hungarian(counts)) / counts.sum())


def majority_classes(clusters: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The most frequent class of each item's cluster, (N,) int64; the first of equal ones."""
    counts = confusion(clusters, classes)
    return counts.argmax(1)[np.asarray(clusters)] if counts.size else np.zeros(0, np.int64)


def macro_recall(
    predicted: np.ndarray, classes: np.ndarray, groups: Sequence[str]
) -> dict[str, float]:
    """Mean recall of the classes that there are, over all and by frequency group.

    Args:
        predicted: (N,) int64, -1 for none.
        classes: (N,) int64.
        groups: the group of each of the C classes, such as "r", "c", "f".

    Returns:
        "all", and every group of `groups`; NaN for one without an item.
    """
    classes = _labels(classes, "classes")
    total = np.bincount(classes, minlength=len(groups))
    if len(total) > len(groups):
        raise ValueError(f"groups: of {len(total)} classes {len(groups)} have one")
    right = np.bincount(classes[np.asarray(predicted) == classes], minlength=len(groups))
    there = total > 0
    return _mean_by_group(right / np.maximum(total, 1), there, groups)


def coverage(names: np.ndarray, present: np.ndarray, groups: Sequence[str]) -> dict[str, float]:
    """Share of the classes that there are after which at least one cluster is named.

    Args:
        names: (K,) class of each cluster, -1 for none.
        present: classes that there are, in any order, as often as you like.
        groups: the group of each of the C classes.

    Returns:
        "all", and every group of `groups`; NaN for one without a class that there is.
    """
    there, named = np.zeros((2, len(groups)), dtype=bool)
    there[_labels(present, "present")] = True
    names = np.asarray(names, dtype=np.int64)
    named[names[names >= 0]] = True
    return _mean_by_group(named.astype(np.float64), there, groups)


def _mean_by_group(
    values: np.ndarray, there: np.ndarray, groups: Sequence[str]
) -> dict[str, float]:
    groups = np.asarray(groups)
    chosen = {"all": there} | {str(g): there & (groups == g) for g in dict.fromkeys(groups)}
    return {g: float(values[c].mean()) if c.any() else float("nan") for g, c in chosen.items()}


def hierarchy_accuracy(tangents: Tensor, pairs: Tensor) -> float:
    """Share of wholes that lie nearer to the origin than their part.

    Args:
        tangents: (N, D) at the origin: the distance from it is 2|u| whatever the curvature is, and
            |u| orders Euclidean points likewise.
        pairs: int64 (T, 2): a whole and its part.
    """
    if not len(pairs):
        return float("nan")
    norm = tangents.double().norm(dim=1)
    return float((norm[pairs[:, 0]] < norm[pairs[:, 1]]).double().mean())


def distances(first: Tensor, second: Tensor, *, geometry: str, c: float = 1.0) -> Tensor:
    """Distances of all pairs of embeddings, float64 (N, M).

    Args:
        first: tangents at the origin (N, D).
        second: (M, D), likewise.
        geometry: "poincare", of curvature -c, or "euclidean".
    """
    first, second = first.double(), second.double()
    if geometry == "euclidean":
        return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")
    ball = PoincareBall(c)
    return ball.pairwise_dist(ball.expmap0(first), ball.expmap0(second))


def nearest(
    queries: Tensor,
    points: Tensor,
    k: int,
    *,
    geometry: str,
    c: float = 1.0,
    leave_one_out: bool = False,
) -> Tensor:
    """The k nearest points of each query, nearest first; equally near ones by rising number.

    Args:
        queries: tangents (N, D).
        points: tangents (M, D).
        k: fewer are found if there are fewer points.
        geometry, c: see :func:`distances`.
        leave_one_out: queries and points are the same, and none is its own neighbour.

    Returns:
        int64 (N, min(k, M)), or M - 1 if one is left out.
    """
    k = min(k, len(points) - leave_one_out)
    if k < 1 or not len(queries):
        return torch.zeros((len(queries), max(k, 0)), dtype=torch.int64)
    rows = max(1, _AT_ONCE // len(points))
    found = []
    for start in range(0, len(queries), rows):
        away = distances(queries[start : start + rows], points, geometry=geometry, c=c)
        if leave_one_out:
            here = torch.arange(len(away))
            away[here, here + start] = torch.inf
        # By rising number, then stably by distance: topk does not say how it orders equal ones.
        index = away.topk(k, dim=1, largest=False).indices.sort(dim=1).values
        order = away.gather(1, index).argsort(dim=1, stable=True)
        found.append(index.gather(1, order))
    return torch.cat(found)


def knn_accuracy(tangents: Tensor, classes: np.ndarray, *, geometry: str, c: float = 1.0) -> float:
    """Share of items whose nearest other item is of their class.

    Args:
        tangents: (N, D).
        classes: (N,).
        geometry, c: see :func:`distances`.
    """
    classes = torch.as_tensor(_labels(classes, "classes"))
    found = nearest(tangents, tangents, 1, geometry=geometry, c=c, leave_one_out=True)
    if not found.numel():
        return float("nan")
    return float((classes[found[:, 0]] == classes).double().mean())


@dataclass(frozen=True)
class CurvePoint:
    """What clusters are worth at one K and one least size.

    Attributes:
        k: clusters asked for.
        min_size: least number of members of a cluster that is named.
        clusters: of at least one member.
        named: of at least `min_size` members and the least purity.
        kept: share of items in named clusters.
        right: share of all items that are in named clusters and of their name.
        purity, nmi, accuracy: of all clusters, whatever their size.
    """

    k: int
    min_size: int
    clusters: int
    named: int
    kept: float
    right: float
    purity: float
    nmi: float
    accuracy: float


def purity_curve(
    cluster: Callable[[int], np.ndarray],
    classes: np.ndarray,
    ks: Iterable[int],
    *,
    min_sizes: Sequence[int] = (1, 3),
    min_purity: float = 0.95,
) -> list[CurvePoint]:
    """How naming by majority gains from many and small clusters alone.

    The purity of a cluster of one is 1, so a rule that asks for purity only looks the better the
    more clusters there are. Names are from the very items that are counted here.

    Args:
        cluster: gives the (N,) clusters of the items for a K.
        classes: (N,) of the items.
        ks: numbers of clusters.
        min_sizes: least sizes to count named clusters by.
        min_purity: least purity of a named cluster.

    Returns:
        one point for each K and least size, in that order.
    """
    points = []
    for k in ks:
        clusters = np.asarray(cluster(k))
        counts = confusion(clusters, classes)
        size, top = counts.sum(1), counts.max(1, initial=0)
        total = max(1, int(size.sum()))
        shared = {
            "clusters": int((size > 0).sum()),
            "purity": purity(clusters, classes),
            "nmi": normalized_mutual_information(clusters, classes),
            "accuracy": clustering_accuracy(clusters, classes),
        }
        for least in min_sizes:
            named = (size >= max(1, least)) & (top / np.maximum(size, 1) >= min_purity)
            shares = {"kept": size[named].sum() / total, "right": top[named].sum() / total}
            shares = {name: float(share) for name, share in shares.items()}
            points.append(CurvePoint(k, least, named=int(named.sum()), **shares, **shared))
    return points
