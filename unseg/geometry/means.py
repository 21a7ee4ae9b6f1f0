"""Centroids of many clusters of the Poincaré ball at once, of points in one place.

Legend: N points, D dimensions, K clusters, s square root of c.
"""

import math

import torch
from torch import Tensor

from unseg.geometry.basics import check_curvature, check_points, rim_gap
from unseg.geometry.centroid_steps import Members, frechet_step, lorentz_step
from unseg.geometry.sharded_rows import ShardedRows


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
    previous = _rows_or_nan("previous", previous, k, x)
    return lorentz_step(Members(ShardedRows(x), rim_gap(x, c), labels, weights), c, previous)


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

    See :func:`unseg.geometry.centroid_steps.frechet_step`.

    Args:
        x, labels, k, weights: as :func:`lorentz_centroids`.
        start: (K, D) where to start, which clusters without weight keep; None: NaN for those. All
            others start at the midpoint if their sum is lower there.
        max_steps: at most so many steps.
        tol: a cluster whose next step is not longer (hyperbolic length) is done.

    Returns:
        (K, D) float64.

    Raises:
        as :func:`lorentz_centroids`; ValueError: start is not inside the ball for a cluster that
        has points.
    """
    weights = _check_clusters(x, labels, k, c, weights)
    members = Members(ShardedRows(x), rim_gap(x, c), labels, weights)
    m = _rows_or_nan("start", start, k, x)
    if start is None:
        m = lorentz_step(members, c, m)
    else:
        filled = torch.zeros_like(m[:, :1]).index_fill_(0, labels[weights > 0], 1) > 0
        check_points("start", torch.where(filled, m, 0.0), c)
    return frechet_step(members, c, m, max_steps=max_steps, tol=tol)


def _rows_or_nan(name: str, given: Tensor | None, k: int, x: Tensor) -> Tensor:
    """`given` in float64, which must be (k, D) as points x (N, D) are, or NaN of that shape."""
    if given is None:
        return x.new_full((k, x.shape[1]), math.nan, dtype=torch.float64)
    if given.shape != (k, x.shape[1]):
        raise ValueError(f"{name}: shape ({k}, {x.shape[1]}) is needed, got {tuple(given.shape)}")
    return given.to(x.device, torch.float64)


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
