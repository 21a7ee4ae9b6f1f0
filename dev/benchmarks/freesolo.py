"""Times FreeSOLO's loss and targets against their plain forms, in one interleaved run.

    python dev/benchmarks/freesolo.py            on one thread; a minute
    python dev/benchmarks/freesolo.py --threads 1 2
    python dev/benchmarks/freesolo.py --quick    small sizes, few rounds, no goals

pairwise: the affinity loss of 40 masks of 200 x 304 on 4 images, forward and backward, colours
    included. "COCO-like" objects have boxes of their own, of which sqrt(area / image area) is
    log-normal (median 0.10, sigma 1.0; in COCO 0.10 and 1.0) and log(width / height) normal
    (-0.15, 0.75; in COCO -0.15 and 0.75), in uniform positions. "whole image" ones fill it, the
    worst case of computing in boxes only. The plain form is written from the formula: sigmoid, the
    8 neighbours unfolded, colour similarities repeated for each mask, -log(p q + (1 - p)(1 - q)).
edges: which neighbours have one colour, computed per image and not per mask.
targets: the grid cells of the objects of 4 images and their small masks, all objects at once and
    not in a loop.

Every round calls all forms one after the other. On one thread times are medians of CPU time; on
several they are the shortest wall times, since other work on the machine only adds to those.
Results of both forms are compared: the exit status is 1 if they differ by more than 1e-5 of the
largest value, or if a goal is missed. "Saved" is what autograd keeps for the backward pass, each
storage counted once; "peak" is by how much the process grows during the call.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from measuring import Calls, Report, draw_boxes, measure, peak_bytes
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from unseg.compat import cpu_name
from unseg.modeling.losses import (
    color_edges,
    downsample_colors,
    half_neighbourhood,
    pairwise_affinity,
)
from unseg.modeling.solo.targets import (
    GridSpec,
    Pairs,
    assign_cells,
    downsample_masks,
    make_pairs,
    mask_centers,
)

STRIDE, IMAGES, THRESHOLD, TOLERANCE = 4, 4, 0.3, 1e-5
TIME_GOAL, MEMORY_GOAL = 6.0, 10.0  # of the pairwise loss, for any boxes
GRID = GridSpec((40, 36, 24, 16, 12), ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048)), 0.2)


def draw_masks(boxes: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Ellipses that fill boxes: (count, H, W) bool."""
    y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in size), indexing="ij")
    masks = torch.zeros((len(boxes), *size), dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.tolist()):
        dx, dy = (x - (x0 + x1) / 2) / (x1 - x0), (y - (y0 + y1) / 2) / (y1 - y0)
        mask |= dx**2 + dy**2 <= 0.25
    return masks


@dataclass
class PairwiseCase:
    """Logits (P, h, w), target masks (P, h, w), their images (P,), Lab (B, 3, h, w), valid."""

    logits: Tensor
    targets: Tensor
    image: Tensor
    lab: Tensor
    valid: Tensor


