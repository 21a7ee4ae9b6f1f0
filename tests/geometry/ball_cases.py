"""Points of the ball, and slow distances of many digits, that several test files share."""

import math

import mpmath
import torch
from torch import Tensor

CURVATURES = (0.3, 1.0, 2.0)


def random_tangents(n: int, dim: int, mean_d0: float, seed: int = 0) -> Tensor:
    """(n, dim) float64: directions of a cone, lengths of `mean_d0` / 2 on average."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    u[:, 0] += 0.5
    length = 0.3 + 1.4 * torch.rand(n, 1, generator=generator, dtype=torch.float64)
    return u / u.norm(dim=1, keepdim=True) * length * mean_d0 / 2


def random_points(n: int, dim: int, c: float, mean_d0: float = 2.0, seed: int = 0) -> Tensor:
    """(n, dim) float64 points; distances from the origin are `mean_d0` on average."""
    u = random_tangents(n, dim, mean_d0, seed)
    norm = u.norm(dim=1, keepdim=True)
    return torch.tanh(math.sqrt(c) * norm) / math.sqrt(c) * u / norm


def exact_exp(u: list[float], c: float) -> list[mpmath.mpf]:
    """expmap0 of one tangent vector."""
    root = mpmath.sqrt(c)
    norm = mpmath.sqrt(sum(mpmath.mpf(a) ** 2 for a in u))
    factor = mpmath.tanh(root * norm) / (root * norm) if norm else mpmath.mpf(1)
    return [factor * mpmath.mpf(a) for a in u]


def exact_dist(x: list, y: list, c: float) -> float:
    """arcosh(1 + 2 c |x - y|^2 / ((1 - c|x|^2)(1 - c|y|^2))) / s with 80 digits, which
    distances of 1e-30 and more need."""
    with mpmath.workdps(80):
        c = mpmath.mpf(c)
        square = sum((mpmath.mpf(a) - mpmath.mpf(b)) ** 2 for a, b in zip(x, y))
        gaps = [1 - c * sum(mpmath.mpf(a) ** 2 for a in point) for point in (x, y)]
        cosh = 1 + 2 * c * square / (gaps[0] * gaps[1])
        return float(mpmath.acosh(cosh) / mpmath.sqrt(c))


def exact_tangent_dist(u: list[float], v: list[float], c: float) -> float:
    with mpmath.workdps(80):
        return exact_dist(exact_exp(u, c), exact_exp(v, c), c)
