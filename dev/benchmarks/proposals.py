"""Times the parts of mask-proposal networks against what one would use without them, in one run.

    OMP_NUM_THREADS=1 python dev/benchmarks/proposals.py      all parts on one thread; some minutes
    python dev/benchmarks/proposals.py --parts assembling dense
    python dev/benchmarks/proposals.py --images 50            a shorter run of the evaluation
    python dev/benchmarks/proposals.py --quick                tiny sizes, no goals

assembling: assemble_instances for some windows of 21 x 21 cells of a 75 x 100 map, k = 5, forward
    and with the backward pass. Plain: F.unfold of all k * k maps at all places, then the choice.
    Peak is by how much the resident memory of this process grows during a call (VmHWM).
recall: average recall of 1000 mask proposals on each of 500 images of 480 x 640 with 7 objects on
    average, 28 caps from 1 to 1000, all sizes. Plain: pycocotools' COCOeval, useCats=0. Both get
    the same run lengths, in a process of the same state: COCOeval as result dicts, of which loadRes
    (areas and boxes), evaluate and accumulate are timed; ProposalRecallEvaluator as Instances, of
    which its construction, process (it packs the run lengths into bits) and evaluate are timed.
    Neither making the masks nor encoding them is. Objects and proposals are ellipses, objects in
    COCO-like boxes, three of five proposals near an object; there are 25 different images, each
    comes again and again with other scores. Once each, since it takes long.
inputs: ms an image from masks to matches, by what the masks come as: run lengths, bool tensors,
    WindowMasks of 56 x 56. For pycocotools (plain; loadRes and evaluate) the last two are encoded
    first, by unseg.structures.
dense: DeepMask (ResNet-50, random weights) on one scale of a 480 x 640 image: trunk, head, scores
    of all windows, masks of the best 1000. Plain: the same net on every window's patch of 192 x 192
    in batches of 8, measured on a sample and scaled to all windows. Border effects make the outputs
    differ, so they are not compared.
heads: mask branch of DeepMask on a VGG-A trunk, 14 x 14 cells a window: of low rank, as in the
    paper, against DeepMaskFull (plain). Masks of 100 windows of an image's map; and a training
    step's forward and backward pass on 32 patches.

Every round calls both sides in turn. On one thread times are medians of CPU time; on several they
are the shortest wall times, since other work on the machine only adds to those. The exit status is
1 if results differ or a goal is missed.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import unseg  # noqa: F401 (registers; before detectron2, whose import warns)

# isort: split
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from measuring import Report, measure, peak_bytes
from proposal_recall_speed import run_recall
from proposal_scenes import QUICK, Sizes
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from unseg.compat import cpu_name
from unseg.config import load_config
from unseg.layers import assemble_instances
from unseg.layers.assemble_instances import window_bins
from unseg.modeling.proposals.deepmask_geometry import GREY
from unseg.modeling.proposals.deepmask_heads import FullHead, PaperHead

PAD_LOGIT = -10.0
TIME_GOAL, MEMORY_GOAL = 5.0, 10.0
CONFIG = Path(__file__).resolve().parents[2] / "projects/DeepMask/configs/deepmask_R_50.yaml"


# Assembling.


def unfold_then_select(maps: Tensor, locations: Tensor, k: int, m: int) -> Tensor:
    """As assemble_instances, (N, m, m), from all windows of all maps."""
    width = maps.shape[-1]
    padded = F.pad(maps, (m // 2,) * 4, value=PAD_LOGIT)
    cells = F.unfold(padded, m).unflatten(1, (k * k, m * m))  # (B, k * k, m * m, h * w)
    bins = torch.tensor(window_bins(k, m))
    channels = (bins[:, None] * k + bins).flatten()
    image, y, x = locations.unbind(1)
    places = (y * width + x)[:, None]
    return cells[image[:, None], channels, torch.arange(m * m), places].unflatten(1, (m, m))


def assembling_calls(sizes: Sizes, count: int, backward: bool) -> dict[str, Callable]:
    """Both forms on the same maps; each returns the windows and the maps' gradient."""
    generator = torch.Generator().manual_seed(0)
    h, w = sizes.map_size
    maps = torch.randn(1, sizes.k**2, h, w, generator=generator)
    y = torch.randint(h, (count,), generator=generator)
    x = torch.randint(w, (count,), generator=generator)
    locations = torch.stack([torch.zeros_like(x), y, x], dim=1)
    weights = torch.randn(count, sizes.m, sizes.m, generator=generator)

    def call(form: Callable[..., Tensor]) -> tuple[Tensor, Tensor | None]:
        leaf = maps.detach().requires_grad_(backward)
        windows = form(leaf, locations, sizes.k, sizes.m)
        if backward:
            windows.backward(weights)
        return windows.detach(), leaf.grad

    return {"plain": lambda: call(unfold_then_select), "unseg": lambda: call(assemble_instances)}


