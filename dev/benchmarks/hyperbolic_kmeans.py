"""Times k-means in the Poincaré ball against what one would use without it, in one run.

    OMP_NUM_THREADS=1 python dev/benchmarks/hyperbolic_kmeans.py   one thread; some minutes
    python dev/benchmarks/hyperbolic_kmeans.py --parts assignment
    python dev/benchmarks/hyperbolic_kmeans.py --million           and a million points; minutes
    python dev/benchmarks/hyperbolic_kmeans.py --quick             tiny sizes, no goals

Points: 20 000, 64 dimensions, drawn around 1462 centres of Zipf sizes; tangent vectors of length
0.3 to 2.5 with noise of length 0.3, expmap0, c = 1. 1462 clusters.

assignment: nearest_centroids of all points. Plain: geoopt's dist, all centroids broadcast against
    16 points at a time, then argmin; measured on a sample of the points (the count is printed) and
    scaled to all. The same dtype on both sides. Labels are compared on the sample; where they
    differ, in float32, both choices are measured in float64: see the line.
lloyd: an iteration of hyperbolic_kmeans (assignment, objective, repair, centroids): the time of
    some more iterations, divided by their number, from the same centroids. Plain: scikit-learn's
    KMeans (Euclidean, elkan off), in the same way, on the same points and dtype. The goal is for
    "lorentz" in float32: at most 3 times as long. Seeding, greedy k-means++, is timed apart:
    hyperbolic_kmeans' of a sample of at most 64 points a cluster, scikit-learn's of all points.
million: the peak of the resident memory of a fresh process (VmHWM; libraries and the points, 512
    MB, count) that clusters 1 000 000 points of float64 with both kinds of centroids: seeding and
    few iterations; more would take time, not memory. Goal: at most 4 GB.

Every round calls both sides in turn. On one thread times are medians of CPU time; on several they
are the shortest wall times, since other work on the machine only adds to those. The exit status is
1 if results differ or a goal is missed.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import geoopt
import torch
from measuring import Report, measure, memory_of_process
from sklearn.cluster import KMeans, kmeans_plusplus
from threadpoolctl import threadpool_limits
from torch import Tensor

import unseg.geometry as library
from unseg.compat import cpu_name
from unseg.geometry.seeding import POINTS_PER_CLUSTER, seed_centroids

ASSIGNMENT_GOAL = 80.0
LLOYD_GOAL = 3.0  # scikit-learn's iterations
MEMORY_GOAL = 4.0  # GB
DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Sizes:
    """How much is done; the defaults are what the goals are about."""

    rounds: int = 5
    points: int = 20_000
    dim: int = 64
    clusters: int = 1462
    sample: int = 400
    iterations: int = 10
    seeding_rounds: int = 1
    million: int = 1_000_000


QUICK = Sizes(rounds=1, points=600, dim=8, clusters=20, sample=64, iterations=2, million=2000)


def draw_points(sizes: Sizes, count: int) -> Tensor:
    """(count, D) float64 in the ball of c = 1; see the top."""
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    centers = torch.nn.functional.normalize(torch.randn(sizes.clusters, sizes.dim, **options))
    centers *= 0.3 + 2.2 * torch.rand(sizes.clusters, 1, **options)
    zipf = 1 / torch.arange(1, sizes.clusters + 1, dtype=torch.float64)
    points = torch.randn(count, sizes.dim, **options).mul_(0.3 / sizes.dim**0.5)
    points += centers[torch.multinomial(zipf, count, replacement=True, generator=generator)]
    norms = points.norm(dim=1, keepdim=True)
    return points.mul_(torch.tanh(norms) / norms)


def broadcast_nearest(ball: geoopt.PoincareBall, x: Tensor, centroids: Tensor) -> Tensor:
    """Labels (n,) from geoopt's dist of all pairs."""
    parts = [ball.dist(part[:, None], centroids).argmin(1) for part in x.split(16)]
    return torch.cat(parts)


# Assignment.


