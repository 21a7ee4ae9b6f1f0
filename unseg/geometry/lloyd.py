"""Lloyd iterations in the Poincaré ball.

Legend: N points, n of them given by this process, D dimensions, K clusters, s square root of c.
"""

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unseg.geometry.assignment import nearest_centroids
from unseg.geometry.basics import check_curvature, rim_gap
from unseg.geometry.centroid_steps import (
    CENTROIDS,
    Members,
    frechet_step,
    lorentz_step,
    point_costs,
)
from unseg.geometry.repair import costly_points
from unseg.geometry.sharded_rows import ShardedRows


@dataclass(frozen=True, eq=False)
class KMeansResult:
    """Clusters of points, and how they came about.

    Attributes:
        centroids: (K, D) float64, in the ball (hyperbolic) or anywhere (Euclidean).
        labels: (n,) int64, the nearest centroid of each point that this process gave.
        distances: (n,) float64, to that centroid.
        objective: what was minimised, a sum over all points: of cosh(s d) - 1 ("lorentz"), of d^2
            ("frechet", Euclidean).
        objectives: all that are known of these points and centroids, by name.
        n_iter: centroid steps; passes over the points with minibatches.
        stop_reason: "labels" (none changed), "tolerance" (the objective fell by less than that,
            relatively) or "max_iter".
        history: the objective after 0, 1, ... n_iter centroid steps, every point at its nearest
            centroid. It never rises but for rounding, see hyperbolic_kmeans. Minibatches: the sum
            of the costs as they were met in each pass, then the objective: that may rise.
        repaired: how many times an empty cluster was given a point.
    """

    centroids: Tensor
    labels: Tensor
    distances: Tensor
    objective: float
    objectives: dict[str, float]
    n_iter: int
    stop_reason: str
    history: tuple[float, ...]
    repaired: int = 0


@dataclass(frozen=True)
class KMeansSettings:
    """Arguments of hyperbolic_kmeans, checked."""

    k: int
    c: float
    centroid: str
    max_iter: int
    tol: float
    minibatch: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        check_curvature(self.c)
        if self.centroid not in CENTROIDS:
            raise ValueError(f"centroid: one of {CENTROIDS} is needed, got {self.centroid!r}")
        if self.max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {self.max_iter}")
        if not self.tol >= 0:
            raise ValueError(f"tol must not be negative, got {self.tol}")
        if self.minibatch < 0:
            raise ValueError(f"minibatch must not be negative, got {self.minibatch}")
        if self.minibatch and self.centroid != "lorentz":
            raise ValueError(f"minibatch: centroid must be 'lorentz', got {self.centroid!r}")


@dataclass
class _Partition:
    """This rank's own points at their nearest centroids, and the objective of all points."""

    labels: Tensor
    distances: Tensor
    objective: float


class KMeansProblem:
    """Points and settings; every rank calls every method."""

    def __init__(self, shards: ShardedRows, settings: KMeansSettings):
        self.shards, self.settings = shards, settings
        gaps = [rim_gap(x, settings.c) for x in shards.chunks()]
        empty = shards.own.new_zeros(0, dtype=torch.float64)
        self.gaps = torch.cat(gaps) if gaps else empty

    def assign(self, centroids: Tensor) -> _Partition:
        settings, shards = self.settings, self.shards
        labels = self.gaps.new_zeros(len(self.gaps), dtype=torch.int64)
        distances = torch.zeros_like(self.gaps)
        outputs = zip(shards.chunks(), shards.chunks(labels), shards.chunks(distances))
        for x, label, distance in outputs:
            found, away = nearest_centroids(x, centroids, settings.c)
            label.copy_(found)
            distance.copy_(away)
        return _Partition(labels, distances, self.total(distances, settings.centroid))

    def total(self, distances: Tensor, centroid: str) -> float:
        """The objective of all points."""
        chunks = self.shards.chunks(distances)
        parts = (point_costs(d, self.settings.c, centroid).sum() for d in chunks)
        return float(self.shards.add_up(parts, distances.new_zeros(())))

    def sizes(self, labels: Tensor) -> Tensor:
        """(K,) int64: points of each cluster, of all ranks."""
        return self.shards.add_exact(torch.bincount(labels, minlength=self.settings.k))

    def repair(self, partition: _Partition, sizes: Tensor, centroids: Tensor) -> tuple[Tensor, int]:
        """Give empty clusters the costliest points, by changing the labels.

        Returns:
            centroids: (K, D), with these points; and how many there were.
        """
        costs = point_costs(partition.distances, self.settings.c, self.settings.centroid)
        every_cost = self.shards.gather(costs)
        every_label = self.shards.gather(partition.labels)
        points, clusters = costly_points(every_cost, every_label, sizes)
        own = points - self.shards.start
        mine = (own >= 0) & (own < len(partition.labels))
        partition.labels[own[mine]] = clusters[mine]
        given = self.shards.take(points).double()
        return centroids.index_copy(0, clusters, given), len(points)

    def move(self, labels: Tensor, centroids: Tensor) -> Tensor:
        step = frechet_step if self.settings.centroid == "frechet" else lorentz_step
        return step(Members(self.shards, self.gaps, labels), self.settings.c, centroids)

    def result(self, centroids: Tensor, partition: _Partition, **how: object) -> KMeansResult:
        return KMeansResult(
            centroids,
            self.shards.give_back(partition.labels),
            self.shards.give_back(partition.distances),
            partition.objective,
            {name: self.total(partition.distances, name) for name in CENTROIDS},
            **how,
        )


def _same_on_all(shards: ShardedRows, labels: Tensor, previous: Tensor | None) -> bool:
    if previous is None:
        return False
    changed = (labels != previous).any().to(torch.int64)
    return not shards.add_exact(changed)


def lloyd(problem: KMeansProblem, centroids: Tensor) -> KMeansResult:
    """Lloyd iterations from these centroids (K, D) until one of the reasons to stop."""
    settings, history = problem.settings, []
    previous, repaired, filled = None, 0, False
    for n_iter in range(settings.max_iter + 1):
        partition = problem.assign(centroids)
        history.append(partition.objective)
        fall = history[-2] - history[-1] if n_iter else math.inf
        sizes = problem.sizes(partition.labels)
        if n_iter == settings.max_iter:
            reason = "max_iter"
            break
        # Empty clusters are filled for as long as that helps: points that rounding makes equal
        # would go back again and again.
        fill = bool((sizes == 0).any()) and not (filled and fall <= 0)
        if not fill and _same_on_all(problem.shards, partition.labels, previous):
            reason = "labels"
            break
        if not fill and n_iter and fall <= settings.tol * history[-2]:
            reason = "tolerance"
            break
        if fill:
            centroids, given = problem.repair(partition, sizes, centroids)
            repaired += given
        filled = fill
        centroids = problem.move(partition.labels, centroids)
        previous = partition.labels
    if repaired:
        logging.getLogger(__name__).info("k-means: %d times an empty cluster got a point", repaired)
    how = {"n_iter": n_iter, "stop_reason": reason, "history": tuple(history)}
    return problem.result(centroids, partition, repaired=repaired, **how)