def run_assembling(report: Report, sizes: Sizes) -> None:
    h, w = sizes.map_size
    for count in sizes.windows:
        report.write(f"assembling: {count} windows of {sizes.m} x {sizes.m} cells of a map of ")
        report.write(f"{h} x {w}, k = {sizes.k}\n")
        for backward in (False, True):
            calls = assembling_calls(sizes, count, backward)
            (expected, slope), (windows, gradient) = calls["plain"](), calls["unseg"]()
            same = torch.equal(windows, expected)
            if backward:
                same &= torch.allclose(gradient, slope, rtol=1e-4, atol=1e-5)
            times = measure(calls, sizes.rounds)
            title = "both" if backward else "forward"
            report.compare(title, times["plain"], times["unseg"], "ms ", TIME_GOAL)
            report.write(f"            {report.check(same, 'equal')}\n")


def run_assembling_memory(report: Report, sizes: Sizes) -> None:
    """Last, because returning memory to the system makes the next calls slower."""
    for count in sizes.windows:
        for backward in (False, True):
            calls = assembling_calls(sizes, count, backward)
            peaks = [peak_bytes(calls[name]) for name in ("plain", "unseg")]
            if None in peaks:
                report.write("peak memory: not measured, the system does not tell\n")
                return
            passes = "forward and backward" if backward else "forward"
            report.write(f"assembling, peak memory: {count} windows, {passes}\n")
            plain, fast = (max(peak, 4096) / 2**20 for peak in peaks)
            report.compare("peak", plain, fast, "MiB", MEMORY_GOAL)


# DeepMask.


