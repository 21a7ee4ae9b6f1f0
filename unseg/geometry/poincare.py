"""The Poincaré ball on top of geoopt, and distances straight from tangent vectors.

Formulas: Ganea, Bécigneul, Hofmann, "Hyperbolic Neural Networks", NeurIPS 2018, section 2; Ungar,
"Analytic Hyperbolic Geometry", 2005. Conventions are geoopt's: curvature -c with c > 0, and points
with |x| < 1 / s.

Legend: N, M points, D dimensions, s square root of c.
"""

import math

import torch
from torch import Tensor

from unseg.geometry.basics import (
    check_curvature,
    direct_dist,
    geoopt_math,
    project,
    rim_gap,
    signed_curvature,
)
from unseg.geometry.means import frechet_centroids, lorentz_centroids

# Below this sinh(y) / y is a series: the quotient's derivative cancels near 0.
_SMALL_ANGLE = 1e-2


class PoincareBall:
    """The ball of curvature -c; not a module, so that it adds nothing to parameters or state_dict.

    Methods take float tensors and return their dtype, but float32 at least. Distances and means
    are computed in float64 in any case. Only float64 resolves points near the rim: a float32
    point's distance from the origin is off by 1e-4 at 6 and cannot exceed 6.21 after expmap0.

    Attributes:
        c: above 0.
        radius: 1 / s.

    Raises:
        ValueError: c is no finite number above 0.
    """

    def __init__(self, c: float = 1.0):
        self.c = check_curvature(c)

    def __repr__(self) -> str:
        return f"PoincareBall(c={self.c:g})"

    @property
    def radius(self) -> float:
        return 1 / math.sqrt(self.c)

    def expmap0(self, u: Tensor) -> Tensor:
        """tanh(s|u|) u / (s|u|), (..., D) of tangent vectors (..., D) at the origin.

        Points nearer the rim than geoopt's radius are drawn in to it: from |u| of 3.1 / s in
        float32 and of 6.1 / s in float64 on, distances from the origin grow no more.
        """
        u = _at_least_float32(u)
        return project(geoopt_math.expmap0(u, k=signed_curvature(self.c, u)), self.c)

    def logmap0(self, x: Tensor) -> Tensor:
        """The inverse of expmap0: artanh(s|x|) x / (s|x|), (..., D)."""
        x = _at_least_float32(x)
        # geoopt's artanh has no digits left for small numbers: 0 below 6e-8 in float32.
        norm = math.sqrt(self.c) * torch.linalg.vector_norm(x.double(), dim=-1, keepdim=True)
        norm = norm.clamp(1e-30, 1 - 2**-53)
        return (torch.atanh(norm) / norm * x).to(x.dtype)

    def mobius_add(self, x: Tensor, y: Tensor) -> Tensor:
        """x (+) y, (..., D) of points (..., D) that broadcast; drawn in as by expmap0."""
        dtype = torch.promote_types(_at_least_float32(x).dtype, _at_least_float32(y).dtype)
        x, y = x.to(dtype), y.to(dtype)
        return project(geoopt_math.mobius_add(x, y, k=signed_curvature(self.c, x)), self.c)

    def dist(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (...) of points (..., D) that broadcast. The gradient at equal points is 0;
        points on the rim or outside are infinitely far away."""
        return direct_dist(x, y, self.c).to(_common_dtype(x, y))

    def dist0(self, x: Tensor) -> Tensor:
        """Distances (...) of points (..., D) from the origin; the gradient there is 0."""
        s = math.sqrt(self.c)
        norm = (s * torch.linalg.vector_norm(x.double(), dim=-1)).clamp(max=1)
        return (2 / s * torch.atanh(norm)).to(_common_dtype(x, x))

    def pairwise_dist(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (N, M) of points (N, D) from points (M, D), from differences: exact for near
        points, and of N M D operations. For the nearest of many see `nearest_centroids`."""
        s = math.sqrt(self.c)
        gaps = rim_gap(x, self.c).clamp(min=0)[:, None] * rim_gap(y, self.c).clamp(min=0)
        lengths = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")
        return (2 / s * torch.asinh(s * lengths / gaps.sqrt())).to(_common_dtype(x, y))

    def frechet_mean(
        self,
        x: Tensor,
        weights: Tensor | None = None,
        *,
        max_steps: int = 20,
        tol: float = 1e-9,
    ) -> Tensor:
        """The point (D,) with the least sum of (weighted) squared distances from points (N, D).

        Args and errors: as :func:`~unseg.geometry.frechet_centroids`. It has no gradient.
        """
        labels = _one_cluster(x, weights)
        mean = frechet_centroids(x, labels, 1, self.c, weights, max_steps=max_steps, tol=tol)
        return mean[0].to(x.dtype)

    def midpoint(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """The point (D,) with the least sum of (weighted) cosh(s d) from points (N, D), in closed
        form: at once Einstein's midpoint, the gyromidpoint and the mean on the hyperboloid.

        Args and errors: as :func:`~unseg.geometry.lorentz_centroids`.
        """
        labels = _one_cluster(x, weights)
        return lorentz_centroids(x, labels, 1, self.c, weights)[0].to(x.dtype)


def clip_tangent(u: Tensor, max_norm: float, c: float = 1.0) -> Tensor:
    """Tangent vectors (..., D) shortened to s|u| <= max_norm; their directions stay.

    The part of the gradient across u stays too, so what was clipped is not dead. float32 at least.

    Raises:
        ValueError: max_norm or c is not above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}")
    limit = max_norm / math.sqrt(check_curvature(c))
    u = _at_least_float32(u)
    # In float64 the squares of large float32 numbers are finite.
    norm = torch.linalg.vector_norm(u.double(), dim=-1, keepdim=True)
    return (torch.where(norm > limit, limit / norm.clamp(min=limit), 1.0) * u).to(u.dtype)


def tangent_dist(u: Tensor, v: Tensor, c: float = 1.0) -> Tensor:
    """Distances (...), float64, of expmap0(u) and expmap0(v) for tangents (..., D) at the origin.

    The law of cosines in half angles, with a = s|u|, b = s|v| and w = u - v,

        sinh^2(s d / 2) = sinh^2(a - b) + sinh(2a)/2a sinh(2b)/2b c [|w|^2 - (|u| - |v|)^2],

    adds what is never negative, so near points keep their digits: the relative error is about
    1e-16 (sinh(2a)/2a)^2, 1e-13 for a = 2.5. No point is projected. Gradients are finite
    everywhere, 0 at equal points (spec long_tail.md 3.4; no epsilon is added under the root).
    """
    check_curvature(c)
    u, v = u.double(), v.double()
    s, difference = math.sqrt(c), u - v
    norm_u, norm_v = torch.linalg.vector_norm(u, dim=-1), torch.linalg.vector_norm(v, dim=-1)
    # |u| - |v| would lose the digits of near points.
    radial = (difference * (u + v)).sum(-1) / (norm_u + norm_v).clamp(min=1e-150)
    # Rounding may make this negative; clamped, it would have no gradient at u = 0.
    across = difference.square().sum(-1) - radial.square()
    stretch = _sinh_quotient(2 * s * norm_u) * _sinh_quotient(2 * s * norm_v)
    squared = torch.sinh(s * radial).square() + stretch * c * across
    apart = squared > 0
    return 2 / s * torch.asinh(torch.where(apart, squared, 1.0).sqrt()) * apart


def tangent_dist0(u: Tensor, c: float = 1.0) -> Tensor:
    """Distances (...), float64, of expmap0(u) from the origin: 2|u|, whatever c is.

    The gradient at u = 0 is 0.
    """
    check_curvature(c)
    return 2 * torch.linalg.vector_norm(u.double(), dim=-1)


def _sinh_quotient(y: Tensor) -> Tensor:
    """sinh(y) / y of y >= 0, 1 at 0, with the right gradient."""
    small = y < _SMALL_ANGLE
    square = torch.where(small, y, 0.0).square()
    large = torch.where(small, 1.0, y)
    return torch.where(small, 1 + square / 6 * (1 + square / 20), torch.sinh(large) / large)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _common_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)


def _one_cluster(x: Tensor, weights: Tensor | None) -> Tensor:
    """Labels (N,) of one cluster of all points; ValueError where nothing has a mean."""
    if len(x) == 0 or (weights is not None and not (weights > 0).any()):
        raise ValueError("x has no points of positive weight: they have no mean")
    return torch.zeros(len(x), dtype=torch.int64, device=x.device)
