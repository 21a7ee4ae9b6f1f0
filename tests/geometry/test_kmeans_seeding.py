"""Seeds: greedy k-means++ against a slow form with the same draws; counts of different points."""

import math

import kmeans_cases as cases
import pytest
import torch

from unseg.geometry.seeding import _draw, count_distinct, draw_sample, seed_centroids
from unseg.geometry.sharded_rows import ShardedRows


def check_seeds(chosen, x, c, centroid, seed):
    """Each of the chosen indices is the best of those that the same uniform numbers draw by cost.

    (Of equally good ones rounding chooses: two points may cover each other.)
    """
    k = len(chosen)
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(k, 2 + math.floor(math.log(k)), dtype=torch.float64, generator=generator)
    costs = cases.costs(cases.all_distances(x, x, c), centroid, c)
    assert chosen[0] == int(uniform[0, 0] * len(x))
    for step in range(1, k):
        closest = costs[:, chosen[:step]].min(1).values
        places = uniform[step][:, None] * closest.sum()
        drawn = (closest.cumsum(0) <= places).sum(1).tolist()
        totals = {i: float(torch.minimum(closest, costs[:, i]).sum()) for i in drawn}
        assert totals[chosen[step]] <= min(totals.values()) * (1 + 1e-12)


@pytest.mark.parametrize("c", [0.5, 1.0])
@pytest.mark.parametrize("centroid", ["lorentz", "frechet"])
def test_seeds_are_the_best_of_those_drawn(centroid, c):
    for seed in range(4):
        x = cases.ball_points(80, 3, c=c, seed=seed)
        seeds = seed_centroids(x, 12, c, centroid, torch.Generator().manual_seed(seed))
        chosen = [int((x == y).all(1).nonzero()) for y in seeds]
        check_seeds(chosen, x, c, centroid, seed)
        first = seed_centroids(x.float(), 12, c, centroid, torch.Generator().manual_seed(seed))[:5]
        torch.testing.assert_close(first, seeds[:5], atol=1e-6, rtol=0)
        assert first.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("centroid", ["lorentz", "frechet"])
def test_every_different_point_is_found_among_copies(dtype, centroid):
    x = cases.ball_points(10, 4).to(dtype)
    for seed in range(5):
        seeds = seed_centroids(
            x.repeat(7, 1), 10, 1.0, centroid, torch.Generator().manual_seed(seed)
        )
        assert torch.equal(seeds.unique(dim=0), x.double().unique(dim=0))


def test_fewer_points_than_seeds_are_repeated():
    x = cases.ball_points(3, 4).repeat(4, 1)
    seeds = seed_centroids(x, 12, 1.0, "lorentz", torch.Generator().manual_seed(0))
    assert torch.equal(seeds.unique(dim=0), x.unique(dim=0))
    assert torch.equal(seeds.sort(0).values, x.sort(0).values)  # each index once


def test_draws_follow_the_costs():
    costs = torch.tensor([0.0, 1.0, 0.0, 3.0, 6.0, 0.0])
    uniform = (torch.arange(10000) + 0.5).double() / 10000
    counts = torch.bincount(_draw(costs, torch.zeros(6, dtype=torch.bool), uniform), minlength=6)
    assert counts.tolist() == [0, 1000, 0, 3000, 6000, 0]
    edges = _draw(costs, torch.zeros(6, dtype=torch.bool), torch.tensor([0.0, 0.1]).double())
    assert edges.tolist() == [1, 3]
    used = torch.tensor([True, False, True, False, False, True])
    counts = torch.bincount(_draw(torch.zeros(6), used, uniform[:9999]), minlength=6)
    assert counts[used].tolist() == [0, 0, 0]
    assert (counts[~used] - 3333).abs().max() <= 1


def test_different_points_are_counted():
    grid = torch.cartesian_prod(*[torch.tensor([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0])] * 4)
    for dtype in (torch.float32, torch.float64):
        x = grid.to(dtype).repeat(2, 1)
        assert count_distinct(ShardedRows(x, chunk_rows=100)) == len(grid)
    zeros = torch.tensor([[0.0, -0.0], [-0.0, 0.0], [0.0, 0.0]])
    assert count_distinct(ShardedRows(zeros)) == 1
    assert count_distinct(ShardedRows(torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]]))) == 2
    assert count_distinct(ShardedRows(torch.zeros(0, 2))) == 0
    near = 0.5 + 2.0**-53 * torch.arange(5, dtype=torch.float64)[:, None]
    assert count_distinct(ShardedRows(near)) == len(near.unique())


def test_samples_are_uniform_and_in_order():
    x = torch.arange(50.0)[:, None]
    shards = ShardedRows(x)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(50)
    for _ in range(400):
        sample = draw_sample(shards, 10, generator)[:, 0]
        assert (sample.diff() > 0).all()
        counts[sample.long()] += 1
    # 80 on average, standard deviation 8
    assert counts.min() > 45
    assert counts.max() < 115
    assert torch.equal(draw_sample(shards, 50, generator), x)
    assert torch.equal(draw_sample(shards, 99, generator), x)
