"""k-means in the Poincaré ball from a few points a step.

Legend: N points, D dimensions, K clusters, B points of a batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from unseg.geometry.assignment import nearest_centroids
from unseg.geometry.basics import rim_gap
from unseg.geometry.centroid_steps import (
    cluster_sums,
    lorentz_parts,
    midpoints_of_sums,
    point_costs,
)
from unseg.geometry.repair import costly_points


@dataclass(frozen=True, eq=False)
class MinibatchRun:
    """Centroids (K, D), the summed costs of each pass as they were met, why it ended ("tolerance"
    or "max_iter"), and how many clusters were moved to a point."""

    centroids: Tensor
    history: tuple[float, ...]
    stop_reason: str
    repaired: int


def lorentz_minibatches(
    x: Tensor,
    centroids: Tensor,
    c: float,
    *,
    batch: int,
    max_iter: int,
    tol: float,
    generator: torch.Generator,
) -> MinibatchRun:
    """Midpoints that follow batches of points, in passes over all points in random order.

    Sums of hyperboloid coordinates (spec long_tail.md 4.5) fade by 1 - B / N a batch, so that they
    remember about one pass; one batch of all points is a Lloyd iteration. After each pass clusters
    that met no point are moved to points of the last batch that cost most. On a long tail rare
    clusters meet few points: prefer all points at once where they fit.

    Args:
        x: (N, D) float32 or float64 in the ball.
        centroids: (K, D) float64.
        batch: B; the last one of a pass may be smaller.
        max_iter: passes.
        tol: stop if a pass cost no less than the one before, by this share.
        generator: of the CPU.
    """
    k = len(centroids)
    sums = centroids.new_zeros(k, centroids.shape[1] + 2)
    history: list[float] = []
    repaired, reason = 0, "max_iter"
    for _ in range(max_iter):
        total, met = 0.0, torch.zeros(k, dtype=torch.int64, device=x.device)
        for chosen in torch.randperm(len(x), generator=generator).split(batch):
            points = x[chosen.to(x.device)]
            labels, distances = nearest_centroids(points, centroids, c)
            costs = point_costs(distances, c, "lorentz")
            total += float(costs.sum())
            met += torch.bincount(labels, minlength=k)
            parts = lorentz_parts(points, rim_gap(points, c))
            sums = (1 - len(points) / len(x)) * sums + cluster_sums(parts, labels, k)
            centroids = midpoints_of_sums(sums, c, centroids)
        history.append(total)
        if len(history) > 1 and history[-2] - history[-1] <= tol * history[-2]:
            reason = "tolerance"
            break
        if (met == 0).any():
            # Of clusters that met points each can give one; those that met none have the size 0.
            sizes = torch.bincount(labels, minlength=k) + (met > 0)
            given, clusters = costly_points(costs, labels, sizes)
            centroids = centroids.index_copy(0, clusters, points[given].double())
            sums = sums.index_copy(0, clusters, parts[given])
            repaired += len(given)
    return MinibatchRun(centroids, tuple(history), reason, repaired)
