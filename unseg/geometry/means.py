"""Centroids of many clusters of the Poincaré ball at once.

Formulas: Ungar, "Analytic Hyperbolic Geometry", 2005 (midpoints); Law, Liao, Snell, Zemel,
"Lorentzian Distance Learning for Hyperbolic Representations", ICML 2019 (the same point on the
hyperboloid); Karcher's iteration for the Fréchet mean, with our step length.

Legend: N points, n of a chunk, D dimensions, K clusters, s square root of c, m a centroid.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from unseg.geometry.basics import (
    check_curvature,
    check_points,
    geoopt_math,
    rim_gap,
    signed_curvature,
)

# Rows whose terms are in memory together.
_CHUNK_ROWS = 1 << 14
# Sums of squared distances that differ by this share are equal but for rounding.
_ROUNDING = 1e-13


def lorentz_centroids(
    x: Tensor,
    labels: Tensor,
    k: int,
    c: float,
    weights: Tensor | None = None,
    previous: Tensor | None = None,
) -> Tensor:
    """Midpoint of each cluster: it minimises the sum of w (cosh(s d) - 1).

    With the conformal factors l = 2 / (1 - c|x|^2): z = sum(w l x) / sum(w (l - 1)), and the
    midpoint is z / (1 + sqrt(1 - c|z|^2)) (Einstein's, the gyromidpoint and the normalised mean on
    the hyperboloid are this same point).

    Args:
        x: (N, D) float32 or float64, points of the ball.
        labels: (N,) int64 of 0 ... k - 1.
        k: K.
        weights: (N,), none negative; None: all 1.
        previous: (K, D): what clusters without weight get; None: NaN.

    Returns:
        (K, D) float64.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, label or weight is not as above, or a point is NaN or not in the ball.
    """
    weights = _check_clusters(x, labels, k, c, weights)
    sums = x.new_zeros(k, x.shape[1] + 2, dtype=torch.float64)
    for rows in _chunks(len(x)):
        factor = 2 / rim_gap(x[rows], c)
        times = torch.stack([factor - 1, torch.ones_like(factor)], dim=1)
        terms = torch.cat([factor[:, None] * x[rows].double(), times], dim=1)
        sums = sums.index_add(0, labels[rows], weights[rows, None] * terms)
    space, time, weight = sums[:, :-2], sums[:, -2:-1], sums[:, -1:]
    # The length of the sum on the hyperboloid. Near the rim the difference cancels; the sum is at
    # least as long as its terms together.
    length = (time.square() - c * space.square().sum(1, keepdim=True)).clamp(min=0).sqrt()
    filled = weight > 0
    middle = space / torch.where(filled, time + torch.maximum(length, weight), 1.0)
    return torch.where(filled, middle, _rows_or_nan("previous", previous, middle))


@torch.no_grad()
def frechet_centroids(
    x: Tensor,
    labels: Tensor,
    k: int,
    c: float,
    weights: Tensor | None = None,
    start: Tensor | None = None,
    max_steps: int = 20,
    tol: float = 1e-9,
) -> Tensor:
    """Fréchet mean of each cluster: it minimises the sum of w d^2. All clusters step together.

    A step is exp_m(eta mean(log_m(x))) with eta = 1 / mean(s d coth(s d)); eta = 1 swings without
    end for points as far out as 3 (spec long_tail.md 3.1). Since
    d(x, exp_m(v))^2 <= d^2 - 2 <v, log_m(x)> + s d coth(s d) |v|^2 (Zhang, Sra, "First-order
    Methods for Geodesically Convex Optimization", COLT 2016, lemma 5), this eta is the best for
    the bound, and no sum rises but by rounding: a cluster for which it does stays and is done.

    Args:
        x, labels, k, weights: as :func:`lorentz_centroids`.
        start: (K, D) where to start, which clusters without weight keep; None: the midpoints, and
            NaN for those.
        max_steps: at most so many steps.
        tol: a cluster whose next step is not longer (hyperbolic length times s) is done.

    Returns:
        (K, D) float64.

    Raises:
        as :func:`lorentz_centroids`; ValueError: start is not inside the ball for a cluster that
        has points.
    """
    weights = _check_clusters(x, labels, k, c, weights)
    if start is None:
        m = lorentz_centroids(x, labels, k, c, weights)
    else:
        m = _rows_or_nan("start", start, x.new_zeros(k, x.shape[1], dtype=torch.float64)).clone()
        filled = torch.zeros_like(m[:, :1]).index_fill_(0, labels[weights > 0], 1) > 0
        check_points("start", torch.where(filled, m, 0.0), c)
    now = _slopes(x, labels, weights, m, c)
    moving = torch.ones_like(now.cost, dtype=torch.bool)
    for _ in range(max_steps):
        moving &= now.step.norm(dim=1) > tol  # not so for NaN: clusters without points
        if not moving.any():
            break
        tried = torch.where(moving[:, None], _walk(m, now.step, c), m)
        then = _slopes(x, labels, weights, tried, c)
        moving &= then.cost <= now.cost * (1 + _ROUNDING)
        m, now = torch.where(moving[:, None], tried, m), then
    return m


class _Slopes(NamedTuple):
    """Of all clusters: sums of w (s d)^2 (K,), and next steps (K, D), as s times vectors of
    hyperbolic length."""

    cost: Tensor
    step: Tensor


def _slopes(x: Tensor, labels: Tensor, weights: Tensor, m: Tensor, c: float) -> _Slopes:
    """Cost and step at centroids m (K, D)."""
    k, dim = m.shape
    sums = m.new_zeros(k, dim + 3)
    for rows in _chunks(len(x)):
        angle, direction = _polar(x[rows].double(), m[labels[rows]], c)
        safe = torch.where(angle < 1e-5, 1.0, angle)
        stiffness = torch.where(angle < 1e-5, 1.0, safe / torch.tanh(safe))
        scalars = torch.stack([angle.square(), stiffness, torch.ones_like(angle)], dim=1)
        terms = torch.cat([angle[:, None] * direction, scalars], dim=1)
        sums.index_add_(0, labels[rows], weights[rows, None] * terms)
    # The mean of log, over the mean of s d coth(s d); without weight 0 / 0.
    return _Slopes(sums[:, -3], sums[:, :-3] / sums[:, -2:-1])


def _polar(x: Tensor, m: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """Where x (n, D) lies, seen from m (n, D): s d (n,), and the direction (n, D) of length 1.

    The direction is that of (-m) (+) x, which, with e = x - m, is
    [(1 - c|m|^2) e - c|e|^2 m] / [(1 - c|m|^2)(1 - c|x|^2) + c|e|^2]: nothing cancels.
    """
    difference = x - m
    gap_m, gap_x = rim_gap(m, c), rim_gap(x, c)
    square = c * difference.square().sum(1)
    angle = 2 * torch.asinh((square / (gap_m * gap_x)).sqrt())
    toward = gap_m[:, None] * difference - square[:, None] * m
    return angle, toward / toward.norm(dim=1, keepdim=True).clamp(min=1e-300)


def _walk(m: Tensor, step: Tensor, c: float) -> Tensor:
    """exp_m (K, D) of a step, given as s times a vector of hyperbolic length."""
    length = step.norm(dim=1, keepdim=True)
    along = torch.tanh(length / 2) / math.sqrt(c) * step / length.clamp(min=1e-300)
    return geoopt_math.mobius_add(m, along, k=signed_curvature(c, m))


def _chunks(n: int) -> list[slice]:
    return [slice(start, start + _CHUNK_ROWS) for start in range(0, n, _CHUNK_ROWS)]


def _rows_or_nan(name: str, given: Tensor | None, like: Tensor) -> Tensor:
    """`given` in float64, which must have the shape of `like`, or NaN of that shape."""
    if given is None:
        return torch.full_like(like, math.nan)
    if given.shape != like.shape:
        raise ValueError(f"{name}: shape {tuple(like.shape)} is needed, got {tuple(given.shape)}")
    return given.to(like)


def _check_clusters(x: Tensor, labels: Tensor, k: int, c: float, weights: Tensor | None) -> Tensor:
    """The weights (N,) in float64, after raising for arguments that do not fit."""
    check_points("x", x, check_curvature(c))
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != x.shape[:1]:
        raise ValueError(f"labels: shape ({len(x)},) is needed, got {tuple(labels.shape)}")
    if k < 1 or (labels < 0).any() or (labels >= k).any():
        raise ValueError(f"labels must be 0 ... k - 1 with k >= 1, k = {k}")
    if weights is None:
        return x.new_ones(len(x), dtype=torch.float64)
    if weights.shape != labels.shape:
        raise ValueError(f"weights: shape ({len(x)},) is needed, got {tuple(weights.shape)}")
    if not ((weights >= 0) & torch.isfinite(weights)).all():
        raise ValueError("weights must be finite and not negative")
    return weights.double()
