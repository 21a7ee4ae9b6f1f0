"""Centroids of clusters of points that lie in chunks, perhaps of several processes.

lorentz: the midpoint; frechet: the minimum of the squared distances. Midpoints: Ungar, "Analytic
Hyperbolic Geometry", 2005; Law, Liao, Snell, Zemel, "Lorentzian Distance Learning for Hyperbolic
Representations", ICML 2019 (the same point on the hyperboloid). Fréchet means: Karcher's iteration,
with a step length of our own. No more than a chunk is copied.

Legend: N points, n of a chunk, D dimensions, K clusters, s square root of c, m a centroid.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from unseg.geometry.basics import rim_gap
from unseg.geometry.sharded_rows import ShardedRows

CENTROIDS = ("lorentz", "frechet")
# Sums of squared distances that are this much larger did not rise: it is rounding.
_ROUNDING = 1e-13


def point_costs(distances: Tensor, c: float, centroid: str) -> Tensor:
    """What each point adds to the objective that the kind of centroid minimises.

    Args:
        distances: (N,) float64, to the own centroid.
        centroid: "lorentz": cosh(s d) - 1; "frechet": d^2.

    Returns:
        (N,) float64.
    """
    if centroid == "frechet":
        return distances.square()
    return 2 * torch.sinh(c**0.5 / 2 * distances).square()  # no cancellation for small d


def cluster_sums(values: Tensor, labels: Tensor, k: int) -> Tensor:
    """(K, columns): sums of the rows of each cluster, always in the same order.

    Args:
        values: (n, columns) float64.
        labels: (n,) int64, below k.
    """
    if values.device.type == "cpu":
        return values.new_zeros(k, values.shape[1]).index_add_(0, labels, values)
    # Elsewhere index_add_ adds in any order.
    order = torch.argsort(labels, stable=True)
    lengths = torch.bincount(labels, minlength=k)
    return torch.segment_reduce(values[order], "sum", lengths=lengths)


def lorentz_parts(x: Tensor, gaps: Tensor) -> Tensor:
    """(n, D + 2): what is summed for midpoints: lambda x, lambda - 1, and 1; lambda = 2 / gap."""
    factor = 2 / gaps
    times = torch.stack([factor - 1, torch.ones_like(factor)], dim=1)
    return torch.cat([factor[:, None] * x, times], dim=1)


def midpoints_of_sums(sums: Tensor, c: float, previous: Tensor) -> Tensor:
    """Midpoints (K, D) from the sums (K, D + 2) of lorentz_parts; `previous` (K, D) where nothing
    was summed.

    Spec long_tail.md 3.1: z / (1 + sqrt(1 - c |z|^2)), z the quotient of the first two sums, with
    both multiplied by the second: the root is then the length of a sum of vectors that are longer
    together than each alone. Where it cancels, near the rim, their number is its lower bound.
    """
    vectors, times, counts = sums[:, :-2], sums[:, -2:-1], sums[:, -1:]
    squares = times.square() - c * vectors.square().sum(1, keepdim=True)
    root = torch.maximum(squares, counts.square()).sqrt()
    filled = counts > 0
    return torch.where(filled, vectors / torch.where(filled, times + root, 1.0), previous)


class Members(NamedTuple):
    """Points in clusters; of this rank's own ones but for the first.

    Attributes:
        shards: the points, float32 or float64.
        gaps: (n,) float64, their rim_gap.
        labels: (n,) int64.
        weights: (n,) float64, none negative; None: all 1.
    """

    shards: ShardedRows
    gaps: Tensor
    labels: Tensor
    weights: Tensor | None = None

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Points, gaps, labels and weights of each chunk."""
        points, chunks = self.shards.chunks(), self.shards.chunks
        weights = (None,) * len(points) if self.weights is None else chunks(self.weights)
        return zip(points, chunks(self.gaps), chunks(self.labels), weights)


def _weighted(parts: Tensor, weights: Tensor | None) -> Tensor:
    return parts if weights is None else parts * weights[:, None]


def lorentz_step(members: Members, c: float, previous: Tensor) -> Tensor:
    """Midpoints (K, D) of the clusters; `previous` (K, D) float64 for those without points."""
    k, dim = previous.shape
    parts = (
        cluster_sums(_weighted(lorentz_parts(x, gap), weight), label, k)
        for x, gap, label, weight in members.chunks()
    )
    sums = members.shards.add_up(parts, previous.new_zeros(k, dim + 2))
    return midpoints_of_sums(sums, c, previous)


class _Slopes(NamedTuple):
    """Of all clusters: sum of squared distances (K,), mean of log_m(x) (K, D), mean of
    s d coth(s d) (K,)."""

    cost: Tensor
    direction: Tensor
    stiffness: Tensor


