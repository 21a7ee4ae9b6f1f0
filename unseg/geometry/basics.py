"""What the other files of the geometry share: geoopt's functions, checks, two formulas.

Conventions are geoopt's: curvature -c with c > 0, the ball is |x| < 1 / s.

Legend: N points, D dimensions, s square root of c.
"""

import math
import warnings

import torch
from torch import Tensor

with warnings.catch_warnings():
    # geoopt scripts all its functions on import; torch 2.14 warns about each of them.
    warnings.simplefilter("ignore", FutureWarning)
    from geoopt.manifolds.stereographic import math as geoopt_math

__all__ = [
    "check_curvature",
    "check_points",
    "direct_dist",
    "geoopt_math",
    "project",
    "rim_gap",
    "signed_curvature",
]


def check_curvature(c: float) -> float:
    """c, or ValueError if it is no finite number above 0."""
    if not 0 < c < math.inf:
        raise ValueError(f"c must be a finite number above 0 (the curvature is -c), got {c}")
    return float(c)


def check_points(name: str, x: Tensor, c: float, dim: int | None = None) -> Tensor:
    """Raise unless x is float32 or float64 (N, D) of points inside the ball.

    Args:
        name: the argument's, for the message.
        dim: D, where another argument fixes it.

    Returns:
        |x|^2, (N,) float64.

    Raises:
        TypeError: another dtype.
        ValueError: another shape, NaN/inf, or points on the ball's rim or outside.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] == 0 or (dim is not None and x.shape[1] != dim):
        wanted = "(N, D)" if dim is None else f"(N, {dim})"
        raise ValueError(f"{name}: shape {wanted} is needed, got {tuple(x.shape)}")
    square = x.double().square().sum(1)
    inside = 1 - c * square > 0  # not so for NaN either
    if inside.all():
        return square
    row = int(inside.logical_not().nonzero()[0])
    if not torch.isfinite(x[row]).all():
        raise ValueError(f"{name}[{row}] is NaN/inf")
    norm = float(torch.linalg.vector_norm(x[row].double()))
    raise ValueError(
        f"{name}[{row}] is outside the ball: its norm is {norm:.9g}, "
        f"the radius {1 / math.sqrt(c):.9g} (c = {c:g})"
    )


def signed_curvature(c: float, like: Tensor) -> Tensor:
    """-c as geoopt's functions want it. A float64 scalar leaves the dtype of tensors as it is;
    geoopt's own manifolds round c to float32 (0.3 becomes 0.30000001)."""
    return torch.tensor(-c, dtype=torch.float64, device=like.device)


def project(x: Tensor, c: float) -> Tensor:
    """x (..., D), drawn into geoopt's radius: 0.996 / s in float32, 0.99999 / s in float64."""
    return geoopt_math.project(x, k=signed_curvature(c, x))


def rim_gap(x: Tensor, c: float) -> Tensor:
    """1 - c|x|^2 in float64, (...) of points (..., D): the ball's metric is (2 / gap)^2."""
    return 1 - c * x.double().square().sum(-1)


def direct_dist(x: Tensor, y: Tensor, c: float) -> Tensor:
    """Distances (...) in float64 of points (..., D), without any cancellation.

    The gradient at equal points is 0; points on the rim or outside are infinitely far away.
    """
    length = torch.linalg.vector_norm(x.double() - y.double(), dim=-1)
    return dist_of_length(length, rim_gap(x, c), rim_gap(y, c), c)


def dist_of_length(length: Tensor, gap_x: Tensor, gap_y: Tensor, c: float) -> Tensor:
    """Distances (...) of points with Euclidean distances `length` and these rim_gaps, (...):
    d = 2/s arsinh(s |x - y| / sqrt((1 - c|x|^2)(1 - c|y|^2)))."""
    s = math.sqrt(c)
    return 2 / s * torch.asinh(s * length / _root_of_gaps(gap_x, gap_y))


def _root_of_gaps(gap_x: Tensor, gap_y: Tensor) -> Tensor:
    return (gap_x.clamp(min=0) * gap_y.clamp(min=0)).sqrt()
