"""Times spectral segmentation against a transcription of the published steps, in one run.

    python dev/benchmarks/spectral.py            grids of 900 and 3600 patches; two minutes
    python dev/benchmarks/spectral.py --affinity the BoC affinity alone; half a minute
    python dev/benchmarks/spectral.py --quick    a small grid, one round

Features are drawn (384 channels, three ellipses, two thirds of the channels noise); the backbone
is not counted. Published: spectral_published.py, with the solvers that the published code calls
(shift-invert eigsh, then eigsh with which="SM" and a dense D). Every round calls all in turn, on
one thread; times are medians of CPU time. mIoU is that of the labels with the drawn objects. Then
the BoC affinity alone, and how far the resident memory of a fresh process rises.

k-means takes a good part of the time on small grids, on both sides: its starts are as many in all
rows of a table, 10 (unseg's default, and once scikit-learn's) or 1 (scikit-learn's now).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import spectral_published as published
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import pdist
from threadpoolctl import threadpool_limits

import unseg.discovery.spectral.segmentation as library
from unseg.compat import cpu_name
from unseg.discovery.spectral import SpectralSettings
from unseg.discovery.spectral.settings import ClusterSettings, ForegroundSettings, NCRSettings
from unseg.layers import boc_affinity, has_native

OBJECTS, CHANNELS, BOC_CHANNELS = 3, 384, 60
STARTS = (10, 1)
GRIDS = ((30, 30), (45, 80))
SEGMENT_GOALS = {900: 15.0, 3600: 20.0}  # times faster than the published steps, by patches
BOC_GOALS = {"scipy pdist": 5.0, "torch.cdist": 2.0}
MEMORY_GOAL = 3.0  # float32 matrices of all pairs of patches
ORACLE = ClusterSettings(mode="oracle")
SETTINGS = {
    "quotient": SpectralSettings(clusters=ORACLE),
    "reference": SpectralSettings(
        ncr=NCRSettings(mode_foreground="reference_fg"),
        foreground=ForegroundSettings(area="polygon"),
        clusters=ORACLE,
        background="reference",
        split_components=False,
        min_area=0.0,
    ),
    "auto-K": SpectralSettings(),
}
# Functions whose times make the tables of stages.
STAGES = {
    library: (
        "patch_rows",
        "_ncr_channels",
        "fiedler_vector",
        "clean_mask",
        "_instance_features",
        "foreground_graph",
        "_embed",
        "_cluster",
        "_by_score",
        "_mean_features",
    ),
    published: (
        "full_histogram_channels",
        "foreground_vector",
        "cleaned",
        "low_entropy_channels",
        "deviating_channels",
        "similarity",
        "instance_vectors",
        "clusters",
    ),
}
Write = Callable[[str], object]


def mean_iou(labels: np.ndarray, truth: np.ndarray) -> float:
    """Sum of the IoUs of the best one-to-one matching, per object of the truth."""
    found = [labels == k for k in range(1, labels.max() + 1)]
    real = [truth == k for k in range(1, truth.max() + 1)]
    iou = np.array([[np.sum(a & b) / np.sum(a | b) for a in found] for b in real])
    return float(iou[linear_sum_assignment(iou, maximize=True)].sum() / len(real)) if found else 0.0


def median_times(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU time in ms, all in turn in each round; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if round_:
                times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


@contextmanager
def stopwatches(module: object):
    """Sums up the CPU time in ms of the module's stages, without that of stages within."""
    times = dict.fromkeys(STAGES[module], 0.0)
    running: list[str] = []
    last = time.process_time()

    def split() -> None:
        nonlocal last
        now = time.process_time()
        if running:
            times[running[-1]] += 1e3 * (now - last)
        last = now

    def timed(name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            split()
            running.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                split()
                running.pop()

        return call

    with patch.multiple(module, **{n: timed(n, getattr(module, n)) for n in times}):
        yield times


def stages(module: object, call: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median ms of each stage of a call."""
    seen = []
    for _ in range(rounds):
        with stopwatches(module) as times:
            call()
        seen.append(dict(times))
    return {name: statistics.median(s[name] for s in seen) for name in seen[0]}


def verdict(ratio: float, goal: float | None) -> tuple[str, int]:
    if goal is None:
        return "", 0
    return f"goal {goal:.3g}x {'met' if ratio >= goal else 'NOT MET'}", int(ratio < goal)


def segmentation(grid: tuple[int, int], rounds: int, write: Write) -> int:
    """Tables of one grid; the number of goals missed."""
    features, truth = published.structured_map(*grid, OBJECTS, CHANNELS, seed=0)
    tensor = torch.from_numpy(features)
    patches = grid[0] * grid[1]
    missed = 0
    for starts in STARTS:
        calls = {
            "published": lambda n=starts: (
                published.segment_published(features, OBJECTS, starts=n).labels
            )
        }
        for name, settings in SETTINGS.items():
            clusters = replace(settings.clusters, num_init=starts)
            settings = replace(settings, clusters=clusters)
            calls[name] = lambda s=settings: library.segment(tensor, s, OBJECTS).labels.numpy()
        quality = {name: mean_iou(call(), truth) for name, call in calls.items()}
        times = median_times(calls, rounds)
        write(f"\n{patches} patches ({grid[0]} x {grid[1]}), {CHANNELS} channels, ")
        write(f"k-means with {starts} start{'s' if starts > 1 else ''}\n")
        for name, value in times.items():
            ratio = times["published"] / value
            goal = SEGMENT_GOALS.get(patches) if name in ("quotient", "reference") else None
            note, failed = verdict(ratio, goal)
            missed += failed
            write(f"  {name:12}{value:10.1f} ms{ratio:8.1f}x   mIoU {quality[name]:.2f}   {note}\n")
    for module, name in ((library, "quotient"), (published, "published")):
        write(f"  {name} by stages, ms: ")
        parts = stages(module, calls[name], rounds)
        write(", ".join(f"{part.strip('_')} {value:.1f}" for part, value in parts.items()) + "\n")
    return missed


def affinity(patches: int, rounds: int, write: Write) -> int:
    """The BoC affinity against the distances it is made of; the number of goals missed."""
    rows = np.random.default_rng(0).normal(size=(patches, BOC_CHANNELS))
    x = torch.from_numpy(published.normalized(rows)).float()
    doubles = x.double().numpy()
    times = median_times(
        {
            "boc_affinity": lambda: boc_affinity(x),
            "scipy pdist": lambda: (pdist(doubles, "braycurtis"), pdist(doubles, "chebyshev")),
            "torch.cdist": lambda: (
                torch.cdist(x, x, p=1.0),
                torch.cdist(x, -x, p=1.0),
                torch.cdist(x, x, p=torch.inf),
            ),
        },
        rounds,
    )
    write(f"BoC of {patches} rows of {BOC_CHANNELS} channels")
    write(f"{'' if has_native() else ' (not compiled)'}: {times['boc_affinity']:.1f} ms\n")
    missed = 0
    for name, goal in BOC_GOALS.items():
        ratio = times[name] / times["boc_affinity"]
        applies = has_native() and patches in SEGMENT_GOALS
        note, failed = verdict(ratio, goal if applies else None)
        missed += failed
        write(f"  {name:12}{times[name]:10.1f} ms{ratio:8.1f}x   {note}\n")
    return missed


def status_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def extra_memory(grid: tuple[int, int]) -> dict[str, float]:
    """How far the peak of this process's resident memory rises, in matrices of all pairs.

    Smaller calls come first, so that libraries and their buffers are there already. Writing 5 to
    clear_refs sets the peak back to what is resident now.
    """
    small = torch.from_numpy(published.structured_map(20, 20, OBJECTS, CHANNELS, seed=1)[0])
    features = torch.from_numpy(published.structured_map(*grid, OBJECTS, CHANNELS, seed=0)[0])
    matrix = 4 * (grid[0] * grid[1]) ** 2 / 1024
    risen = {}
    for name in ("quotient", "reference"):
        library.segment(small, SETTINGS[name], OBJECTS)
        Path("/proc/self/clear_refs").write_text("5")
        before = status_kib("VmRSS")
        library.segment(features, SETTINGS[name], OBJECTS)
        risen[name] = (status_kib("VmHWM") - before) / matrix
    return risen


def memory(grid: tuple[int, int], write: Write) -> int:
    """:func:`extra_memory` in a process of its own; the number of goals missed."""
    if not Path("/proc/self/clear_refs").exists():
        write("\nextra memory: not measured, there is no /proc/self/clear_refs\n")
        return 0
    size = "x".join(map(str, grid))
    command = [sys.executable, __file__, "--memory-of", size]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    missed = 0
    write(f"\nextra memory at {grid[0] * grid[1]} patches, in float32 matrices of all pairs\n")
    for name, value in json.loads(result.stdout).items():
        goal = grid[0] * grid[1] in SEGMENT_GOALS
        missed += goal and value > MEMORY_GOAL
        note = (
            f"goal {MEMORY_GOAL:g} {'met' if value <= MEMORY_GOAL else 'NOT MET'}" if goal else ""
        )
        write(f"  {name:12}{value:10.2f}   {note}\n")
    return missed


def grid_size(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small grid, one round")
    parser.add_argument("--grids", type=grid_size, nargs="+", default=GRIDS, metavar="HxW")
    parser.add_argument("--rounds", type=int, default=5, help="five times as many for small grids")
    parser.add_argument("--affinity", action="store_true", help="the BoC affinity and nothing else")
    parser.add_argument("--memory-of", type=grid_size, metavar="HxW", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the benchmark; the exit status is 1 if a goal was missed."""
    args = parse_arguments()
    write = sys.stdout.write
    torch.set_num_threads(1)
    with threadpool_limits(1):
        if args.memory_of:
            write(json.dumps(extra_memory(args.memory_of)))
            return 0
        grids, rounds = (((20, 20),), 1) if args.quick else (args.grids, args.rounds)
        write(f"{cpu_name()}; torch {torch.__version__}; one thread, median CPU time\n")
        missed = 0
        for grid in grids:
            patches = grid[0] * grid[1]
            repeats = 5 * rounds if patches < 2000 and not args.quick else rounds
            if not args.affinity:
                missed += segmentation(grid, repeats, write)
            missed += affinity(patches, repeats, write)
            sys.stdout.flush()
        if not args.affinity:
            missed += memory(grids[-1], write)
    write(f"\n{missed} goals missed\n")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