def run_assignment(report: Report, sizes: Sizes) -> None:
    exact = draw_points(sizes, sizes.points)
    start = library.hyperbolic_kmeans(
        exact, sizes.clusters, init=exact[: sizes.clusters].clone(), max_iter=1
    )
    chosen = torch.linspace(0, sizes.points - 1, sizes.sample).long()
    report.write(f"assignment: {sizes.points} points, {sizes.dim} dimensions, ")
    report.write(f"{sizes.clusters} centroids; plain: geoopt's dist of {sizes.sample} points\n")
    for dtype in DTYPES:
        x, centroids = exact.to(dtype), start.centroids
        ball = geoopt.PoincareBall(c=torch.tensor(1.0, dtype=dtype))
        rounded = centroids.to(dtype)
        calls = {
            "plain": lambda ball=ball, x=x, y=rounded: broadcast_nearest(ball, x[chosen], y),
            "unseg": lambda x=x, y=centroids: library.nearest_centroids(x, y, 1.0),
        }
        times = measure(calls, sizes.rounds)
        plain = times["plain"] / sizes.sample * sizes.points
        title = str(dtype).removeprefix("torch.")
        report.compare(title, plain / 1e3, times["unseg"] / 1e3, "s  ", ASSIGNMENT_GOAL)
        labels, distances = calls["unseg"]()
        compare_labels(report, x[chosen], centroids, calls["plain"](), labels[chosen])
        error = (distances[chosen] - true_distance(x[chosen], centroids, labels[chosen])).abs()
        text = f"distances as geoopt's in float64, difference {float(error.max()):.1e}, at most"
        report.write(f"            {report.check(bool(error.max() <= 1e-8), f'{text} 1e-08')}\n")


def true_distance(x: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    ball = geoopt.PoincareBall(c=torch.tensor(1.0, dtype=torch.float64))
    return ball.dist(x.double(), centroids[labels])


def compare_labels(report: Report, x: Tensor, y: Tensor, plain: Tensor, labels: Tensor) -> None:
    """A label counts as wrong unless equal, or strictly nearer in float64."""
    differ = (plain != labels).nonzero()[:, 0]
    nearer = true_distance(x, y, labels) < true_distance(x, y, plain)
    ok = bool(nearer[differ].all())
    text = f"labels: {len(x) - len(differ)} of {len(x)} equal"
    if len(differ):
        text += f"; in float64 unseg's are nearer at {int(nearer[differ].sum())} of the others:"
    report.write(f"            {report.check(ok, text)}\n")


# Iterations.


def ours(x: Tensor, init: Tensor, iterations: int, centroid: str) -> Callable[[], int]:
    def call() -> int:
        return library.hyperbolic_kmeans(
            x, len(init), init=init, max_iter=iterations, tol=0, centroid=centroid
        ).n_iter

    return call


def scikit(x: Tensor, init: Tensor, iterations: int) -> Callable[[], int]:
    points, start = x.numpy(), init.to(x.dtype).numpy()

    def call() -> int:
        model = KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0)
        return model.fit(points).n_iter_

    return call


def iteration_times(pairs: dict[str, tuple[Callable, Callable]], rounds: int) -> dict[str, float]:
    """Seconds an iteration, of a short and a long call by name."""
    calls = {(name, i): call for name, pair in pairs.items() for i, call in enumerate(pair)}
    counts = {key: call() for key, call in calls.items()}
    times = measure(calls, rounds)
    return {
        name: (times[name, 1] - times[name, 0]) / max(1, counts[name, 1] - counts[name, 0]) / 1e3
        for name in pairs
    }


def run_lloyd(report: Report, sizes: Sizes) -> None:
    exact = draw_points(sizes, sizes.points)
    init = exact[: sizes.clusters].clone()
    long = 1 + sizes.iterations
    report.write(f"lloyd: an iteration of {sizes.points} points, {sizes.dim} dimensions, ")
    report.write(f"{sizes.clusters} clusters; plain: scikit-learn, Euclidean\n")
    for dtype in DTYPES:
        x = exact.to(dtype)
        pairs = {
            "plain": (scikit(x, init, 1), scikit(x, init, long)),
            "lorentz": (ours(x, init, 1, "lorentz"), ours(x, init, long, "lorentz")),
            "frechet": (ours(x, init, 1, "frechet"), ours(x, init, long, "frechet")),
        }
        times = iteration_times(pairs, sizes.rounds)
        for name in ("lorentz", "frechet"):
            ratio = times[name] / times["plain"]
            note = ""
            if report.goals and name == "lorentz" and dtype == torch.float32:
                note = report.check(0 < ratio <= LLOYD_GOAL, f"goal at most {LLOYD_GOAL:g}x")
            title = f"{str(dtype).removeprefix('torch.')} {name}"
            report.write(f"  {title:16} plain{1e3 * times['plain']:9.1f} ms")
            report.write(f"   unseg{1e3 * times[name]:9.1f} ms   {ratio:.2f} as long   {note}\n")


