"""Seeds of hyperbolic k-means: greedy k-means++ with the objective that is minimised later.

Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007; the greedy form
(several candidates a step) is theirs too, section 7, and scikit-learn's.

Legend: N points of all processes, M points seeds are chosen from, D dimensions, K clusters,
L candidates a step.
"""

import math

import torch
from torch import Tensor

from unseg.geometry.sharded_rows import ShardedRows

POINTS_PER_CLUSTER = 64


def _row_codes(x: Tensor) -> Tensor:
    """A code (n,) int64 of each row (n, D); equal rows have equal ones, integers wrap around."""
    generator = torch.Generator().manual_seed(0)
    shape = (x.shape[1],)
    odd = torch.randint(-(2**62), 2**62, shape, generator=generator).to(x.device) * 2 + 1
    bits = (x.double() + 0.0).view(torch.int64)  # + 0.0: -0 is 0
    # Simple numbers differ in their highest bits alone, which products would lose.
    mixed = (bits * 0x2545F4914F6CDD1D) ^ ((bits * 0x2545F4914F6CDD1D) >> 29)
    return ((mixed * 0x1B873593CC9E2D51) ^ (mixed >> 32)).mul(odd).sum(1)


def count_distinct(shards: ShardedRows) -> int:
    """How many different points there are, of all ranks. (Up to a collision of 64-bit codes, by
    which it would be one less.)"""
    codes = [_row_codes(x) for x in shards.chunks()]
    own = torch.cat(codes) if codes else shards.own.new_zeros(0, dtype=torch.int64)
    return len(torch.unique(shards.gather(own)))


def draw_sample(shards: ShardedRows, count: int, generator: torch.Generator) -> Tensor:
    """(min(N, count), D): rows drawn uniformly, each at most once, in their order; on all ranks."""
    if count < shards.total:
        chosen = torch.randperm(shards.total, generator=generator)[:count].sort().values
    elif shards.world == 1:
        return shards.own
    else:
        chosen = torch.arange(shards.total)
    return shards.take(chosen.to(shards.own.device))


class _Costs:
    """Costs of M points at candidates by a matrix product (spec long_tail.md 4.1)."""

    def __init__(self, points: Tensor, c: float, centroid: str):
        wide = points.double()
        self._square = wide.square().sum(1)
        self._gap = 1 - c * self._square
        self._points, self._c, self._centroid = points, c, centroid
        rows = torch.cat([wide, self._square[:, None], torch.ones_like(wide[:, :1])], dim=1)
        self._rows = (rows * (2 * c / self._gap)[:, None]).to(points.dtype)
        # cosh(s d) - 1 of equal points, as far as rounding of the expansion takes it.
        rounding = (points.shape[1] + 3) * torch.finfo(points.dtype).eps
        noise = rounding * 8 * c * self._square / self._gap.square()
        self.noise = self._of_cosh(noise).to(points.dtype)

    def _of_cosh(self, excess: Tensor) -> Tensor:
        """The mode's costs from cosh(s d) - 1."""
        if self._centroid == "lorentz":
            return excess
        return 4 / self._c * torch.asinh((excess / 2).sqrt()).square()

    def at(self, candidates: Tensor) -> Tensor:
        """(L, M) of the dtype of the points: costs at the points of these indices (L,)."""
        beta = 1 / self._gap[candidates]
        chosen = self._points[candidates].double()
        columns = torch.cat([-2 * chosen, torch.ones_like(chosen[:, :1])], dim=1)
        columns = torch.cat([columns, self._square[candidates, None]], dim=1) * beta[:, None]
        excess = columns.to(self._rows.dtype) @ self._rows.t()
        return self._of_cosh(excess.clamp_(min=0))


def _draw(costs: Tensor, used: Tensor, uniform: Tensor) -> Tensor:
    """Indices (L,) drawn by costs (M,); uniformly from those not `used` (M,) if all costs are 0.

    Args:
        uniform: (L,) float64 in [0, 1).
    """
    total = costs.double().cumsum(0)
    if total[-1] > 0:
        chosen = torch.searchsorted(total, uniform * total[-1], right=True)
        return chosen.clamp(max=len(costs) - 1)
    unused = (~used).nonzero()[:, 0]
    return unused[(uniform * len(unused)).long()]


def seed_centroids(
    points: Tensor, k: int, c: float, centroid: str, generator: torch.Generator
) -> Tensor:
    """Greedy k-means++: k of the points, each the best of 2 + floor(ln k) drawn by their cost.

    Args:
        points: (M, D) float32 or float64 in the ball, M at least k.
        centroid: "lorentz" or "frechet": whose costs.
        generator: of the CPU.

    Returns:
        (k, D) float64; with fewer than k different points some are equal.
    """
    count, trials = len(points), 2 + int(math.log(k))
    costs = _Costs(points, c, centroid)
    uniform = torch.rand(k, trials, dtype=torch.float64, generator=generator).to(points.device)
    used = torch.zeros(count, dtype=torch.bool, device=points.device)
    seeds: list[Tensor] = []
    closest = torch.full_like(costs.noise, math.inf)
    for step in range(k):
        chosen = _draw(closest, used, uniform[step]) if step else (uniform[0, :1] * count).long()
        cost = torch.minimum(costs.at(chosen), closest)
        best = cost.sum(1, dtype=torch.float64).argmin()
        seed = chosen[best]
        closest = cost[best]
        closest = closest * (closest > costs.noise)
        closest[seed] = 0
        used[seed] = True
        seeds.append(seed)
    return points[torch.stack(seeds)].double()
