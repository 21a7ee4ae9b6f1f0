"""Times unseg's mask ops against what one would use without them, in one interleaved run.

Every round calls all implementations one after the other, so each finds the caches as its
predecessors left them, and all times include what it takes from dense bool masks to the result:
packing for unseg, the conversion to float for PyTorch and supervision, encoding for run lengths
(whose Fortran-ordered input is prepared beforehand). On one thread times are medians of CPU time;
on several they are the shortest wall times, since other work on the machine only adds to those.

    python dev/benchmarks/mask_ops.py            all sizes, on one thread and two; some minutes
    python dev/benchmarks/mask_ops.py --quick    the two small sizes, few rounds
    UNSEG_MASK_ISA=avx2 python dev/benchmarks/mask_ops.py     as on an older processor
    UNSEG_NO_EXT=1 python dev/benchmarks/mask_ops.py          the plain PyTorch path

Peers, left out if not installed: PyTorch (the float32 product of SOLO and its matrix NMS),
pycocotools' run lengths, supervision.
"""

import argparse
import gc
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from unseg.layers import backend, has_native, mask_iou, mask_nms, matrix_nms, pack_masks

try:
    from pycocotools import mask as coco_mask
except ImportError:
    coco_mask = None
try:
    from supervision.detection.utils.iou_and_nms import (
        mask_iou_batch,
        mask_non_max_suppression,
    )
except ImportError:
    mask_iou_batch = None

Size = tuple[int, int, int]
Calls = dict[str, Callable[[], object]]
MEDIUM, FREESOLO, MANY, LARGE = (500, 200, 336), (1378, 25, 42), (2000, 200, 336), (1000, 480, 640)
SIZES: tuple[Size, ...] = (MEDIUM, FREESOLO, MANY, LARGE)
THRESHOLD = 0.5
# Factors that the compiled ops shall reach: (operation, peer) at each size.
GOALS: dict[Size, dict[tuple[str, str], float]] = {
    MEDIUM: {
        ("matrix", "torch"): 100,
        ("greedy", "supervision"): 100,
        ("greedy", "rle"): 15,
        ("iou", "torch"): 80,
    },
    FREESOLO: {("matrix", "torch"): 12, ("greedy", "supervision"): 50, ("iou", "torch"): 10},
    LARGE: {("matrix", "torch"): 100, ("greedy", "rle"): 8},
}
GOALS[MANY] = GOALS[MEDIUM]
PACK_GOAL = 2.0  # packing takes at most so many times a cold read of the masks
PLAIN_GOAL = 1 / 1.1  # and plain PyTorch is hardly slower than the peer


@dataclass
class Row:
    """Times of one operation at one size, in ms per call."""

    operation: str
    ours: float
    peers: dict[str, float] = field(default_factory=dict)


