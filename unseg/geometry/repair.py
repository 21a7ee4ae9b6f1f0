"""Points for empty clusters of k-means.

Legend: N points, K clusters, E given points.
"""

import torch
from torch import Tensor


def costly_points(costs: Tensor, labels: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The points that cost most, at most one of each cluster, for the empty clusters.

    A cluster whose points all cost nothing, or that has one point, gives none. So not all empty
    clusters need get one; but the number of clusters that can give grows with each time.

    Args:
        costs: (N,) float64.
        labels: (N,) int64.
        sizes: (K,) int64, points of each cluster.

    Returns:
        points: (E,) int64 indices, costliest first, of equal ones the first.
        clusters: (E,) int64, the empty clusters that get them, in ascending order.
    """
    empty = (sizes == 0).nonzero()[:, 0]
    order = torch.argsort(costs, descending=True, stable=True)
    order = order[((sizes[labels] > 1) & (costs > 0))[order]]
    places = torch.arange(len(order), device=order.device)
    first = torch.full_like(sizes, len(order))
    first.scatter_reduce_(0, labels[order], places, "amin")
    points = order[first[first < len(order)].sort().values[: len(empty)]]
    return points, empty[: len(points)]