def _slope_parts(x: Tensor, gaps: Tensor, m: Tensor, c: float) -> Tensor:
    """(n, D + 4) for points x (n, D) and their centroids m (n, D): what _slopes sums.

    With delta = x - m, log_m(x) = (1 - c|m|^2) h [(1 - c|m|^2) delta - c |delta|^2 m] / q, where
    q = (1 - c|m|^2)(1 - c|x|^2) + c |delta|^2, t = sqrt(c rho), h = arsinh(t) sqrt(1 + t^2) / t:
    Moebius addition of -m and x, written so that nothing cancels when x is near m.
    """
    delta = x.double() - m
    square = c * delta.square().sum(1)
    product = gaps * rim_gap(m, c)
    t = (square / product).sqrt()
    half = torch.asinh(t)  # s d / 2
    tiny = t < 1e-5  # there both quotients are 1 + O(t^2)
    safe = torch.where(tiny, 1.0, t)
    weight = torch.where(tiny, 1.0, half * (1 + t * t).sqrt() / safe) / (product + square)
    angle = 2 * torch.where(tiny, 1.0, half)
    parts = delta.new_empty(len(x), x.shape[1] + 4)
    torch.mul(delta, weight[:, None], out=parts[:, :-4])
    parts[:, -4] = weight * square
    parts[:, -3] = 4 / c * half.square()
    parts[:, -2] = torch.where(tiny, 1.0, angle / torch.tanh(angle))
    parts[:, -1] = 1
    return parts


def _slopes(members: Members, c: float, m: Tensor, active: Tensor) -> _Slopes:
    """At the centroids m (K, D); only points of `active` clusters (K,) bool are looked at."""
    k, dim = m.shape

    def part(x: Tensor, gap: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
        wanted = active[label]
        if not wanted.all():
            x, gap, label = x[wanted], gap[wanted], label[wanted]
            weight = None if weight is None else weight[wanted]
        return cluster_sums(_weighted(_slope_parts(x, gap, m[label], c), weight), label, k)

    parts = (part(*chunk) for chunk in members.chunks())
    sums = members.shards.add_up(parts, m.new_zeros(k, dim + 4))
    count = torch.where(sums[:, -1:] > 0, sums[:, -1:], 1.0)
    gap = rim_gap(m, c)[:, None]
    direction = gap * (gap * sums[:, :-4] - sums[:, -4, None] * m) / count
    stiffness = (sums[:, -2] / count[:, 0]).clamp(min=1)
    return _Slopes(sums[:, -3], direction, stiffness)


def _exp(m: Tensor, v: Tensor, c: float) -> Tensor:
    """exp_m(v) (K, D), without a projection away from the rim."""
    length = c**0.5 * v.norm(dim=1, keepdim=True)
    gap = rim_gap(m, c)[:, None]
    y = torch.tanh(length / gap) * v / torch.where(length > 0, length, 1.0)
    inner = 1 + 2 * c * (m * y).sum(1, keepdim=True)
    square = c * y.square().sum(1, keepdim=True)
    return ((inner + square) * m + gap * y) / (inner + (1 - gap) * square)


def _chosen(better: Tensor, new: _Slopes, old: _Slopes) -> _Slopes:
    """Of each cluster (K,) the new ones where they are better."""
    return _Slopes(
        torch.where(better, new.cost, old.cost),
        torch.where(better[:, None], new.direction, old.direction),
        torch.where(better, new.stiffness, old.stiffness),
    )


def frechet_step(
    members: Members, c: float, previous: Tensor, *, max_steps: int = 20, tol: float = 1e-8
) -> Tensor:
    """Fréchet means (K, D) of all clusters at once; those without points keep `previous`. No
    cluster's sum of squared distances is above that at `previous`, but for rounding.

    Each starts at `previous` or its midpoint, where the sum is lower. Steps go along the mean of
    log_m(x), of length 1 / mean(s d coth(s d)): a length of 1 swings without end for points as far
    out as 3 (spec long_tail.md 3.1). They are halved where the sum would rise, until the next would
    be shorter than tol, or max_steps.

    Args:
        members, previous: as for lorentz_step.
        max_steps: after the start.
        tol: a hyperbolic length.
    """
    m = previous
    active = torch.ones(len(m), dtype=torch.bool, device=m.device)
    now = _slopes(members, c, m, active)
    tried = lorentz_step(members, c, previous)
    scale = torch.ones_like(now.cost)
    for _ in range(max_steps + 1):
        then = _slopes(members, c, tried, active)
        # Not so for NaN: a point that rounding put onto the rim.
        better = active & (then.cost <= now.cost * (1 + _ROUNDING))
        m = torch.where(better[:, None], tried, m)
        now = _chosen(better, then, now)
        scale = torch.where(better, 1.0, torch.where(active, scale / 2, scale))
        step = (scale / now.stiffness)[:, None] * now.direction
        active = 2 / rim_gap(m, c) * step.norm(dim=1) > tol
        if not active.any():
            break
        tried = torch.where(active[:, None], _exp(m, step, c), m)
    return m