def scene(size: Size, seed: int = 0, objects: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Jittered ellipses around a few objects: many near duplicates, as a mask head gives them.

    Returns:
        masks bool (N, H, W), scores (N,), labels (N,), the object that each mask belongs to.
    """
    count, height, width = size
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    center = rng.uniform(0, (height, width), (objects, 2))
    area = np.exp(rng.uniform(np.log(0.003), np.log(0.35), objects)) * height * width
    aspect = np.exp(rng.uniform(-0.7, 0.7, objects))
    labels = rng.integers(0, objects, count)
    masks = np.empty((count, height, width), bool)
    for n, k in enumerate(labels):
        radius = np.sqrt(area[k] / np.pi * np.array([1 / aspect[k], aspect[k]]))
        radius = radius * rng.uniform(0.8, 1.25, 2)
        cy, cx = center[k] + rng.normal(0, 0.15, 2) * radius
        masks[n] = ((y - cy) / radius[0]) ** 2 + ((x - cx) / radius[1]) ** 2 <= 1
    scores = torch.from_numpy(rng.random(count, dtype=np.float32))
    return torch.from_numpy(masks), scores, torch.from_numpy(labels)


def torch_iou(masks: Tensor) -> Tensor:
    flat = masks.flatten(1).float()
    inter = flat @ flat.t()
    area = flat.sum(1)
    return inter / (area[:, None] + area[None, :] - inter)


def torch_matrix_nms(masks: Tensor, scores: Tensor, sigma: float = 2.0) -> Tensor:
    """The formula of SOLOv2 (one class, Gaussian) written out on N x N matrices."""
    order = scores.argsort(descending=True)
    flat = masks[order].flatten(1).float()
    inter = flat @ flat.t()
    area = flat.sum(1).expand(len(flat), -1)
    iou = (inter / (area + area.t() - inter)).triu(1)
    worst = iou.amax(0).expand(len(flat), -1).t()
    decay = (torch.exp(-sigma * iou**2) / torch.exp(-sigma * worst**2)).amin(0)
    out = torch.empty_like(scores)
    out[order] = scores[order] * decay
    return out


def rle_iou(fortran: np.ndarray) -> np.ndarray:
    encoded = coco_mask.encode(fortran)
    return coco_mask.iou(encoded, encoded, [0] * len(encoded))


def rle_nms(fortran: np.ndarray, scores: np.ndarray) -> list[int]:
    iou = rle_iou(fortran)
    dropped = np.zeros(len(iou), bool)
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        if not dropped[i]:
            kept.append(int(i))
            dropped |= iou[i] > THRESHOLD
    return kept


def implementations(masks: Tensor, scores: Tensor) -> dict[str, Calls]:
    """Operation -> name -> call; "unseg" comes first."""
    calls: dict[str, Calls] = {
        "iou": {"unseg": lambda: mask_iou(masks), "torch": lambda: torch_iou(masks)},
        "greedy": {"unseg": lambda: mask_nms(masks, scores, THRESHOLD)},
        "matrix": {
            "unseg": lambda: matrix_nms(masks, scores),
            "torch": lambda: torch_matrix_nms(masks, scores),
        },
    }
    array, values = masks.numpy(), scores.numpy()
    if coco_mask is not None:
        fortran = np.asfortranarray(array.transpose(1, 2, 0).astype(np.uint8))
        calls["iou"]["rle"] = lambda: rle_iou(fortran)
        calls["greedy"]["rle"] = lambda: rle_nms(fortran, values)
    # It resizes masks above 640 pixels and takes many gigabytes there: not at the largest size.
    if mask_iou_batch is not None and masks[0].numel() < 200_000:
        predictions = np.zeros((len(values), 5), np.float64)
        predictions[:, 4] = values
        calls["iou"]["supervision"] = lambda: mask_iou_batch(array, array)
        calls["greedy"]["supervision"] = lambda: mask_non_max_suppression(
            predictions, array, THRESHOLD
        )
    return calls


def clock(threads: int) -> float:
    return time.process_time() if threads == 1 else time.perf_counter()


def typical(times: list[float], threads: int) -> float:
    return statistics.median(times) if threads == 1 else min(times)


def measure(calls: dict[str, Calls], rounds: int, threads: int) -> list[Row]:
    """Typical times, all implementations in turn in each round; the first round does not count."""
    times: dict[tuple[str, str], list[float]] = {}
    gc.collect()
    gc.disable()
    for round_ in range(rounds + 1):
        for operation, choices in calls.items():
            for name, call in choices.items():
                start = clock(threads)
                result = call()
                elapsed = clock(threads) - start
                del result
                if round_:
                    times.setdefault((operation, name), []).append(1e3 * elapsed)
    gc.enable()
    rows = []
    for operation, choices in calls.items():
        all_times = {name: typical(times[operation, name], threads) for name in choices}
        rows.append(Row(operation, all_times.pop("unseg"), all_times))
    return rows


def measure_packing(masks: Tensor, rounds: int, threads: int) -> tuple[float, float]:
    """Typical ms of packing and of a plain read, each after other data went through the caches."""
    other = torch.zeros(1 << 26, dtype=torch.int32)
    words = masks.flatten()[: masks.numel() // 8 * 8].view(torch.int64)
    choices = {"pack": lambda: pack_masks(masks), "read": lambda: words.sum()}
    times: dict[str, list[float]] = {name: [] for name in choices}
    for _ in range(rounds):
        for name, call in choices.items():
            other.add_(1)
            start = clock(threads)
            call()
            times[name].append(1e3 * (clock(threads) - start))
    return typical(times["pack"], threads), typical(times["read"], threads)


def verdict(ratio: float, goal: float) -> str:
    return f"goal {goal:.3g}x {'met' if ratio >= goal else 'NOT MET'}"


def goal_for(size: Size, operation: str, peer: str) -> float | None:
    """What this build shall reach: all of it, half for AVX2, parity for plain PyTorch."""
    if not has_native():
        return PLAIN_GOAL if peer == "torch" else None
    full = GOALS.get(size, {}).get((operation, peer))
    if full is None or backend() == "avx512":
        return full
    return full / 2 if backend() == "avx2" else None


def report(size: Size, rows: list[Row], write: Callable[[str], object]) -> int:
    """Writes a table; the number of goals missed."""
    missed = 0
    for row in rows:
        for peer, time_ms in row.peers.items():
            ratio = time_ms / row.ours
            goal = goal_for(size, row.operation, peer)
            note = "" if goal is None else verdict(ratio, goal)
            missed += goal is not None and ratio < goal
            write(
                f"  {row.operation:8}{row.ours:10.2f} ms   {peer:12}{time_ms:10.1f} ms"
                f"{ratio:9.1f}x   {note}\n"
            )
    return missed


def run_size(size: Size, rounds: int, threads: int, write: Callable[[str], object]) -> int:
    masks, scores, _ = scene(size)
    share = masks.float().mean().item()
    write(f"{size[0]} masks of {size[1]} x {size[2]}, mean area {share:.1%}\n")
    packing, read = measure_packing(masks, max(rounds, 5), threads)
    missed = 0
    note = ""
    if has_native():
        missed = int(packing > PACK_GOAL * read)
        note = f"goal at most {PACK_GOAL:g}x {'NOT MET' if missed else 'met'}"
    write(f"  pack    {packing:10.2f} ms   cold read   {read:10.2f} ms")
    write(f"{packing / read:9.2f}x   {note}\n")
    rows = measure(implementations(masks, scores), rounds, threads)
    return missed + report(size, rows, write)


def run_memory(write: Callable[[str], object], count: int = 20_000) -> None:
    """Time and peak memory of the suppressions where an N x N matrix would take gigabytes."""
    masks, scores, _ = scene((count, 25, 42), objects=400)
    packed = pack_masks(masks)
    write(f"{count} masks of 25 x 42 (a float32 matrix: {count * count * 4 / 2**20:.0f} MiB)\n")
    for name, call in {
        "greedy": lambda: mask_nms(packed, scores, THRESHOLD),
        "matrix": lambda: matrix_nms(packed, scores),
    }.items():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        call()
        elapsed = time.perf_counter() - start
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        write(f"  {name:8}{1e3 * elapsed:10.1f} ms   peak memory grew by {grown / 1024:.0f} MiB\n")


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two sizes, few rounds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7, help="at the small sizes; large ones 3")
    parser.add_argument(
        "--sizes", nargs="+", metavar="NxHxW", help="instead of the four of the goals"
    )
    return parser.parse_args()


def main() -> int:
    """Run the benchmark; the exit status is 1 if a goal was missed."""
    args = parse_arguments()
    write = sys.stdout.write
    sizes: tuple[Size, ...] = (MEDIUM, FREESOLO) if args.quick else SIZES
    if args.sizes:
        sizes = tuple(tuple(int(part) for part in text.split("x")) for text in args.sizes)
    write(f"unseg on {backend()}; {processor()}; torch {torch.__version__}\n")
    if not args.quick and not args.sizes:
        run_memory(write)
    missed = 0
    for threads in args.threads:
        torch.set_num_threads(threads)
        with threadpool_limits(threads):
            write(f"\n{threads} thread{'s' if threads > 1 else ''}, ")
            write(f"{'median CPU' if threads == 1 else 'shortest wall'} time\n")
            for size in sizes:
                big = size[0] * size[1] * size[2] > 50_000_000
                rounds = 3 if big or args.quick else args.rounds
                missed += run_size(size, rounds, threads, write)
                sys.stdout.flush()
    write(f"\n{missed} goals missed\n")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
