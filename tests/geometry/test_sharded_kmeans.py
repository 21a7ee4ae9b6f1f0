"""k-means of 1, 2 and 3 processes that share the points: the same bits."""

import kmeans_cases as cases
import kmeans_ranks as ranks
import pytest
import torch
import torch.multiprocessing as mp

from unseg.geometry import hyperbolic_kmeans
from unseg.geometry.sharded_rows import ShardedRows


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the three processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(ranks.run, args=(str(folder),), nprocs=3, start_method="spawn")
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(3)]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ranks.RUNS)
@pytest.mark.usefixtures("one_thread")
def test_ranks_do_not_change_a_bit(found, name):
    x, options = ranks.arguments(name)
    alone = vars(hyperbolic_kmeans(x, ranks.K, **options))
    assert (alone["repaired"] > 0) == (name == "repair")
    assert alone["n_iter"] > 3
    for world, portions in ranks.PORTIONS.items():
        results = [process[world, name] for process in found if (world, name) in process]
        assert len(results) == world
        assert [len(result["labels"]) for result in results] == list(portions)
        for key in ("labels", "distances"):
            assert torch.equal(torch.cat([result[key] for result in results]), alone[key])
        for result in results:
            assert torch.equal(result["centroids"], alone["centroids"])
            for key in alone.keys() - {"labels", "distances", "centroids"}:
                assert result[key] == alone[key]


def test_bad_input_of_one_rank_is_refused_by_all(found):
    errors = [process["errors"] for process in found]
    assert [e["nan"] for e in errors[:2]] == ["ValueError: rank 2: x: NaN/inf"] * 2
    assert errors[2]["nan"] == "ValueError: x: NaN/inf"
    assert all("x differs: rank 0 has (3, 'torch.float64'), rank 2" in e["dim"] for e in errors)
    assert [e["dtype"].split(":")[0] for e in errors] == ["ValueError", "ValueError", "TypeError"]
    assert all("k = 21, but x has only 20 different points" in e["count"] for e in errors)
    assert all("minibatch is for one process" in e["minibatch"] for e in errors)


def test_one_process_cuts_and_adds_in_order():
    x = cases.ball_points(10, 2)
    shards = ShardedRows(x, chunk_rows=4)
    assert shards.own.data_ptr() == x.data_ptr()
    assert (shards.total, shards.start, shards.world) == (10, 0, 1)
    assert [len(chunk) for chunk in shards.chunks()] == [4, 4, 2]
    values = torch.arange(10)
    assert [chunk.tolist() for chunk in shards.chunks(values)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    assert torch.equal(shards.take(torch.tensor([7, 0])), x[[7, 0]])
    assert torch.equal(shards.gather(values), values)
    assert torch.equal(shards.give_back(values), values)
    # (0 + 1e16) + 1 loses the 1; another order would not.
    parts = torch.tensor([1e16, 1.0, -1e16]).double()
    assert float(shards.add_up(iter(parts), torch.zeros(()).double())) == 0
    assert ShardedRows(x[:0]).chunks() == ()