def run_seeding(report: Report, sizes: Sizes) -> None:
    sample = min(sizes.points, POINTS_PER_CLUSTER * sizes.clusters)
    report.write(f"seeding: {sizes.clusters} of {sample} points, greedy; plain: scikit-learn\n")
    for dtype in DTYPES:
        x = draw_points(sizes, sample).to(dtype)
        k, points = sizes.clusters, x.numpy()

        def unseg(x: Tensor = x, k: int = k) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            return seed_centroids(x, k, 1.0, "lorentz", generator)

        calls = {
            "plain": lambda points=points, k=k: kmeans_plusplus(points, k, random_state=0),
            "unseg": unseg,
        }
        times = measure(calls, sizes.seeding_rounds)
        title = str(dtype).removeprefix("torch.")
        report.compare(title, times["plain"] / 1e3, times["unseg"] / 1e3, "s  ")


# Memory.


def cluster_million(sizes: Sizes) -> None:
    """Of the process that is measured: seconds and GB, of each kind of centroid."""
    x = draw_points(sizes, sizes.million)
    for centroid, iterations in (("lorentz", 2), ("frechet", 1)):
        start = time.perf_counter()
        library.hyperbolic_kmeans(x, sizes.clusters, centroid=centroid, max_iter=iterations)
        seconds = time.perf_counter() - start
        peak = memory_of_process("VmHWM") / 1e9
        sys.stdout.write(f"{centroid} {iterations} {seconds:.1f} {peak:.2f}\n")


def run_million(report: Report, sizes: Sizes, quick: bool) -> None:
    report.write(f"million: {sizes.million} points of float64, {sizes.dim} dimensions, ")
    report.write(f"{sizes.clusters} clusters, in a process of its own; wall time with seeding\n")
    command = [sys.executable, __file__, "--child", "--threads", str(torch.get_num_threads())]
    command += ["--quick"] if quick else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    for line in done.stdout.splitlines():
        centroid, iterations, seconds, peak = line.split()
        note = ""
        if report.goals:
            note = report.check(float(peak) <= MEMORY_GOAL, f"goal at most {MEMORY_GOAL:g} GB")
        report.write(
            f"  {centroid}, {iterations} iterations: {seconds} s, so far at most {peak} GB"
        )
        report.write(f"   {note}\n")


PARTS = {"assignment": run_assignment, "lloyd": run_lloyd, "seeding": run_seeding}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round, no goals")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=[*PARTS])
    parser.add_argument("--million", action="store_true", help="and the memory of a million points")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, help="default 5; seeding: 1")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the benchmark; the exit status is 1 if results differ or a goal is missed."""
    args = parse_arguments()
    sizes = QUICK if args.quick else Sizes()
    if args.rounds:
        sizes = replace(sizes, rounds=args.rounds)
    if args.child:
        torch.set_num_threads(args.threads[0])
        cluster_million(sizes)
        return 0
    report = Report(sys.stdout.write, goals=not args.quick)
    report.write(f"{cpu_name()}; torch {torch.__version__}\n")
    for threads in args.threads:
        torch.set_num_threads(threads)
        with threadpool_limits(threads):
            report.write(f"\n{threads} thread{'s' if threads > 1 else ''}, ")
            report.write(f"{'median CPU' if threads == 1 else 'shortest wall'} time\n")
            for part in args.parts:
                PARTS[part](report, sizes)
                sys.stdout.flush()
    if args.million:
        if Path("/proc/self/status").exists():
            run_million(report, sizes, args.quick)
        else:
            report.write("million: not measured, the system does not tell\n")
    report.write(f"\n{report.failures} checks failed\n")
    return int(report.failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
