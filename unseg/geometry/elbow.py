"""How many clusters: the elbow of the objective over a grid of K.

Legend: N points, D dimensions, K clusters, W mean objective of a point.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unseg.geometry.kmeans import KMeansResult, hyperbolic_kmeans
from unseg.geometry.seeding import draw_sample
from unseg.geometry.sharded_rows import ShardedRows


@dataclass(frozen=True)
class ElbowTable:
    """W at each K. The knee depends on the grid's ends and on how K is counted: read the table.

    Attributes:
        ks: ascending.
        objective: W, as k-means found it; it may rise, since k-means finds local minima.
        monotone: W, but never above that of a smaller K.
        knee_linear: the K whose (K, monotone W), both scaled to [0, 1], lies farthest below the
            chord between the ends; the smallest of several.
        knee_log: likewise with log K.
        points: how many points were clustered.
    """

    ks: tuple[int, ...]
    objective: tuple[float, ...]
    monotone: tuple[float, ...]
    knee_linear: int
    knee_log: int
    points: int

    def __str__(self) -> str:
        lines = [f"{'K':>8} {'W':>14} {'monotone':>14}"]
        for k, found, monotone in zip(self.ks, self.objective, self.monotone):
            lines.append(f"{k:8d} {found:14.6g} {monotone:14.6g}")
        lines.append(f"knee: {self.knee_linear} over K, {self.knee_log} over log K")
        return "\n".join(lines)


def elbow_grid(low: int = 200, high: int = 3000, count: int = 10) -> tuple[int, ...]:
    """At most `count` whole numbers from low to high in nearly equal ratios."""
    if not 1 <= low < high or count < 3:
        raise ValueError(f"1 <= low < high and count >= 3 are needed: {low}, {high}, {count}")
    ratio = math.log(high / low) / (count - 1)
    return tuple(sorted({round(low * math.exp(ratio * i)) for i in range(count)}))


def _knee(places: Sequence[float], values: Sequence[float]) -> int:
    """Index of the greatest distance below the chord (Satopää et al., "Finding a 'Kneedle' in a
    Haystack", 2011, for falling curves); 0 for a flat one."""
    width, height = places[-1] - places[0], values[0] - values[-1]
    if height <= 0:
        return 0
    below = [
        1 - (place - places[0]) / width - (value - values[-1]) / height
        for place, value in zip(places, values)
    ]
    return below.index(max(below))


def elbow(
    x: Tensor,
    ks: Sequence[int],
    *,
    seed: int = 0,
    max_points: int = 100_000,
    cluster: Callable[..., KMeansResult] = hyperbolic_kmeans,
    **options: object,
) -> ElbowTable:
    """Cluster the same points with each K; see ElbowTable.

    Args:
        x: (N, D).
        ks: at least three different numbers of clusters, in any order.
        seed: of the sample and of each clustering.
        max_points: of more points a uniform sample of so many is clustered.
        cluster: called as cluster(points, k, seed=seed, **options); euclidean_kmeans also fits.
        options: centroid, max_iter, ... .

    Raises:
        ValueError: fewer than three different ks, max_points below the greatest, and what
            `cluster` raises (a K above the number of different points).
    """
    ks = sorted({int(k) for k in ks})
    if len(ks) < 3 or ks[0] < 1:
        raise ValueError(f"ks: three different numbers above 0 are needed, got {ks}")
    if max_points < ks[-1]:
        raise ValueError(f"max_points = {max_points} is below the greatest of ks, {ks[-1]}")
    if x.dim() == 2:  # else `cluster` says what is wrong
        generator = torch.Generator().manual_seed(seed)
        x = draw_sample(ShardedRows(x), max_points, generator)
    # The greatest first: it is the one that fails if there are too few points.
    results = {k: cluster(x, k, seed=seed, **options) for k in reversed(ks)}
    found = [results[k].objective / len(x) for k in ks]
    monotone = [min(found[: i + 1]) for i in range(len(found))]
    linear = _knee(ks, monotone)
    logarithmic = _knee([math.log(k) for k in ks], monotone)
    return ElbowTable(tuple(ks), tuple(found), tuple(monotone), ks[linear], ks[logarithmic], len(x))