def pairwise_case(count: int, size: tuple[int, int], *, whole: bool) -> PairwiseCase:
    """Smooth logits; images of patches of one colour with noise, one of them padded."""
    generator = torch.Generator().manual_seed(0)
    height, width = size

    def random(shape: tuple[int, ...], mode: str, output: tuple[int, int]) -> Tensor:
        return F.interpolate(torch.rand(shape, generator=generator), size=output, mode=mode)

    full = (height * STRIDE, width * STRIDE)
    images = 255 * random((IMAGES, 3, 8, 12), "nearest", full)
    images += 3 * torch.randn(images.shape, generator=generator)
    valid = torch.ones((IMAGES, *size), dtype=torch.bool)
    valid[:, -3:] = valid[0, :, -width // 8 :] = False
    logits = 12 * random((count, 1, height // 8, width // 8), "bilinear", size)[:, 0] - 6
    return PairwiseCase(
        logits,
        draw_masks(draw_boxes(count, size, whole=whole), size),
        torch.arange(count) * IMAGES // count,
        downsample_colors(images.clamp(0, 255), STRIDE),
        valid,
    )


Form = Callable[[Tensor, PairwiseCase], tuple[Tensor, Tensor]]


def neighbours(x: Tensor) -> Tensor:
    """(N, h, w) -> (N, 8, h, w) at dilation 2, 0 outside."""
    unfolded = F.unfold(x[:, None], 3, dilation=2, padding=2).view(len(x), 9, *x.shape[1:])
    return torch.cat([unfolded[:, :4], unfolded[:, 5:]], dim=1)


def plain_similarity(lab: Tensor, valid: Tensor) -> Tensor:
    """(N, 8, h, w) of N images."""
    n, c, h, w = lab.shape
    other = neighbours(lab.flatten(0, 1)).view(n, c, 8, h, w)
    # A sum of squares: norm(dim=1) takes many times as long.
    distance = (lab[:, :, None] - other).square().sum(dim=1).sqrt()
    return torch.exp(-0.5 * distance) * neighbours(valid.float())


def plain_pairwise(logits: Tensor, case: PairwiseCase) -> tuple[Tensor, Tensor]:
    p = logits.sigmoid()
    q = neighbours(p)
    p = p[:, None]
    loss = -(p * q + (1 - p) * (1 - q)).log()
    similarity = plain_similarity(case.lab, case.valid)[case.image]
    box = case.targets.any(dim=2)[:, :, None] & case.targets.any(dim=1)[:, None]
    weight = (similarity >= THRESHOLD).float() * box[:, None]
    return (loss * weight).sum(dim=(1, 2, 3)), weight.sum(dim=(1, 2, 3))


def fast_pairwise(logits: Tensor, case: PairwiseCase) -> tuple[Tensor, Tensor]:
    shifts = half_neighbourhood()
    edges = color_edges(case.lab, case.valid, shifts, THRESHOLD)
    return pairwise_affinity(logits, case.targets, case.image, edges, shifts)


def plain_cells(box: Tensor, mask: Tensor, size: tuple[int, int], level: int) -> list[int]:
    """Cells of an object among those of all levels, in increasing order."""
    grid, (low, high) = GRID.num_grids[level], GRID.scale_ranges[level]
    width, height = (box[2:] - box[:2]).tolist()
    if not mask.any() or not low <= math.sqrt(width * height) <= high:
        return []
    y = torch.arange(size[0], dtype=torch.float32)
    x = torch.arange(size[1], dtype=torch.float32)
    area = mask.sum()
    cx = ((mask * x).sum() / area).item()
    cy = ((mask * y[:, None]).sum() / area).item()
    offset = sum(s * s for s in GRID.num_grids[:level])
    ranges = []
    for center, side, length in ((cy, height, size[0]), (cx, width, size[1])):
        middle = math.floor(center * grid / length)
        half = side * GRID.sigma / 2
        first = max(math.floor((center - half) * grid / length), middle - 1, 0)
        last = min(math.floor((center + half) * grid / length), middle + 1, grid - 1)
        ranges.append(range(first, last + 1))
    return [offset + j * grid + i for j in ranges[0] for i in ranges[1]]


def plain_targets(boxes: list[Tensor], masks: list[Tensor]) -> tuple[list, Tensor]:
    """Rows of (image, level, cell, object), and the small mask of each."""
    size = tuple(masks[0].shape[1:])
    small_size = tuple(side // STRIDE for side in size)
    rows, small_masks, number = [], [], 0
    for image in range(len(masks)):
        for box, mask in zip(boxes[image], masks[image]):
            small = F.interpolate(mask[None, None].float(), size=small_size, mode="bilinear")
            for level in range(len(GRID.num_grids)):
                for cell in plain_cells(box, mask, size, level):
                    rows.append((image, level, cell, number))
                    small_masks.append(small[0, 0] >= 0.5)
            number += 1
    return rows, torch.stack(small_masks)


def fast_targets(boxes: list[Tensor], masks: list[Tensor]) -> tuple[Pairs, Tensor]:
    size = tuple(masks[0].shape[1:])
    small_size = tuple(side // STRIDE for side in size)
    assigned = [
        assign_cells(b, mask_centers(m), m.flatten(1).any(dim=1), size, GRID)
        for b, m in zip(boxes, masks)
    ]
    pairs = make_pairs(assigned)
    small = torch.cat([downsample_masks(m, STRIDE, small_size) for m in masks])
    return pairs, small[pairs.target]


def saved_bytes(forward: Callable[[], object]) -> int:
    """Bytes of the storages that autograd keeps while the result lives."""
    storages = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        result = forward()
    del result
    return sum(storages.values())


def difference(a: Tensor, b: Tensor) -> float:
    """Of the largest value."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


def loss_of(form: Form, case: PairwiseCase) -> tuple[Tensor, Tensor]:
    """The mean loss, and the logits that it is a function of."""
    logits = case.logits.clone().requires_grad_()
    sums, counts = form(logits, case)
    return sums.sum() / counts.sum().clamp(min=1), logits


def step_of(form: Form, case: PairwiseCase) -> tuple[Tensor, Tensor]:
    """The mean loss and the gradient of the logits."""
    value, logits = loss_of(form, case)
    value.backward()
    return value.detach(), logits.grad


def run_pairwise(report: Report, title: str, case: PairwiseCase, rounds: int) -> None:
    boxes = case.targets.any(dim=2).sum(dim=1) * case.targets.any(dim=1).sum(dim=1)
    share = boxes.float().mean() / case.targets[0].numel()
    count, height, width = case.logits.shape
    report.write(f"pairwise loss, {title}: {count} masks of {height} x {width}, ")
    report.write(f"mean box {share:.1%}\n")
    plain, fast = step_of(plain_pairwise, case), step_of(fast_pairwise, case)
    worst = max(difference(a, b) for a, b in zip(fast, plain))
    note = report.check(worst <= TOLERANCE, f"at most {TOLERANCE:g}")
    report.write(f"  loss and gradient differ by {worst:.1e} of the largest   {note}\n")
    times = measure(
        {
            "plain": lambda: step_of(plain_pairwise, case),
            "fast": lambda: step_of(fast_pairwise, case),
        },
        rounds,
    )
    report.compare("time", times["plain"], times["fast"], "ms ", TIME_GOAL)


def run_memory(report: Report, case: PairwiseCase) -> None:
    report.write("memory of the pairwise loss, whole image\n")
    forms = plain_pairwise, fast_pairwise
    saved = [saved_bytes(lambda f=f: loss_of(f, case)) / 2**20 for f in forms]
    report.compare("saved", *saved, "MiB", MEMORY_GOAL)
    peaks = [peak_bytes(lambda f=f: step_of(f, case)) for f in forms]
    if None not in peaks:
        report.compare("peak", *(peak / 2**20 for peak in peaks), "MiB")


def run_edges(report: Report, case: PairwiseCase, rounds: int) -> None:
    shifts = half_neighbourhood()
    lab, valid = case.lab[case.image], case.valid[case.image]
    calls = {
        "plain": lambda: plain_similarity(lab, valid) >= THRESHOLD,
        "mask": lambda: color_edges(lab, valid, shifts, THRESHOLD),
        "image": lambda: color_edges(case.lab, case.valid, shifts, THRESHOLD),
    }
    times = measure(calls, rounds)
    report.write(f"colour edges of {len(case.image)} masks on {len(case.lab)} images\n")
    report.compare("per mask", times["plain"], times["mask"], "ms ")
    report.compare("per image", times["plain"], times["image"], "ms ")


def run_targets(report: Report, size: tuple[int, int], objects: int, rounds: int) -> None:
    boxes, masks = [], []
    for image in range(IMAGES):
        drawn = draw_boxes(objects, size, whole=False, seed=image)
        boxes.append(torch.from_numpy(drawn).float())
        masks.append(draw_masks(drawn, size))
    report.write(f"targets of {objects} COCO-like objects on each of {IMAGES} images of ")
    report.write(f"{size[0]} x {size[1]}\n")
    calls: Calls = {
        "plain": lambda: plain_targets(boxes, masks),
        "fast": lambda: fast_targets(boxes, masks),
    }
    (rows, expected), (pairs, small) = calls["plain"](), calls["fast"]()
    found = torch.stack([pairs.image, pairs.level, pairs.cell, pairs.target], dim=1).tolist()
    same = [tuple(row) for row in found] == rows and torch.equal(small, expected)
    report.write(f"  {len(rows)} pairs   {report.check(same, 'equal')}\n")
    times = measure(calls, rounds)
    report.compare("time", times["plain"], times["fast"], "ms ")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds, no goals")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main() -> int:
    """Run the benchmark; the exit status is 1 if results differ or a goal is missed."""
    args = parse_arguments()
    report = Report(sys.stdout.write, goals=not args.quick)
    count, size, objects, rounds = (40, (200, 304), 8, args.rounds)
    if args.quick:
        count, size, objects, rounds = (8, (40, 64), 3, 1)
    image_size = (size[0] * STRIDE, size[1] * STRIDE)
    cases = {
        "COCO-like objects": pairwise_case(count, size, whole=False),
        "whole image": pairwise_case(count, size, whole=True),
    }
    report.write(f"{cpu_name()}; torch {torch.__version__}\n")
    for threads in args.threads:
        torch.set_num_threads(threads)
        with threadpool_limits(threads):
            report.write(f"\n{threads} thread{'s' if threads > 1 else ''}, ")
            report.write(f"{'median CPU' if threads == 1 else 'shortest wall'} time\n")
            for title, case in cases.items():
                run_pairwise(report, title, case, rounds)
            run_edges(report, cases["whole image"], rounds)
            run_targets(report, image_size, objects, rounds)
            sys.stdout.flush()
    # Last, because returning memory to the system makes the next calls slower.
    report.write("\n")
    run_memory(report, cases["whole image"])
    report.write(f"\n{report.failures} checks failed\n")
    return int(report.failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
