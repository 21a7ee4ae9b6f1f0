"""k-means in the ball: against slow forms, scikit-learn near the origin, and its own promises."""

import kmeans_cases as cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from unseg.geometry import euclidean_kmeans, hyperbolic_kmeans

MODES = ("lorentz", "frechet")


def falls(history):
    """Rounding aside, never rises."""
    history = np.array(history)
    return (np.diff(history) <= 1e-12 * history[:-1]).all()


@pytest.mark.parametrize("c", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("centroid", MODES)
def test_result_is_consistent_by_plain_formulas(centroid, c):
    x = cases.ball_points(400, 5, c=c)
    result = hyperbolic_kmeans(x, 12, c=c, centroid=centroid, tol=0, chunk_rows=150)
    distances = cases.all_distances(x, result.centroids, c)
    assert torch.equal(result.labels, distances.argmin(1))
    own = distances.min(1).values
    torch.testing.assert_close(result.distances, own, rtol=1e-12, atol=1e-13)
    for mode in MODES:
        expected = float(cases.costs(own, mode, c).sum())
        assert result.objectives[mode] == pytest.approx(expected, rel=1e-10)
    assert result.objective == result.objectives[centroid] == result.history[-1]
    assert result.stop_reason == "labels"
    assert len(result.history) == result.n_iter + 1
    assert falls(result.history)
    assert result.repaired == 0
    assert result.centroids.dtype == result.distances.dtype == torch.float64
    for k in range(12):
        members = x[result.labels == k]
        if centroid == "lorentz":
            expected = cases.midpoint(members, c)
            torch.testing.assert_close(result.centroids[k], expected, rtol=1e-10, atol=1e-12)
        else:
            assert cases.mean_log(members, result.centroids[k], c).norm() < 1e-7


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_iterations_are_those_of_the_plain_form(iterations):
    x = cases.ball_points(300, 3, c=0.5)
    centroids, labels = cases.plain_lloyd(x, x[:7], iterations, c=0.5)
    result = hyperbolic_kmeans(x, 7, c=0.5, init=x[:7], max_iter=iterations, tol=0)
    assert result.stop_reason == "max_iter"
    assert result.n_iter == iterations
    torch.testing.assert_close(result.centroids, centroids, rtol=1e-10, atol=1e-12)
    assert torch.equal(result.labels, labels)


@pytest.mark.parametrize("centroid", MODES)
def test_is_euclidean_near_the_origin(centroid):
    x = 1e-4 * cases.ball_points(500, 4)
    model = KMeans(9, init=x[:9].numpy(), n_init=1, tol=0).fit(x.numpy())
    result = hyperbolic_kmeans(x, 9, init=x[:9], centroid=centroid, tol=0)
    assert np.array_equal(result.labels.numpy(), model.labels_)
    np.testing.assert_allclose(result.centroids.numpy(), model.cluster_centers_, rtol=1e-5)
    # d is 2 |x - y| at the origin.
    assert result.objectives["frechet"] == pytest.approx(4 * model.inertia_, rel=1e-5)


def test_curvature_is_a_change_of_scale():
    x = cases.ball_points(300, 4)
    unit = hyperbolic_kmeans(x, 8, init=x[:8])
    scaled = hyperbolic_kmeans(x / 2, 8, c=4.0, init=x[:8] / 2)
    assert torch.equal(unit.labels, scaled.labels)
    torch.testing.assert_close(unit.centroids, 2 * scaled.centroids)
    torch.testing.assert_close(unit.distances, 2 * scaled.distances)
    assert unit.objective == pytest.approx(scaled.objective)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    count=st.integers(1, 80),
    dim=st.integers(1, 6),
    share=st.floats(0, 1),
    centroid=st.sampled_from(MODES),
    spread=st.sampled_from([0.05, 0.5, 2.0]),
    double=st.booleans(),
)
def test_objective_never_rises(seed, count, dim, share, centroid, spread, double):
    x = cases.ball_points(count, dim, seed=seed, spread=spread)
    x = x if double else (0.999 * x).float()
    k = 1 + int(share * (len(torch.unique(x, dim=0)) - 1))
    result = hyperbolic_kmeans(x, k, centroid=centroid, seed=seed, tol=0, max_iter=30)
    history = np.array(result.history)
    # Of points that are their own centroids the rest is rounding.
    assert (np.diff(history) <= 1e-11 * history[:-1] + 1e-20 * count).all()
    assert torch.isfinite(result.centroids).all()
    assert (result.centroids.square().sum(1) < 1).all()
    expected = cases.all_distances(x, result.centroids).min(1).values
    torch.testing.assert_close(result.distances, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("centroid", MODES)
@pytest.mark.parametrize("chunk_rows", [37, 8192])
def test_empty_clusters_are_filled(centroid, chunk_rows):
    x = cases.ball_points(300, 3)
    init = x[:1].repeat(12, 1)
    init[1] = -x[0]
    result = hyperbolic_kmeans(
        x, 12, centroid=centroid, init=init, tol=0, chunk_rows=chunk_rows, max_iter=200
    )
    # Two clusters have points at first; a stale centroid may win some back by itself.
    assert result.repaired >= 5
    assert falls(result.history)
    assert result.stop_reason == "labels"
    assert torch.bincount(result.labels, minlength=12).min() > 0


def test_a_filled_cluster_is_the_costliest_point_alone():
    x = torch.tensor([[0.0], [0.1], [-0.1], [0.9], [0.8], [-0.5]], dtype=torch.float64)
    # The third centroid is nobody's; 0.9 is the farthest of all, and leaves its cluster.
    init = torch.tensor([[0.05], [-0.4], [-0.9999]], dtype=torch.float64)
    result = hyperbolic_kmeans(x, 3, init=init, max_iter=1)
    assert result.repaired == 1
    expected = torch.stack([cases.midpoint(x[[0, 1, 2, 4]]), cases.midpoint(x[5:]), x[3]])
    first = cases.all_distances(x, init).argmin(1)
    assert first.tolist() == [0, 0, 0, 0, 0, 1]
    torch.testing.assert_close(result.centroids, expected)
    own = cases.all_distances(x, init).min(1).values
    assert result.history[0] == pytest.approx(float(cases.costs(own, "lorentz").sum()))


@pytest.mark.parametrize("centroid", MODES)
def test_as_many_clusters_as_different_points(centroid):
    x = cases.ball_points(20, 2)
    result = hyperbolic_kmeans(x.repeat(3, 1), 20, centroid=centroid)
    assert result.objective == pytest.approx(0, abs=1e-20)
    assert len(result.labels.unique()) == 20
    with pytest.raises(ValueError, match="k = 21, but x has only 20 different points"):
        hyperbolic_kmeans(x.repeat(3, 1), 21, centroid=centroid)


def test_points_equal_up_to_rounding_end():
    x = torch.tensor([[0.5, 0.1]], dtype=torch.float64).repeat(6, 1)
    x[:, 0] += 1e-16 * torch.arange(6)  # two or three different numbers
    k = len(torch.unique(x, dim=0))
    assert k > 1
    result = hyperbolic_kmeans(x, k, tol=0, max_iter=50)
    assert result.n_iter < 50
    assert result.distances.max() < 1e-14


def test_one_cluster_and_one_point():
    x = cases.ball_points(50, 3)
    result = hyperbolic_kmeans(x, 1)
    torch.testing.assert_close(result.centroids[0], cases.midpoint(x))
    alone = hyperbolic_kmeans(x[:1], 1)
    torch.testing.assert_close(alone.centroids, x[:1])
    assert alone.labels.tolist() == [0]


def test_points_at_the_origin_and_near_the_rim():
    rim = torch.eye(3, dtype=torch.float64) * (1 - 1e-9)
    x = torch.cat([torch.zeros(2, 3, dtype=torch.float64), rim, -rim])
    for centroid in MODES:
        result = hyperbolic_kmeans(x, 7, centroid=centroid)
        assert result.distances.max() < 1e-5
        assert len(result.labels.unique()) == 7
        assert falls(result.history)


def test_deterministic_and_seeded():
    x = cases.ball_points(500, 4)
    first, second = (hyperbolic_kmeans(x, 20, seed=3, max_iter=4, tol=0) for _ in range(2))
    assert torch.equal(first.centroids, second.centroids)
    assert torch.equal(first.labels, second.labels)
    assert first.history == second.history
    other = hyperbolic_kmeans(x, 20, seed=4, max_iter=4, tol=0)
    assert not torch.equal(first.centroids, other.centroids)
    state = torch.get_rng_state()
    hyperbolic_kmeans(x, 5)
    assert torch.equal(state, torch.get_rng_state())


def test_more_starts_keep_the_best():
    x = cases.ball_points(300, 2)
    runs = [hyperbolic_kmeans(x, 15, seed=1, n_init=n).objective for n in (1, 2, 4, 8)]
    assert all(later <= earlier for earlier, later in zip(runs, runs[1:]))
    assert runs[-1] < runs[0]


def test_reasons_to_stop():
    x = cases.ball_points(500, 3)
    by_tolerance = hyperbolic_kmeans(x, 20, tol=0.01)
    assert by_tolerance.stop_reason == "tolerance"
    *_, before, last = by_tolerance.history
    assert before - last <= 0.01 * before
    earlier = by_tolerance.history[:-1]
    assert all(a - b > 0.01 * a for a, b in zip(earlier, earlier[1:]))
    unchanged = hyperbolic_kmeans(x, 20, tol=0)
    assert unchanged.stop_reason == "labels"
    again = hyperbolic_kmeans(x, 20, init=unchanged.centroids, tol=0)
    assert again.n_iter == 1
    assert torch.equal(again.labels, unchanged.labels)


@pytest.mark.parametrize("centroid", MODES)
def test_float32_points_count_for_what_they_are(centroid):
    x = cases.ball_points(400, 4).float()
    init = x[:10].double()
    single = hyperbolic_kmeans(x, 10, init=init, centroid=centroid)
    double = hyperbolic_kmeans(x.double(), 10, init=init, centroid=centroid)
    assert torch.equal(single.labels, double.labels)
    torch.testing.assert_close(single.centroids, double.centroids, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(single.distances, double.distances, rtol=1e-12, atol=1e-12)
    assert single.centroids.dtype == torch.float64


def test_chunks_change_rounding_only():
    x = cases.ball_points(500, 4)
    one, many = (hyperbolic_kmeans(x, 10, init=x[:10], chunk_rows=rows) for rows in (500, 64))
    assert torch.equal(one.labels, many.labels)
    torch.testing.assert_close(one.centroids, many.centroids, rtol=1e-12, atol=1e-13)


# Minibatches.


def test_one_batch_of_all_is_lloyd():
    x = cases.ball_points(300, 3)
    full = hyperbolic_kmeans(x, 8, init=x[:8], max_iter=5, tol=0)
    batch = hyperbolic_kmeans(x, 8, init=x[:8], max_iter=5, tol=0, minibatch=300)
    torch.testing.assert_close(batch.centroids, full.centroids, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.tensor(batch.history), torch.tensor(full.history), rtol=1e-10, atol=0
    )


def test_minibatches_find_separate_clusters():
    centers = cases.ball_points(6, 4, spread=1.5)
    noise = cases.ball_points(600, 4, seed=1, spread=0.02)
    x = 0.95 * centers.repeat(100, 1) + 0.05 * noise
    result = hyperbolic_kmeans(x, 6, minibatch=64, max_iter=20)
    full = hyperbolic_kmeans(x, 6)
    assert torch.equal(result.labels[:, None] == result.labels, full.labels[:, None] == full.labels)
    assert result.objective == pytest.approx(full.objective, rel=0.1)
    assert result.stop_reason == "tolerance"
    assert len(result.history) == result.n_iter + 1
    again = hyperbolic_kmeans(x, 6, minibatch=64, max_iter=20)
    assert torch.equal(again.centroids, result.centroids)


def test_minibatches_move_idle_clusters():
    x = cases.ball_points(200, 2)
    init = torch.cat([x[:3], torch.full((1, 2), 0.7071, dtype=torch.float64)])
    result = hyperbolic_kmeans(x, 4, init=init, minibatch=50)
    assert result.repaired == 1
    assert torch.bincount(result.labels, minlength=4).min() > 0


# Bad input.


def test_points_outside_are_refused_or_clipped():
    x = cases.ball_points(60, 3, c=4.0)
    x[7] *= 2 / x[7].norm()
    x[9] *= 0.5 / x[9].norm()  # the rim, for c = 4
    with pytest.raises(ValueError, match="x: 2 of 60 points lie outside the ball of radius"):
        hyperbolic_kmeans(x, 4, c=4.0)
    before = x.clone()
    result = hyperbolic_kmeans(x, 60, c=4.0, clip=True)
    assert torch.equal(x, before)
    moved = result.centroids[result.labels[[7, 9]]]
    torch.testing.assert_close(moved.norm(dim=1), torch.full((2,), 0.5 - 5e-6).double())
    torch.testing.assert_close(moved[0] / moved[0].norm(), x[7] / x[7].norm())
    others = [i for i in range(60) if i not in (7, 9)]
    torch.testing.assert_close(result.centroids[result.labels[others]], x[others])
    single = hyperbolic_kmeans((4 * x).float(), 60, clip=True)
    assert (single.centroids.norm(dim=1) <= 0.99601).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [False, True])
def test_nan_is_refused(value, clip):
    x = cases.ball_points(20, 3)
    x[3, 1] = value
    with pytest.raises(ValueError, match="x: NaN/inf"):
        hyperbolic_kmeans(x, 2, clip=clip)
    with pytest.raises(ValueError, match="init: NaN/inf"):
        hyperbolic_kmeans(x[:3], 3, init=x[2:5])
    with pytest.raises(ValueError, match="NaN/inf"):
        euclidean_kmeans(x, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"c": 0.0}, "c must be a finite number above 0"),
        ({"c": float("nan")}, "c must be a finite number above 0"),
        ({"centroid": "einstein"}, "centroid: one of"),
        ({"max_iter": 0}, "max_iter must be at least 1"),
        ({"tol": -1.0}, "tol must not be negative"),
        ({"tol": float("nan")}, "tol must not be negative"),
        ({"n_init": 0}, "n_init must be at least 1"),
        ({"minibatch": -1}, "minibatch must not be negative"),
        ({"minibatch": 5, "centroid": "frechet"}, "centroid must be 'lorentz'"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1"),
        ({"init": torch.zeros(3, 2, dtype=torch.float64)}, r"init: \(2, 3\) is needed"),
        ({"init": torch.ones(2, 3, dtype=torch.float64)}, "init: 2 of 2 points lie outside"),
        ({"init": torch.zeros(2, 3, dtype=torch.float64), "n_init": 2}, "1 with init"),
        ({"x": torch.zeros(5, dtype=torch.float64)}, r"x: \(N, D\) is needed, got \(5,\)"),
        ({"x": torch.zeros(0, 3, dtype=torch.float64)}, "x has only 0 different points"),
        ({"x": torch.zeros(4, 3, dtype=torch.float64)}, "x has only 1 different points"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        hyperbolic_kmeans(**{"x": cases.ball_points(20, 3), "k": 2, **arguments})


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
def test_other_dtypes(dtype):
    with pytest.raises(TypeError, match="x must be float32 or float64"):
        hyperbolic_kmeans(torch.zeros(5, 2, dtype=dtype), 2)
    with pytest.raises(TypeError, match="u must be float32 or float64"):
        euclidean_kmeans(torch.zeros(5, 2, dtype=dtype), 2)


# Euclidean.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_euclidean_is_scikit_learns(dtype):
    u = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    result = euclidean_kmeans(u, 7, seed=5, n_init=3)
    model = KMeans(7, n_init=3, random_state=5).fit(u.numpy())
    assert np.array_equal(result.labels.numpy(), model.labels_)
    np.testing.assert_array_equal(result.centroids.numpy(), model.cluster_centers_)
    assert result.objective == pytest.approx(model.inertia_, rel=1e-5)
    assert result.objectives == {"euclidean": result.objective}
    expected = torch.cdist(u.double(), result.centroids).min(1).values
    torch.testing.assert_close(result.distances, expected, rtol=1e-6, atol=1e-7)
    assert result.stop_reason == "tolerance"
    assert euclidean_kmeans(u, 7, max_iter=1).stop_reason == "max_iter"


def test_euclidean_with_too_few_points():
    with pytest.raises(ValueError, match="k = 4, but u has only 2 different points"):
        euclidean_kmeans(torch.eye(2).repeat(5, 1), 4)
    with pytest.raises(ValueError, match="k = 0"):
        euclidean_kmeans(torch.eye(2), 0)
