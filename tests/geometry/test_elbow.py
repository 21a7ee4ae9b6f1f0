"""Knees of known curves; what is clustered."""

import math
from types import SimpleNamespace

import kmeans_cases as cases
import pytest
import torch

from unseg.geometry import elbow, elbow_grid, euclidean_kmeans, hyperbolic_kmeans


def clustering(curve):
    """As if k-means had a mean objective of curve(k)."""
    return lambda x, k, seed: SimpleNamespace(objective=curve(k) * len(x))


POINTS = torch.zeros(200, 2, dtype=torch.float64)


def test_knees_of_a_bent_line():
    # Falls by 9 until 40, by 1 until 100: the bend is the knee over K.
    table = elbow(
        POINTS,
        [100, 10, 40, 20, 70],
        cluster=clustering(lambda k: 10 - 9 * (k - 10) / 30 if k <= 40 else 1 - (k - 40) / 60),
    )
    assert table.ks == (10, 20, 40, 70, 100)
    assert table.objective == pytest.approx((10, 7, 1, 0.5, 0))
    assert table.monotone == table.objective
    assert table.knee_linear == table.knee_log == 40
    assert table.points == 200


def test_knee_moves_with_the_scale():
    # 1 / k over k in [1, 100]: the chord's slope is reached at k = 10; over log k at
    # W' = (1/k - .01)/.99, K' = ln k / ln 100: derivative 1/(k^2 .99) = 1/(k ln 100) at k = 4.65.
    ks = range(1, 101)
    table = elbow(POINTS, ks, cluster=clustering(lambda k: 1 / k))
    assert table.knee_linear == 10
    distances = [1 - math.log(k) / math.log(100) - (1 / k - 0.01) / 0.99 for k in (4, 5)]
    assert table.knee_log == (4 if distances[0] >= distances[1] else 5)


def test_rises_are_levelled():
    values = {2: 4.0, 4: 1.0, 8: 3.0, 16: 0.5}
    table = elbow(POINTS, values, cluster=clustering(values.get))
    assert table.objective == (4.0, 1.0, 3.0, 0.5)
    assert table.monotone == (4.0, 1.0, 1.0, 0.5)
    lines = str(table).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["2", "4", "8", "16"]
    assert lines[3].split() == ["8", "3", "1"]
    assert lines[5] == f"knee: {table.knee_linear} over K, {table.knee_log} over log K"
    flat = elbow(POINTS, [1, 2, 3], cluster=clustering(lambda k: 1.0))
    assert flat.knee_linear == flat.knee_log == 1


def test_real_clusters_make_the_knee():
    centers = cases.ball_points(8, 5, spread=1.5, seed=3)
    x = 0.97 * centers.repeat(50, 1) + 0.03 * cases.ball_points(400, 5, spread=0.2)
    for centroid in ("lorentz", "frechet"):
        table = elbow(x, [2, 4, 8, 16, 32], centroid=centroid)
        assert table.knee_linear == 8
        result = hyperbolic_kmeans(x, 16, centroid=centroid)
        assert table.objective[3] == pytest.approx(result.objective / 400)
    euclidean = elbow(x, [2, 4, 8, 16, 32], cluster=euclidean_kmeans, n_init=2)
    assert euclidean.knee_linear == 8


def test_large_inputs_are_sampled():
    sizes = []

    def cluster(x, k, seed, flavour):
        sizes.append((len(x), k, seed, flavour, x[:, 0].unique().numel()))
        return SimpleNamespace(objective=1 / k)

    x = torch.arange(500.0)[:, None]
    table = elbow(x, [3, 6, 9], seed=7, max_points=60, cluster=cluster, flavour="own")
    assert sizes == [(60, k, 7, "own", 60) for k in (9, 6, 3)]
    assert table.points == 60


def test_grid():
    grid = elbow_grid()
    assert (grid[0], grid[-1], len(grid)) == (200, 3000, 10)
    ratios = [b / a for a, b in zip(grid, grid[1:])]
    assert max(ratios) / min(ratios) < 1.01
    assert elbow_grid(1, 4, 10) == (1, 2, 3, 4)
    for bad in ((0, 5, 4), (5, 5, 4), (1, 5, 2)):
        with pytest.raises(ValueError, match="are needed"):
            elbow_grid(*bad)


def test_bad_arguments():
    x = cases.ball_points(30, 2)
    with pytest.raises(ValueError, match="three different numbers"):
        elbow(x, [2, 3, 3])
    with pytest.raises(ValueError, match="three different numbers"):
        elbow(x, [0, 3, 4])
    with pytest.raises(ValueError, match="max_points = 5 is below"):
        elbow(x, [2, 3, 6], max_points=5)
    with pytest.raises(ValueError, match="k = 31, but x has only 30 different points"):
        elbow(x, [2, 3, 31])
    with pytest.raises(ValueError, match="x: "):
        elbow(x[0], [2, 3, 4])