def run_dense(report: Report, sizes: Sizes) -> None:
    model = build_model(load_config(str(CONFIG), ["MODEL.DEVICE", "cpu"])).eval()
    height, width = sizes.image_size
    generator = torch.Generator().manual_seed(0)
    image = 255 * torch.rand(3, height, width, generator=generator)
    geometry = model.geometry
    rows, columns = geometry.grid(height, width, model.stride)
    windows = rows * columns
    # Both sides see grey outside the image.
    padded = F.pad(image, geometry.padding(height, width, model.divisibility), value=GREY)
    context = F.pad(padded, (geometry.context // 2,) * 4, value=GREY)
    chosen = torch.linspace(0, windows - 1, sizes.sampled_windows).long()
    corners = [(i // columns * model.stride, i % columns * model.stride) for i in chosen.tolist()]
    side = geometry.patch_size
    patches = torch.stack([context[:, y : y + side, x : x + side] for y, x in corners])

    @torch.no_grad()
    def dense() -> Tensor:
        images = model.encode(padded[None])
        scores = images.scores[0, :rows, :columns].flatten()
        best = scores.topk(min(model.inference.topk, windows)).indices
        places = torch.stack([torch.zeros_like(best), best // columns, best % columns], dim=1)
        return model.mask_logits(images, places)

    @torch.no_grad()
    def one_by_one() -> None:
        for batch in patches.split(8):
            images = model.encode(batch, in_patches=True)
            model.mask_logits(images, F.pad(torch.arange(len(batch))[:, None], (0, 2)))

    times = measure({"plain": one_by_one, "unseg": dense}, min(sizes.rounds, 3))
    plain = times["plain"] / len(patches) * windows / 1000
    fast = times["unseg"] / 1000
    megapixels = height * width / 1e6
    report.write(f"dense: DeepMask R-50 on {height} x {width}, {windows} windows ")
    report.write(f"(plain: {times['plain'] / len(patches):.1f} ms a window, ")
    report.write(f"from a sample of {len(patches)})\n")
    report.compare("image", plain, fast, "s  ")
    report.compare("megapixel", plain / megapixels, fast / megapixels, "s  ")


def make_head(kind: type[nn.Module], sizes: Sizes) -> nn.Module:
    """With equal weights: drawing hundreds of millions takes longer than all the rest."""
    with torch.device("meta"):
        channels = sizes.head_channels
        # The paper's 1x1 layer keeps the number of channels.
        head = kind(in_channels=channels, reduce_dim=channels, cells=sizes.head_cells)
    head = head.to_empty(device="cpu")
    for parameter in head.parameters():
        nn.init.constant_(parameter, 1e-3)
    return head


def mask_step(head: nn.Module, features: Tensor, locations: Tensor, backward: bool) -> Tensor:
    with torch.set_grad_enabled(backward):
        masks = head.masks(head.encode(features), locations)
        if backward:
            masks.mean().backward()
            head.zero_grad(set_to_none=True)
    return masks.detach()


def run_heads(report: Report, sizes: Sizes) -> None:
    heads = {"plain": make_head(FullHead, sizes), "unseg": make_head(PaperHead, sizes)}
    generator = torch.Generator().manual_seed(0)
    k, channels = sizes.head_cells, sizes.head_channels
    rows, columns = (side // 16 + 1 for side in sizes.image_size)
    image = torch.rand(1, channels, rows + k - 1, columns + k - 1, generator=generator)
    patches = torch.rand(sizes.head_patches, channels, k, k, generator=generator)
    best = torch.randperm(rows * columns, generator=generator)[: sizes.head_windows]
    of_image = torch.stack([torch.zeros_like(best), best // columns, best % columns], dim=1)
    of_patches = F.pad(torch.arange(len(patches))[:, None], (0, 2))
    report.write(f"heads: {k} x {k} cells of {channels} channels; plain is Full, unseg low-rank\n")
    branches = {
        name: sum(p.numel() for module in head.mask_branch() for p in module.parameters())
        for name, head in heads.items()
    }
    report.compare("weights", branches["plain"] / 1e6, branches["unseg"] / 1e6, "M  ")
    for title, inputs in (
        (
            f"masks of {len(best)} windows, with the 1x1 layer on the whole map",
            (image, of_image, False),
        ),
        (f"forward and backward of {len(patches)} patches", (patches, of_patches, True)),
    ):
        calls = {name: lambda h=head, x=inputs: mask_step(h, *x) for name, head in heads.items()}
        times = measure(calls, min(sizes.rounds, 3))
        report.write(f"  {title}\n")
        report.compare("time", times["plain"], times["unseg"], "ms ")


PARTS = {
    "assembling": run_assembling,
    "recall": run_recall,
    "dense": run_dense,
    "heads": run_heads,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round, no goals")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, help="default 5; fewer of what takes long")
    parser.add_argument("--images", type=int, help="of the evaluation; default 500")
    return parser.parse_args()


def main() -> int:
    """Run the benchmark; the exit status is 1 if results differ or a goal is missed."""
    args = parse_arguments()
    sizes = QUICK if args.quick else Sizes()
    if args.rounds:
        sizes = replace(sizes, rounds=args.rounds)
    if args.images:
        sizes = replace(sizes, images=args.images, scenes=min(sizes.scenes, args.images))
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
    if "assembling" in args.parts:
        report.write("\n")
        run_assembling_memory(report, sizes)
    report.write(f"\n{report.failures} checks failed\n")
    return int(report.failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
