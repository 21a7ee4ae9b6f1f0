"""Times one training step of FreeSOLO by its parts: backbone, heads, targets, losses.

    python dev/benchmarks/freesolo_step.py       freesolo_R_50.yaml, 256 x 384, 1 thread; 3 minutes
    python dev/benchmarks/freesolo_step.py --size 800 1216 --images 4 --threads 2
    python dev/benchmarks/freesolo_step.py --config-file CONFIG KEY VALUE ...

The step is cut where one part hands tensors to the next, so that each part has its own backward
pass. Images are noise with a few ellipses for objects; copy-paste is counted, the mapper is not.
On one thread times are medians of CPU time; on several they are the shortest wall times.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from threadpoolctl import threadpool_limits
from torch import Tensor

from unseg.compat import cpu_name
from unseg.config import load_config
from unseg.modeling import FreeSOLO
from unseg.modeling.solo.criterion import Predictions, flatten_levels, freesolo_losses

CONFIG = Path(__file__).resolve().parents[2] / "projects/FreeSOLO/configs/freesolo_R_50.yaml"


def sample(size: tuple[int, int], objects: int, dim: int) -> dict:
    """Model input: noise, and ellipses of several sizes."""
    height, width = size
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    center = torch.rand(2, objects, 1, 1) * torch.tensor(size)[:, None, None, None]
    radius = torch.logspace(-1.3, -0.4, objects)[:, None, None] * min(size)
    masks = BitMasks((y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2)
    return {
        "image": torch.randint(256, (3, *size), dtype=torch.uint8),
        "strong_image": torch.randint(256, (3, *size), dtype=torch.uint8),
        "instances": Instances(
            size,
            gt_masks=masks,
            gt_boxes=Boxes(masks.get_bounding_boxes().tensor),
            gt_embeddings=torch.randn(objects, dim),
        ),
    }


class Stopwatch:
    """Sums the time of each part of a step."""

    def __init__(self):
        single = torch.get_num_threads() == 1
        self.clock = time.process_time if single else time.perf_counter
        self.times: dict[str, float] = {}

    def __call__(self, part: str, function: Callable[[], object]) -> object:
        start = self.clock()
        result = function()
        self.times[part] = self.times.get(part, 0) + 1e3 * (self.clock() - start)
        return result


def cut(tensors: list[Tensor]) -> list[Tensor]:
    """The same values as leaves of a graph of their own."""
    return [x.detach().requires_grad_() for x in tensors]


def backward(tensors: list[Tensor], leaves: list[Tensor]) -> None:
    """Hand the gradients of the leaves on to what they were cut from."""
    used = [(x, leaf.grad) for x, leaf in zip(tensors, leaves) if leaf.grad is not None]
    torch.autograd.backward(*zip(*used))


def step(model: FreeSOLO, batch: list[dict]) -> dict[str, float]:
    """ms of each part of a training step."""
    watch = Stopwatch()
    images, instances, bottoms = watch("copy-paste", lambda: model._training_views(batch))
    raw = ImageList.from_tensors(images, model.divisibility)
    normalized = (raw.tensor - model.pixel_mean) / model.pixel_std
    features = watch("backbone, forward", lambda: model.backbone(normalized))
    names, maps = list(features), list(features.values())
    leaves = cut(maps)
    inputs = dict(zip(names, leaves))
    levels = watch("instance head, forward", lambda: model.ins_head(inputs, raw.tensor.shape[-2:]))
    masks = watch("mask head, forward", lambda: model.mask_head(inputs))
    outputs = [flatten_levels(x) for x in levels]
    head_leaves, (mask_leaf,) = cut(outputs), cut([masks])
    targets = watch("targets", lambda: model._targets(raw, instances, bottoms, masks.shape[-2:]))
    predictions = Predictions(*head_leaves, mask_leaf)
    count = len(model.grid.num_grids)
    losses = watch(
        "losses, forward", lambda: freesolo_losses(predictions, targets, count, model.losses)
    )
    watch("losses, backward", lambda: sum(losses.values()).backward())
    watch("mask head, backward", lambda: backward([masks], [mask_leaf]))
    watch("instance head, backward", lambda: backward(outputs, head_leaves))
    watch("backbone, backward", lambda: backward(maps, leaves))
    return watch.times | {"pairs": len(targets.pairs)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default=str(CONFIG))
    parser.add_argument("--size", type=int, nargs=2, default=(256, 384), metavar=("H", "W"))
    parser.add_argument("--images", type=int, default=2, help="without their second views")
    parser.add_argument("--objects", type=int, default=6, help="of each image")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE ...")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    args = parse_arguments()
    cfg = load_config(args.config_file, ["MODEL.DEVICE", "cpu", *args.opts])
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    write = sys.stdout.write
    with threadpool_limits(args.threads):
        model = build_model(cfg).train()
        dim = cfg.MODEL.FREESOLO.EMB_DIM
        batch = [sample(tuple(args.size), args.objects, dim) for _ in range(args.images)]
        steps = []
        for _ in range(args.rounds + 1):
            torch.manual_seed(1)
            steps.append(step(model, batch))
            model.zero_grad()
    views = args.images * (2 if model.append_weak_view else 1)
    write(f"{cpu_name()}; torch {torch.__version__}; {Path(args.config_file).name}\n")
    write(f"{views} views of {args.size[0]} x {args.size[1]}, {steps[0].pop('pairs')} pairs, ")
    write(f"{args.threads} thread{'s' if args.threads > 1 else ''}, ")
    write(f"{'median CPU' if args.threads == 1 else 'shortest wall'} time\n")
    typical = statistics.median if args.threads == 1 else min
    times = {part: typical([s[part] for s in steps[1:]]) for part in steps[0]}
    total = sum(times.values())
    for part, value in times.items():
        write(f"  {part:25}{value:10.1f} ms{value / total:8.1%}\n")
    write(f"  {'all':25}{total:10.1f} ms\n")


if __name__ == "__main__":
    main()
