"""What each of three processes does for test_sharded_kmeans.py; it writes what it found."""

import os
from datetime import timedelta
from pathlib import Path

import kmeans_cases as cases
import torch
import torch.distributed as dist

# How many rows ranks give, by how many ranks there are; some give none.
PORTIONS = {1: (230,), 2: (7, 223), 3: (101, 0, 129)}
CHUNK_ROWS = 40
K = 9
RUNS = {
    "lorentz": {},
    "frechet": {"centroid": "frechet"},
    "starts": {"n_init": 2},
    "repair": {"init": "doubled"},
    "single": {"single": True},
}


def points():
    return cases.ball_points(230, 3)


def arguments(name):
    """x of all ranks, and keywords."""
    options = {"tol": 0, "chunk_rows": CHUNK_ROWS, "max_iter": 6, **RUNS[name]}
    x = points()
    if options.pop("single", False):
        x = (0.99 * x).float()
    if "init" in options:
        options["init"] = x[[0, 1, 2]].repeat(3, 1)
    return x, options


def errors(group, rank):
    """Messages of bad input on the last rank alone, of different shapes, and of minibatches."""
    from unseg.geometry import hyperbolic_kmeans

    x = points()[:20]
    spoiled = x.clone()
    spoiled[3, 0] = float("nan")
    last = rank == 2
    calls = {
        "nan": lambda: hyperbolic_kmeans(spoiled if last else x, 2, group=group),
        "dim": lambda: hyperbolic_kmeans(x[:, :2] if last else x, 2, group=group),
        "dtype": lambda: hyperbolic_kmeans(x.half() if last else x, 2, group=group),
        "count": lambda: hyperbolic_kmeans(x, 21, group=group),
        "minibatch": lambda: hyperbolic_kmeans(x, 2, minibatch=5, group=group),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except (TypeError, ValueError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


def run(rank, folder):
    torch.set_num_threads(1)
    from unseg.geometry import hyperbolic_kmeans

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=3,
        timeout=timedelta(minutes=10),
    )
    groups = {world: dist.new_group(list(range(3 - world, 3))) for world in PORTIONS}
    found = {}
    for world, portions in PORTIONS.items():
        place = rank - (3 - world)
        if place < 0:
            continue
        for name in RUNS:
            x, options = arguments(name)
            mine = x.split(portions)[place]
            shared = {"distributed": True} if world == 3 else {"group": groups[world]}
            result = hyperbolic_kmeans(mine, K, **shared, **options)
            found[world, name] = vars(result)
    found["errors"] = errors(groups[3], rank)
    torch.save(found, Path(folder) / f"rank_{rank}.pt")
    dist.destroy_process_group()
