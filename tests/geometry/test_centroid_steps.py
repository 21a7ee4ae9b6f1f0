"""Centroids in chunks, and points for empty clusters: against geoopt, scipy and plain loops."""

import kmeans_cases as cases
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from unseg.geometry.basics import rim_gap
from unseg.geometry.centroid_steps import (
    Members,
    cluster_sums,
    frechet_step,
    lorentz_step,
    point_costs,
)
from unseg.geometry.repair import costly_points
from unseg.geometry.sharded_rows import ShardedRows


def step(function, x, labels, previous, c, **options):
    members = Members(ShardedRows(x, chunk_rows=13), rim_gap(x, c), labels)
    return function(members, c, previous, **options)


@pytest.mark.parametrize("c", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("spread", [0.1, 1.0, 2.5])
def test_midpoints_are_geoopts(c, spread):
    x = cases.ball_points(100, 4, c=c, spread=spread)
    labels = torch.arange(100) % 7
    previous = cases.ball_points(9, 4, c=c, seed=1)
    found = step(lorentz_step, x, labels, previous, c)
    for k in range(7):
        expected = cases.midpoint(x[labels == k], c)
        torch.testing.assert_close(found[k], expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(found[7:], previous[7:])  # no points


@pytest.mark.parametrize("c", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0])
def test_frechet_means_have_no_slope_and_no_neighbour_is_better(c, spread):
    x = cases.ball_points(90, 3, c=c, spread=spread)
    labels = torch.arange(90) % 5
    previous = cases.ball_points(6, 3, c=c, seed=1)
    found = step(frechet_step, x, labels, previous, c)
    assert torch.equal(found[5], previous[5])
    for k in range(5):
        members = x[labels == k]
        if spread < 2:  # geoopt's logarithm ends before the rim
            assert cases.mean_log(members, found[k], c).norm() < 1e-6

        def cost(tangent, members=members):
            # All of R^3 is the ball by expmap0.
            m = cases.expmap0(torch.from_numpy(tangent)[None], c)
            return float(cases.all_distances(members, m, c).square().sum())

        own = float(cases.all_distances(members, found[k, None], c).square().sum())
        best = minimize(cost, np.zeros(3), method="BFGS")
        assert own <= best.fun * (1 + 1e-10)  # rounding near the rim
        assert own == pytest.approx(best.fun, rel=1e-6)


@given(st.integers(0, 1000), st.sampled_from([0.2, 1.0, 3.0]), st.integers(1, 3))
def test_a_few_frechet_steps_do_not_raise_the_cost(seed, spread, max_steps):
    x = cases.ball_points(40, 2, seed=seed, spread=spread)
    labels = torch.arange(40) % 4
    previous = cases.ball_points(4, 2, seed=seed + 1, spread=spread)
    found = step(frechet_step, x, labels, previous, 1.0, max_steps=max_steps)
    for k in range(4):
        before, after = (
            cases.all_distances(x[labels == k], m[k, None]).square().sum()
            for m in (previous, found)
        )
        assert after <= before * (1 + 1e-12)


def test_single_points_are_their_centroids_up_to_the_rim():
    norms = [0.0, 1e-9, 0.5, 0.99, 1 - 1e-6, 1 - 1e-9, 1 - 1e-12]
    x = torch.tensor([[0.6 * norm, -0.8 * norm] for norm in norms], dtype=torch.float64)
    labels = torch.arange(7)
    found = step(lorentz_step, x, labels, torch.zeros_like(x), 1.0)
    torch.testing.assert_close(found, x, rtol=1e-13, atol=0)
    assert (found.norm(dim=1) < 1).all()
    gaps = rim_gap(found, 1.0) / rim_gap(x, 1.0)
    # Of a gap of 2e-12 rounding takes a share of 1e-4.
    assert ((gaps - 1).abs() < 1e-3).all()
    # From the point itself nothing moves.
    torch.testing.assert_close(step(frechet_step, x, labels, x, 1.0), x, rtol=1e-15, atol=0)


def test_costs_of_points():
    distances = torch.tensor([0.0, 1e-9, 0.3, 5.0]).double()
    for c in (0.25, 1.0, 3.0):
        found = point_costs(distances, c, "lorentz")
        expected = np.cosh(c**0.5 * distances.numpy()) - 1
        np.testing.assert_allclose(found[[0, 2, 3]], expected[[0, 2, 3]], rtol=1e-14)
        assert float(found[1]) == pytest.approx(c * 1e-18 / 2)
        assert torch.equal(point_costs(distances, c, "frechet"), distances**2)


def test_sums_of_clusters():
    values = torch.randn(50, 3, dtype=torch.float64)
    labels = torch.randint(6, (50,))
    sums = cluster_sums(values, labels, 8)
    for k in range(8):
        np.testing.assert_allclose(sums[k], values[labels == k].numpy().sum(0), atol=1e-14)


@given(st.data())
def test_costly_points_are_those_of_a_loop(data):
    count, k = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 8))
    labels = torch.tensor(
        data.draw(st.lists(st.integers(0, k - 1), min_size=count, max_size=count))
    )
    cost = st.sampled_from([0.0, 1.0, 2.0, 3.0])
    costs = torch.tensor(data.draw(st.lists(cost, min_size=count, max_size=count))).double()
    sizes = torch.bincount(labels, minlength=k)
    expected, donors = [], set()
    empty = [i for i in range(k) if sizes[i] == 0]
    for point in sorted(range(count), key=lambda i: (-costs[i], i)):
        donor = int(labels[point])
        gives = costs[point] > 0 and sizes[donor] > 1 and donor not in donors
        if gives and len(expected) < len(empty):
            donors.add(donor)
            expected.append(point)
    points, clusters = costly_points(costs, labels, sizes)
    assert points.tolist() == expected
    assert clusters.tolist() == empty[: len(expected)]
