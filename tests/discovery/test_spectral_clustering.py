"""k-means on embedded patches, and the choice of the number of clusters."""

import warnings

import numpy as np
import pytest
from sklearn.cluster import KMeans
from spectral_cases import same_partition

from unseg.discovery.spectral import kmeans
from unseg.discovery.spectral.clustering import cluster_by_silhouette, count_by_eigengap


def blobs(sizes, dims=4, spread=0.1, seed=0):
    """Points around distant centres, mixed; their blobs."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centers = 10 * rng.permutation(np.eye(max(dims, len(sizes))))[: len(sizes), :dims]
    centers += np.arange(len(sizes))[:, None]
    return centers[truth] + spread * rng.normal(size=(len(truth), dims)), truth


def mean_silhouette(points, labels):
    """The definition, with all distances; 0 for a point alone in its cluster."""
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    values = []
    for i, own in enumerate(labels):
        means = {k: distance[i, labels == k].mean() for k in set(labels.tolist()) - {own}}
        members = np.sum(labels == own)
        if members == 1:
            values.append(0.0)
            continue
        a, b = distance[i, labels == own].sum() / (members - 1), min(means.values())
        values.append((b - a) / max(a, b))
    return np.mean(values)


@pytest.mark.parametrize("sizes", [(50, 50), (5, 100, 30), (20, 20, 20, 20, 20)])
def test_kmeans_finds_blobs(sizes):
    points, truth = blobs(sizes)
    labels = kmeans(points, len(sizes))
    assert labels.dtype == np.int64
    assert same_partition(1 + labels, 1 + truth)
    # Numbered by their first points.
    first = [np.flatnonzero(labels == k)[0] for k in range(len(sizes))]
    assert first == sorted(first)


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("num_init", [1, 10])
def test_kmeans_is_that_of_scikit_learn(seed, num_init):
    points = np.random.default_rng(9).normal(size=(300, 4)).astype(np.float32)
    expected = KMeans(5, n_init=num_init, random_state=seed).fit_predict(points)
    labels = kmeans(points, 5, seed=seed, num_init=num_init)
    assert same_partition(1 + labels, 1 + expected)
    assert np.array_equal(labels, kmeans(points, 5, seed=seed, num_init=num_init))


def test_seed_and_number_of_starts_matter():
    points = np.random.default_rng(9).normal(size=(300, 4))
    one = [kmeans(points, 5, seed=seed, num_init=1) for seed in range(3)]
    assert not all(same_partition(1 + one[0], 1 + other) for other in one)
    inertia = [
        sum(np.square(points[x == k] - points[x == k].mean(0)).sum() for k in range(5))
        for x in (*one, kmeans(points, 5, num_init=20))
    ]
    assert inertia[-1] < inertia[0]  # the first of its starts


def test_kmeans_of_few_points():
    assert kmeans(np.zeros((1, 4)), 1).tolist() == [0]
    assert kmeans(np.arange(6.0).reshape(3, 2), 1).tolist() == [0, 0, 0]
    assert sorted(kmeans(np.arange(6.0).reshape(3, 2), 3).tolist()) == [0, 1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kmeans(np.zeros((7, 4)), 3).tolist() == [0] * 7
        assert kmeans(np.array([[0.0], [1], [1], [0]]), 3).tolist() == [0, 1, 1, 0]
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"1 to 3 points, got {count}"):
            kmeans(np.zeros((3, 2)), count)


@pytest.mark.parametrize("sizes", [(30, 40), (30, 30, 30), (12, 25, 20, 30)])
def test_silhouette_finds_the_number_of_blobs(sizes):
    points, truth = blobs(sizes)
    labels = cluster_by_silhouette(points, 8, min_silhouette=0.35)
    assert same_partition(1 + labels, 1 + truth)
    # No more than allowed.
    assert cluster_by_silhouette(points, 2, min_silhouette=0.35).max() == 1
    assert cluster_by_silhouette(points, 1, min_silhouette=0.35).max() == 0


@pytest.mark.parametrize("seed", range(4))
def test_silhouette_is_the_greatest(seed):
    points = blobs((10, 12, 14), spread=3.5, seed=seed)[0]
    quality = {k: mean_silhouette(points, kmeans(points, k, seed=1)) for k in range(2, 7)}
    best = max(quality, key=quality.get)
    labels = cluster_by_silhouette(points, 6, min_silhouette=-1, seed=1)
    assert labels.max() + 1 == best
    assert np.array_equal(labels, kmeans(points, best, seed=1))
    # One cluster where none reaches the least.
    for least, found in ((quality[best] - 1e-6, best), (quality[best] + 1e-6, 1)):
        labels = cluster_by_silhouette(points, 6, min_silhouette=least, seed=1)
        assert labels.max() + 1 == found


def test_silhouette_that_just_reaches_the_least():
    # Three pairs of equal points: with three clusters the silhouette is exactly 1.
    points = np.repeat([[0.0, 0], [1, 0], [0, 1]], 2, axis=0)
    labels = cluster_by_silhouette(points, 5, min_silhouette=1.0)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_silhouette_of_few_points():
    for count in (1, 2):
        assert not cluster_by_silhouette(np.eye(4)[:count], 8, min_silhouette=-1).any()
    assert not cluster_by_silhouette(np.zeros((50, 4)), 8, min_silhouette=-1).any()


@pytest.mark.parametrize("sizes", [(1200, 1500, 900), (3000, 1), (2990, 4, 6), (2900, 31)])
def test_silhouette_of_many_points(sizes):
    # Then a sample is taken; a rare cluster is not lost in it.
    points, truth = blobs(sizes, spread=0.01)
    for seed in range(3):
        labels = cluster_by_silhouette(points, 4, min_silhouette=0.35, seed=seed)
        assert same_partition(1 + labels, 1 + truth)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_eigengap(background, count):
    # So many parts make so many small eigenvalues.
    small = count + background
    if small == 1:  # the gap after the trivial eigenvalue does not count
        return
    values = np.concatenate(([0.0], 0.01 + 0.001 * np.arange(small - 1), 0.5 + 0.01 * np.arange(5)))
    assert count_by_eigengap(values, 8, background=background) == count
    assert count_by_eigengap(values, min(count, 2), background=background) == min(count, 2)


def test_eigengap_of_few_eigenvalues():
    for values in ([0.0], [0.0, 0.3]):
        assert count_by_eigengap(np.array(values), 8, background=True) == 1
