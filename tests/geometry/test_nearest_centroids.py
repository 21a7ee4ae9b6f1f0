"""The matrix product against all distances one by one."""

import math

import geoopt
import pytest
import torch
from ball_cases import CURVATURES, random_points, random_tangents
from torch import Tensor

from unseg.geometry import PoincareBall, assignment, nearest_centroids


def all_distances(x: Tensor, centroids: Tensor, c: float) -> Tensor:
    """(N, K) in float64, of geoopt."""
    ball = geoopt.PoincareBall(torch.tensor(c, dtype=torch.float64))
    return ball.dist(x.double()[:, None], centroids.double())


def naive_distances(x: Tensor, centroids: Tensor, c: float) -> Tensor:
    """(N, K) in float64 by the formula: geoopt's have too few digits and end at 16.8."""
    difference = x.double()[:, None] - centroids.double()
    gaps = (1 - c * y.double().square().sum(-1) for y in (x[:, None], centroids))
    rho = difference.square().sum(-1) / math.prod(gaps)
    return torch.asinh((c * rho).sqrt()) * 2 / math.sqrt(c)


def regret(x: Tensor, centroids: Tensor, c: float, labels: Tensor) -> float:
    """How much farther the chosen centroid is than the nearest, at most."""
    distances = naive_distances(x, centroids, c)
    chosen = distances.gather(1, labels[:, None])[:, 0]
    return float((chosen - distances.amin(dim=1)).max())


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize(("dim", "k"), [(1, 3), (2, 40), (64, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_all_distances(c, dim, k, dtype):
    x = random_points(300, dim, c, 3.0).to(dtype)
    centroids = random_points(k, dim, c, 2.0, seed=1).to(dtype)
    labels, distances = nearest_centroids(x, centroids, c)
    truth = all_distances(x, centroids, c)
    assert labels.dtype == torch.int64
    assert distances.dtype == torch.float64
    torch.testing.assert_close(distances, truth.amin(dim=1), rtol=1e-9, atol=1e-9)
    chosen = truth.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(chosen, truth.amin(dim=1), rtol=1e-9, atol=1e-9)
    assert k > 3 or len(labels.unique()) > 1


def test_it_is_not_the_nearest_by_ruler():
    # Between the origin and a centroid near the rim, nearer to the latter by ruler.
    centroids = torch.tensor([[0.0, 0.0], [0.99, 0.0]], dtype=torch.float64)
    labels, distances = nearest_centroids(
        torch.tensor([[0.6, 0.0]], dtype=torch.float64), centroids
    )
    assert labels.tolist() == [0]
    assert float(distances) == pytest.approx(2 * math.atanh(0.6), rel=1e-14)


def rim_case(norm: float, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Points and centroids of two dimensions, all near the rim, many near one another."""
    x, centroids = (random_tangents(m, 2, 1.0, seed=seed) for seed, m in ((0, n), (1, k)))
    return tuple((norm * u / u.norm(dim=1, keepdim=True)).to(dtype) for u in (x, centroids))


@pytest.mark.parametrize("norm", [0.996, 0.999])
def test_float32_points_near_the_rim_are_assigned_as_in_float64(norm):
    x, centroids = rim_case(norm, 2000, 400, torch.float32)
    # The case is one: what float32 products alone say is wrong by far.
    square = centroids.square().sum(1)
    beta = 1 / (1 - square)
    scores = beta * (square - 2 * x @ centroids.t() + x.square().sum(1, keepdim=True))
    assert regret(x, centroids, 1.0, scores.argmin(dim=1)) > 1e-3
    labels, distances = nearest_centroids(x, centroids)
    assert regret(x, centroids, 1.0, labels) < 1e-11
    truth = naive_distances(x, centroids, 1.0).amin(dim=1)
    torch.testing.assert_close(distances, truth, rtol=1e-12, atol=0)
    assert torch.equal(labels, nearest_centroids(x.double(), centroids.double())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_outermost_rim(dtype):
    x, centroids = rim_case(0.99999, 500, 300, dtype)
    labels, _ = nearest_centroids(x, centroids)
    assert regret(x, centroids, 1.0, labels) < 1e-9


@pytest.mark.parametrize("c", CURVATURES)
def test_near_centroids_that_float32_cannot_tell_apart(c):
    base = random_points(40, 8, c, 3.0)
    centroids = torch.cat([base, base * (1 + 1e-9), base * (1 - 2e-9)])
    x = (base * (1 + 0.4e-9)).repeat(3, 1)
    labels, _ = nearest_centroids(x, centroids, c)
    assert torch.equal(labels, torch.arange(40).repeat(3))
    assert regret(x.float(), centroids, c, nearest_centroids(x.float(), centroids, c)[0]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_centroids_themselves_and_ties(dtype):
    x = random_points(50, 3, 1.0, 3.0).to(dtype)
    labels, distances = nearest_centroids(x, torch.cat([x, x]))
    assert torch.equal(labels, torch.arange(50))  # of equals the lowest
    assert not distances.any()
    corners = torch.tensor([[0.5, 0.0], [0.0, 0.5], [-0.5, 0.0], [0.0, -0.5]], dtype=dtype)
    labels, distances = nearest_centroids(torch.zeros(3, 2, dtype=dtype), corners)
    assert labels.tolist() == [0, 0, 0]
    torch.testing.assert_close(distances, torch.full((3,), 2 * math.atanh(0.5)).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_do_not_matter(dtype):
    x, centroids = rim_case(0.99, 150, 60, dtype)
    x = torch.cat([x, centroids, (centroids + centroids.roll(1, 0)) / 2])  # with ties
    whole = nearest_centroids(x, centroids, chunk_bytes=1 << 40)
    for chunk_bytes in (1, 5000, assignment.CHUNK_BYTES):
        parts = nearest_centroids(x, centroids, chunk_bytes=chunk_bytes)
        assert all(map(torch.equal, whole, parts))
    backward = nearest_centroids(x.flip(0), centroids)
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(whole, backward))


def test_products_decide_nearly_everything(monkeypatch):
    compared = []
    slow = assignment._labels_from_differences

    def count(x: Tensor, *args) -> Tensor:
        compared.append(len(x))
        return slow(x, *args)

    monkeypatch.setattr(assignment, "_labels_from_differences", count)
    x, centroids = random_points(3000, 16, 1.0, 3.0), random_points(100, 16, 1.0, 3.0, seed=1)
    nearest_centroids(x, centroids)
    nearest_centroids(x.float(), centroids.float())
    assert not compared
    nearest_centroids(x, centroids[[0, 0]])
    assert compared == [3000]


@pytest.fixture
def _low_precision_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_low_precision_products")
def test_low_precision_products_are_not_used(monkeypatch):
    used = []
    product = assignment._Product
    monkeypatch.setattr(
        assignment, "_Product", lambda *args: used.append(args[2]) or product(*args)
    )
    x, centroids = random_points(200, 16, 1.0).float(), random_points(50, 16, 1.0, seed=1).float()
    assert regret(x, centroids, 1.0, nearest_centroids(x, centroids)[0]) < 1e-12
    assert used == [torch.float64]


def test_autocast_changes_nothing():
    x, centroids = rim_case(0.9, 300, 100, torch.float32)
    plain = nearest_centroids(x, centroids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ centroids.t()).dtype == torch.bfloat16
        assert all(map(torch.equal, plain, nearest_centroids(x, centroids)))
    assert regret(x, centroids, 1.0, plain[0]) < 1e-12


def test_no_points_one_centroid_and_no_gradient():
    x = random_points(5, 3, 2.0).requires_grad_()
    labels, distances = nearest_centroids(x, x[:1].detach(), 2.0)
    assert labels.tolist() == [0] * 5
    torch.testing.assert_close(distances, PoincareBall(2.0).dist(x, x[0]).detach())
    assert not distances.requires_grad
    labels, distances = nearest_centroids(x[:0], x.detach(), 2.0)
    assert labels.shape == distances.shape == (0,)


def test_arguments_that_do_not_fit():
    x, y = random_points(20, 3, 1.0), random_points(4, 3, 1.0)
    nan, rim, far = x.clone(), y.clone(), x.float()
    nan[3, 1], rim[2], far[5] = math.nan, torch.tensor([0.0, 1.0, 0.0]), torch.ones(3)
    for error, message, call in (
        (ValueError, r"x\[3\] is NaN/inf", lambda: nearest_centroids(nan, y)),
        (ValueError, r"centroids\[2\] is outside the ball", lambda: nearest_centroids(x, rim)),
        (ValueError, r"x\[5\] is outside the ball", lambda: nearest_centroids(far, y)),
        (ValueError, "centroids has no rows", lambda: nearest_centroids(x, y[:0])),
        (ValueError, r"x: shape \(N, 3\)", lambda: nearest_centroids(x[:, :2], y)),
        (ValueError, r"centroids: shape \(N, D\)", lambda: nearest_centroids(x, y[0])),
        (TypeError, "x must be float32", lambda: nearest_centroids(x.half(), y)),
        (TypeError, "centroids must be float32", lambda: nearest_centroids(x, y.bfloat16())),
        (ValueError, "c must be", lambda: nearest_centroids(x, y, 0.0)),
        (ValueError, "chunk_bytes", lambda: nearest_centroids(x, y, chunk_bytes=0)),
    ):
        with pytest.raises(error, match=message):
            call()
