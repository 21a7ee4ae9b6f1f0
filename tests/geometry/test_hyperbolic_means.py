"""Means against geoopt, a general minimiser, and what defines them."""

import math
from functools import partial

import geoopt
import pytest
import scipy.optimize
import torch
from ball_cases import CURVATURES, random_points
from torch import Tensor

from unseg.geometry import PoincareBall, frechet_centroids, lorentz_centroids, means
from unseg.geometry.sharded_rows import ShardedRows

CENTROIDS = (lorentz_centroids, frechet_centroids)


def geoopt_ball(c: float) -> geoopt.PoincareBall:
    return geoopt.PoincareBall(torch.tensor(c, dtype=torch.float64))


def objective(kind, x: Tensor, m: Tensor, c: float, weights: Tensor | None = None) -> Tensor:
    """What `kind` minimises at m (..., D), with geoopt's distances: (...)."""
    d = geoopt_ball(c).dist(x, m.unsqueeze(-2))
    cost = torch.cosh(math.sqrt(c) * d) - 1 if kind is lorentz_centroids else d**2
    return cost.sum(-1) if weights is None else (weights * cost).sum(-1)


def clusters(c: float, n: int = 60, k: int = 4, dim: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Points, labels (cluster 2 of the k is empty) and weights."""
    generator = torch.Generator().manual_seed(3)
    x = random_points(n, dim, c, 3.0)
    labels = torch.randint(k - 1, (n,), generator=generator)
    labels[labels == 2] = 3
    return x, labels, 0.1 + torch.rand(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize("mean_d0", [0.1, 2.0, 6.0])
def test_midpoint_is_geoopts(c, mean_d0):
    x = random_points(200, 6, c, mean_d0)
    weights = torch.linspace(0, 2, 200, dtype=torch.float64)
    ball, theirs = PoincareBall(c), geoopt_ball(c)
    near = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(ball.midpoint(x), theirs.weighted_midpoint(x, reducedim=[0]), **near)
    torch.testing.assert_close(
        ball.midpoint(x, weights), theirs.weighted_midpoint(x, weights, reducedim=[0]), **near
    )


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", CENTROIDS)
def test_no_point_nearby_is_better(kind, weighted, c):
    x = random_points(100, 5, c, 3.0)
    weights = torch.rand(100, dtype=torch.float64) if weighted else None
    labels = torch.zeros(100, dtype=torch.int64)
    m = kind(x, labels, 1, c, weights)
    best = objective(kind, x, m, c, weights)
    shifts = torch.randn(200, 5, dtype=torch.float64)
    shifts = shifts / shifts.norm(dim=1, keepdim=True) / math.sqrt(c)
    for size in (1e-4, 1e-2, 0.2):
        others = geoopt_ball(c).mobius_add(m, size * shifts)
        assert (objective(kind, x, others, c, weights) > best).all()


@pytest.mark.parametrize("kind", CENTROIDS)
def test_as_a_general_minimiser(kind):
    c, x = 1.0, random_points(15, 2, 1.0, 3.0)
    ball = geoopt_ball(c)

    def cost(u):
        return float(objective(kind, x, ball.expmap0(torch.tensor(u)), c))

    found = scipy.optimize.minimize(
        cost, [0.1, 0.1], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13}
    )
    m = kind(x, torch.zeros(15, dtype=torch.int64), 1, c)[0]
    torch.testing.assert_close(m, ball.expmap0(torch.tensor(found.x)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize("mean_d0", [0.6, 2.0, 3.8, 5.0, 5.8])
def test_frechet_mean_is_stationary_after_few_steps(c, mean_d0):
    # Steps of full length (eta 1) swing between two points for far data and never arrive.
    x = random_points(600, 16, c, mean_d0 / math.sqrt(c))
    m = PoincareBall(c).frechet_mean(x, max_steps=12)
    logs = geoopt_ball(c).logmap(m.expand_as(x), x)
    conformal = 2 / (1 - c * m.square().sum())
    assert conformal * logs.mean(0).norm() < 1e-7
    midpoint = PoincareBall(c).midpoint(x)
    assert objective(frechet_centroids, x, m, c) < objective(frechet_centroids, x, midpoint, c)


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize("kind", CENTROIDS)
def test_all_clusters_at_once_is_one_by_one(kind, c, monkeypatch):
    in_chunks = partial(ShardedRows, chunk_rows=7)
    monkeypatch.setattr(means, "ShardedRows", in_chunks)
    x, labels, weights = clusters(c)
    together = kind(x, labels, 4, c, weights)
    assert together.dtype == torch.float64
    monkeypatch.undo()
    for cluster in (0, 1, 3):
        own = labels == cluster
        if own.any():
            alone = kind(x[own], labels[own] * 0, 1, c, weights[own])[0]
            torch.testing.assert_close(together[cluster], alone, rtol=1e-9, atol=1e-10)
    assert together[2].isnan().all()
    assert together[(0, 1), :].isfinite().all()


@pytest.mark.parametrize("kind", CENTROIDS)
def test_clusters_without_weight_keep_what_is_given(kind):
    x, labels, weights = clusters(1.0)
    weights[labels == 1] = 0
    given = torch.full((4, 5), 0.05)
    name = "previous" if kind is lorentz_centroids else "start"
    result = kind(x, labels, 4, 1.0, weights, **{name: given})
    torch.testing.assert_close(result[1:3], given[1:3].double(), rtol=0, atol=0)
    nothing_given = kind(x, labels, 4, 1.0, weights)
    assert nothing_given[1:3].isnan().all()
    torch.testing.assert_close(result[0], nothing_given[0], rtol=1e-7, atol=1e-8)
    nobody = kind(x[:0], labels[:0], 4, 1.0, **{name: given})
    torch.testing.assert_close(nobody, given.double())


@pytest.mark.parametrize("kind", CENTROIDS)
def test_weights_count_as_copies(kind):
    x, labels, _ = clusters(0.3)
    copies = torch.arange(60) % 3 + 1
    repeated = kind(x.repeat_interleave(copies, 0), labels.repeat_interleave(copies), 4, 0.3)
    weighted = kind(x, labels, 4, 0.3, copies)
    torch.testing.assert_close(weighted, repeated, rtol=1e-9, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize("kind", CENTROIDS)
def test_of_one_two_and_equal_points(kind, c):
    ball = PoincareBall(c)
    rim = torch.tensor([[0.99999, 0.0], [0.0, 0.99999], [-0.99999, 0.0]], dtype=torch.float64)
    x = torch.cat([torch.zeros(1, 2).double(), rim * ball.radius, random_points(4, 2, c)])
    alone = kind(x, torch.arange(8), 8, c)
    # what float64 can tell at the rim
    assert ball.dist(alone, x).max() < 1e-4
    torch.testing.assert_close(alone[[0, 4, 5, 6, 7]], x[[0, 4, 5, 6, 7]], rtol=1e-12, atol=1e-15)
    equal = kind(x[4:5].repeat(9, 1), torch.zeros(9, dtype=torch.int64), 1, c)
    torch.testing.assert_close(equal, x[4:5], rtol=1e-12, atol=0)
    pair = kind(x[[4, 5]], torch.zeros(2, dtype=torch.int64), 1, c)
    half = ball.dist(x[4], x[5]) / 2
    torch.testing.assert_close(ball.dist(pair, x[[4, 5]]), half.expand(2), rtol=1e-8, atol=0)
    across = kind(x[[1, 3]], torch.zeros(2, dtype=torch.int64), 1, c)
    assert across.norm() < 1e-4


@pytest.mark.parametrize("kind", CENTROIDS)
def test_isometries_and_scale_carry_means_along(kind):
    x, labels = random_points(50, 4, 1.0, 3.0), torch.zeros(50, dtype=torch.int64)
    m = kind(x, labels, 1, 1.0)
    ball, shift = geoopt_ball(1.0), torch.tensor([0.3, -0.5, 0.2, 0.0], dtype=torch.float64)
    moved = kind(ball.mobius_add(shift, x), labels, 1, 1.0)
    torch.testing.assert_close(moved, ball.mobius_add(shift, m), rtol=1e-8, atol=1e-9)
    scaled = kind(x / math.sqrt(0.3), labels, 1, 0.3)
    torch.testing.assert_close(scaled, m / math.sqrt(0.3), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("max_steps", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("mean_d0", [0.5, 5.0])
def test_frechet_steps_never_raise_the_sum(max_steps, mean_d0):
    x, labels = random_points(40, 2, 1.0, mean_d0), torch.zeros(40, dtype=torch.int64)
    costs = []
    for start in (torch.tensor([[0.99, 0.1]]).double(), -x[:1], lorentz_centroids(x, labels, 1, 1)):
        first = frechet_centroids(x, labels, 1, 1.0, start=start, max_steps=max_steps)
        second = frechet_centroids(x, labels, 1, 1.0, start=start, max_steps=max_steps + 1)
        costs = [float(objective(frechet_centroids, x, m[0], 1.0)) for m in (start, first, second)]
        assert costs == sorted(costs, reverse=True) or max(costs) - min(costs) < 1e-9
        assert max_steps < 1 or mean_d0 > 1 or costs[1] < costs[0]


def test_a_bad_start_arrives_all_the_same():
    x, labels = random_points(40, 3, 1.0, 4.0), torch.zeros(40, dtype=torch.int64)
    expected = frechet_centroids(x, labels, 1, 1.0)
    start = torch.tensor([[-0.999, 0.01, 0.0]], dtype=torch.float64)
    arrived = frechet_centroids(x, labels, 1, 1.0, start=start, max_steps=60)
    torch.testing.assert_close(arrived, expected, rtol=1e-7, atol=1e-8)


def test_points_in_float32_and_ball_methods():
    x, labels, weights = clusters(1.0)
    for kind in CENTROIDS:
        assert kind(x.float(), labels, 4, 1.0, weights.float()).dtype == torch.float64
    ball, zeros = PoincareBall(1.0), torch.zeros_like(labels)
    for method, kind in (
        (ball.midpoint, lorentz_centroids),
        (ball.frechet_mean, frechet_centroids),
    ):
        assert method(x.float()).dtype == torch.float32
        assert method(x).shape == (5,)
        torch.testing.assert_close(method(x, weights), kind(x, zeros, 1, 1.0, weights)[0])


@pytest.mark.parametrize("kind", CENTROIDS)
def test_arguments_that_do_not_fit(kind):
    x, labels, weights = clusters(1.0)
    nan, outside = x.clone(), x.clone()
    nan[7, 1], outside[9] = math.nan, torch.eye(5).double()[0]
    other = "previous" if kind is lorentz_centroids else "start"
    negative, infinite = weights - 1, weights / 0
    for error, message, call in (
        (ValueError, r"x\[7\] is NaN/inf", lambda: kind(nan, labels, 4, 1.0)),
        (ValueError, r"x\[9\] is outside the ball", lambda: kind(outside, labels, 4, 1.0)),
        (ValueError, r"x: shape \(N, D\)", lambda: kind(x[0], labels, 4, 1.0)),
        (TypeError, "x must be float32 or float64", lambda: kind(x.half(), labels, 4, 1.0)),
        (TypeError, "labels must be int64", lambda: kind(x, labels.int(), 4, 1.0)),
        (ValueError, r"labels: shape \(60,\)", lambda: kind(x, labels[:-1], 4, 1.0)),
        (ValueError, "k = 3", lambda: kind(x, labels, 3, 1.0)),
        (ValueError, "labels must be", lambda: kind(x, labels - 1, 4, 1.0)),
        (ValueError, "c must be", lambda: kind(x, labels, 4, 0.0)),
        (ValueError, r"weights: shape \(60,\)", lambda: kind(x, labels, 4, 1.0, weights[:5])),
        (ValueError, "not negative", lambda: kind(x, labels, 4, 1.0, negative)),
        (ValueError, "finite", lambda: kind(x, labels, 4, 1.0, infinite)),
        (ValueError, rf"{other}: shape \(4, 5\)", lambda: kind(x, labels, 4, 1.0, None, x)),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_start_outside_the_ball_is_named():
    x, labels, _ = clusters(1.0)
    start = torch.zeros(4, 5).double()
    start[2] = math.nan  # no points: not looked at
    frechet_centroids(x, labels, 4, 1.0, start=start)
    start[1] = 3.0
    with pytest.raises(ValueError, match=r"start\[1\] is outside the ball"):
        frechet_centroids(x, labels, 4, 1.0, start=start)


@pytest.mark.parametrize("method", ["midpoint", "frechet_mean"])
def test_no_points_have_no_mean(method):
    x = random_points(3, 2, 1.0)
    for points, weights in ((x[:0], None), (x, torch.zeros(3))):
        with pytest.raises(ValueError, match="no points of positive weight"):
            getattr(PoincareBall(), method)(points, weights)
