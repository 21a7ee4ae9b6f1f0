"""k-means in the Poincaré ball, and scikit-learn's Euclidean one to compare with.

Legend: N points, n of them given by this process, D dimensions, K clusters.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from unseg.geometry.basics import rim_gap
from unseg.geometry.lloyd import KMeansProblem, KMeansResult, KMeansSettings, lloyd
from unseg.geometry.minibatch import lorentz_minibatches
from unseg.geometry.seeding import (
    POINTS_PER_CLUSTER,
    count_distinct,
    draw_sample,
    seed_centroids,
)
from unseg.geometry.sharded_rows import CHUNK_ROWS, ShardedRows

# Where clip=True brings points to, of the ball's radius: as far out as geoopt allows.
_CLIP_RADIUS = {torch.float64: 1 - 1e-5, torch.float32: 1 - 4e-3}
# Below so many products of N, K and D threads cost scikit-learn more than they bring.
_SMALL_PRODUCT = 10**9
# Nearer the rim, 1 - c|x|^2, float64 has hardly any distances.
_RIM_GAP = 1e-12
_START_STRIDE = 1_000_003  # from the seed of one start to the next


def _minibatches(
    problem: KMeansProblem, centroids: Tensor, generator: torch.Generator
) -> KMeansResult:
    settings = problem.settings
    run = lorentz_minibatches(
        problem.shards.own,
        centroids,
        settings.c,
        batch=settings.minibatch,
        max_iter=settings.max_iter,
        tol=settings.tol,
        generator=generator,
    )
    partition = problem.assign(run.centroids)
    history = (*run.history, partition.objective)
    how = {"n_iter": len(run.history), "stop_reason": run.stop_reason, "history": history}
    return problem.result(run.centroids, partition, repaired=run.repaired, **how)


def _check_points(name: str, x: Tensor, c: float, clip: bool) -> Tensor:
    """x (N, D) as it is, or with clip=True a copy whose points all lie in the ball.

    Raises:
        TypeError: neither float32 nor float64.
        ValueError: not of shape (N, D); NaN/inf; points outside and clip=False.
    """
    if x.dtype not in _CLIP_RADIUS:
        raise TypeError(f"{name} must be float32 or float64, got {x.dtype}")
    if x.dim() != 2 or not x.shape[1]:
        raise ValueError(f"{name}: (N, D) is needed, got {tuple(x.shape)}")
    if not all(torch.isfinite(part).all() for part in x.split(CHUNK_ROWS)):
        raise ValueError(f"{name}: NaN/inf")
    gaps = [rim_gap(part, c) for part in x.split(CHUNK_ROWS)]
    outside = sum(int((gap < _RIM_GAP).sum()) for gap in gaps)
    if not outside:
        return x
    if not clip:
        raise ValueError(
            f"{name}: {outside} of {len(x)} points lie outside the ball of radius "
            f"1 / sqrt(c) = {c**-0.5:g}, or on its rim; clip=True brings them back"
        )
    radius = _CLIP_RADIUS[x.dtype] / c**0.5
    norms = x.double().norm(dim=1, keepdim=True)
    return torch.where(norms > radius, x * (radius / norms), x).to(x.dtype)


def _check_on_all(
    check: Callable[[], Tensor], distributed: bool, group: dist.ProcessGroup | None
) -> Tensor:
    """The result of `check`; if it fails on one rank, all raise, so that none waits for others."""
    if not distributed:
        return check()
    error, x = None, None
    try:
        x = check()
    except (TypeError, ValueError) as raised:
        error = raised
    mine = (None, x.shape[1], str(x.dtype)) if error is None else (str(error), 0, "")
    reports: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(reports, mine, group=group)
    if error is not None:
        raise error
    for rank, report in enumerate(reports):
        if report[0] is not None:
            raise ValueError(f"rank {rank}: {report[0]}")
        if report != reports[0]:
            raise ValueError(f"x differs: rank 0 has {reports[0][1:]}, rank {rank} {report[1:]}")
    return x


def _check_init(init: Tensor, k: int, like: Tensor, c: float) -> Tensor:
    if init.shape != (k, like.shape[1]):
        raise ValueError(f"init: {(k, like.shape[1])} is needed, got {tuple(init.shape)}")
    return _check_points("init", init, c, clip=False).to(like.device, torch.float64)


@torch.no_grad()
def hyperbolic_kmeans(
    x: Tensor,
    k: int,
    *,
    c: float = 1.0,
    centroid: str = "lorentz",
    seed: int = 0,
    max_iter: int = 100,
    init: Tensor | None = None,
    n_init: int = 1,
    tol: float = 1e-5,
    minibatch: int = 0,
    distributed: bool = False,
    group: dist.ProcessGroup | None = None,
    clip: bool = False,
    chunk_rows: int = CHUNK_ROWS,
) -> KMeansResult:
    """k-means by hyperbolic distance in the Poincaré ball of curvature -c.

    Exact assignment by matrix products (nearest_centroids), greedy k-means++ on a uniform sample of
    64 points a cluster, empty clusters filled: before a centroid step each gets one of the points
    that cost most, at most one of each other cluster at a time. The point leaves its cluster, then
    all centroids are taken, so that this too only lowers the objective; history holds objectives of
    nearest centroids only, not of these labels. Clusters may stay empty if the points that could
    fill them differ by rounding alone, or if max_iter comes first.

    One device, one seed: the same bits. Those also do not depend on how many ranks share the
    points, and in what portions, as long as their order is the same and the machines are of one
    kind (see ShardedRows).

    Args:
        x: (n, D) points in the ball, float64; float32 is kept, to save memory and time, while
            labels, distances and centroids are as exact as for these points in float64.
        k: clusters.
        centroid: "lorentz": midpoints, the minimum of the sum of cosh(s d) - 1; "frechet": of d^2.
        init: (k, D) centroids to start from, on all ranks; None: seeding.
        n_init: starts, of which the one with the lowest objective is kept.
        tol: stop if the objective falls by no more than this, relatively.
        minibatch: points a step, one process and "lorentz" only, see lorentz_minibatches; 0: all.
        distributed: x is this rank's share; all ranks of `group` (None: of all) call this with the
            same arguments.
        clip: bring points that lie outside the ball, or on the rim, back into it.
        chunk_rows: see ShardedRows.

    Raises:
        TypeError: x is neither float32 nor float64.
        ValueError: NaN/inf, points outside the ball (or nearer the rim than 1 - c|x|^2 = 1e-12)
            without clip, k above the number of different points, arguments out of range.
    """
    distributed = distributed or group is not None
    settings = KMeansSettings(k, c, centroid, max_iter, tol, minibatch)
    if n_init < 1 or (init is not None and n_init > 1):
        raise ValueError(f"n_init must be at least 1, and 1 with init; got {n_init}")
    x = _check_on_all(lambda: _check_points("x", x.detach(), c, clip), distributed, group)
    if init is not None:
        init = _check_init(init, k, x, c)
    shards = ShardedRows(x, distributed=distributed, group=group, chunk_rows=chunk_rows)
    if minibatch and shards.world > 1:
        raise ValueError("minibatch is for one process, not for several ranks")
    distinct = count_distinct(shards)
    if k > distinct:
        raise ValueError(f"k = {k}, but x has only {distinct} different points")
    problem = KMeansProblem(shards, settings)
    best = None
    for start in range(n_init):
        # Each start has a generator of its own: those of ranks that do not seed fall behind.
        generator = torch.Generator().manual_seed(seed + _START_STRIDE * start)
        centroids = _seeds(shards, settings, generator) if init is None else init
        if minibatch:
            result = _minibatches(problem, centroids, generator)
        else:
            result = lloyd(problem, centroids)
        if best is None or result.objective < best.objective:
            best = result
    return best


def _seeds(shards: ShardedRows, settings: KMeansSettings, generator: torch.Generator) -> Tensor:
    sample = draw_sample(shards, POINTS_PER_CLUSTER * settings.k, generator)
    if shards.rank:
        seeds = sample.new_empty(settings.k, sample.shape[1], dtype=torch.float64)
    else:
        seeds = seed_centroids(sample, settings.k, settings.c, settings.centroid, generator)
    return shards.from_first(seeds)


def euclidean_kmeans(
    u: Tensor, k: int, *, seed: int = 0, n_init: int = 1, max_iter: int = 300
) -> KMeansResult:
    """scikit-learn's k-means (Lloyd, greedy k-means++ on all points), to compare with.

    Args:
        u: (N, D) float32 or float64, for example tangent vectors.

    Returns:
        history holds the last objective alone, stop_reason tells only whether max_iter was reached.

    Raises:
        TypeError: u is neither float32 nor float64.
        ValueError: not (N, D), NaN/inf, k below 1 or above the number of different points.
    """
    if u.dtype not in _CLIP_RADIUS:
        raise TypeError(f"u must be float32 or float64, got {u.dtype}")
    if u.dim() != 2 or not u.shape[1] or not torch.isfinite(u).all():
        raise ValueError(f"u: (N, D) without NaN/inf is needed, got {tuple(u.shape)}")
    distinct = count_distinct(ShardedRows(u.detach()))
    if not 1 <= k <= distinct:
        raise ValueError(f"k = {k}, but u has only {distinct} different points")
    from sklearn.cluster import KMeans  # seconds, which others need not spend
    from threadpoolctl import threadpool_limits

    points = u.detach().cpu().numpy()
    with threadpool_limits(1 if points.size * k < _SMALL_PRODUCT else None):
        model = KMeans(k, n_init=n_init, max_iter=max_iter, random_state=seed).fit(points)
    centroids = torch.from_numpy(model.cluster_centers_).to(u.device, torch.float64)
    labels = torch.from_numpy(model.labels_).to(u.device, torch.int64)
    chunks = zip(u.detach().split(CHUNK_ROWS), labels.split(CHUNK_ROWS))
    distances = torch.cat([(x.double() - centroids[label]).norm(dim=1) for x, label in chunks])
    objective = float(distances.square().sum())
    reason = "max_iter" if model.n_iter_ >= max_iter else "tolerance"
    known = {"euclidean": objective}
    return KMeansResult(
        centroids, labels, distances, objective, known, model.n_iter_, reason, (objective,)
    )
