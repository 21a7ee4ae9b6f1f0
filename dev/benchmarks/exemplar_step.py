"""What the exemplar contrastive head adds to a training step of FreeSOLO.

    python dev/benchmarks/exemplar_step.py           the tiny configs as they train; 1 minute
    python dev/benchmarks/exemplar_step.py --model R_50 --size 640 640 --images 1 --rounds 5

Steps (forward and backward) of FreeSOLO and Exemplar-FreeSOLO alternate in one process, with the
same weights and the same batch: noise with a few ellipses for objects. The pool is encoded apart
from the steps and timed apart, per exemplar and spread over the steps between two encodings. On one
thread times are medians of CPU time, on several the shortest wall times.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from detectron2.modeling import build_model
from freesolo_step import sample
from threadpoolctl import threadpool_limits

from unseg.compat import cpu_name
from unseg.config import load_config
from unseg.modeling import with_exemplars
from unseg.structures import Exemplar, ExemplarPool

PROJECTS = Path(__file__).resolve().parents[2] / "projects"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", choices=["tiny", "R_50", "R_101"])
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), metavar=("H", "W"))
    parser.add_argument("--images", type=int, default=4, help="without their second views")
    parser.add_argument("--objects", type=int, default=6, help="of each image")
    parser.add_argument("--exemplars", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


def make_models(name: str, exemplars: int) -> tuple[torch.nn.Module, torch.nn.Module, int]:
    """FreeSOLO, Exemplar-FreeSOLO with the same weights and a pool, steps between encodings."""
    models = []
    for folder, file in (
        ("FreeSOLO", f"freesolo_{name}.yaml"),
        ("ExemplarFreeSOLO", f"exemplar_freesolo_{name}.yaml"),
    ):
        cfg = load_config(str(PROJECTS / folder / "configs" / file), ["MODEL.DEVICE", "cpu"])
        torch.manual_seed(0)
        models.append(build_model(cfg).train())
    models[1].load_state_dict(models[0].state_dict())
    side = cfg.MODEL.EXEMPLAR.BUILD.SHORT_SIDE
    rng = np.random.default_rng(0)
    pool = ExemplarPool(
        tuple(
            Exemplar(
                rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
                np.ones((side, side), bool),
                *(f"category {i}", "", (0, 0, side, side), "whole"),
            )
            for i in range(exemplars)
        )
    )
    # Encoded by hand, apart from the steps.
    period = cfg.MODEL.EXEMPLAR.UPDATE_PERIOD
    with_exemplars(models[1], pool, update_period=10**9)
    return models[0], models[1], period


def main() -> None:
    """Run the benchmark."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    single = args.threads == 1
    clock = time.process_time if single else time.perf_counter
    write = sys.stdout.write
    with threadpool_limits(args.threads):
        plain, ours, period = make_models(args.model, args.exemplars)
        torch.manual_seed(1)
        batch = [
            sample(tuple(args.size), args.objects, plain.ins_head.emb_pred.out_channels)
            for _ in range(args.images)
        ]

        def step(model: torch.nn.Module) -> float:
            torch.manual_seed(2)
            model.zero_grad()
            start = clock()
            losses = model(batch)
            sum(losses.values()).backward()
            return 1e3 * (clock() - start)

        step(ours)  # warms up, and encodes the pool
        step(plain)
        encoder = ours.exemplars.encoder
        encoder.step = 0
        start = clock()
        encoder(ours, ())
        encoding = 1e3 * (clock() - start)
        # Random weights embed everything alike. With every second exemplar turned around all
        # objects have a positive and negatives, as after some training.
        ours.exemplars.pool_embeddings[::2] *= -1
        ours.exemplars.alpha = ours.exemplars.beta = 0.0
        ours.exemplars.tally.zero_()
        times = [(step(plain), step(ours)) for _ in range(args.rounds)]
    used = int(ours.exemplars.tally[2])
    typical = statistics.median if single else min
    before, after = (typical(column) for column in zip(*times))
    ratio = statistics.median(b / a for a, b in times)
    views = args.images * (2 if plain.append_weak_view else 1)
    write(f"{cpu_name()}; torch {torch.__version__}; {args.model}\n")
    write(f"{views} views of {args.size[0]} x {args.size[1]}, {args.threads} thread(s), ")
    write(f"{'median CPU' if single else 'shortest wall'} time of {args.rounds} rounds\n")
    write(f"  FreeSOLO           {before:9.1f} ms\n  Exemplar-FreeSOLO  {after:9.1f} ms")
    write(f"   {ratio - 1:+.1%} (median of the rounds)\n")
    write(f"  encoding {args.exemplars} exemplars {encoding:9.1f} ms, every {period} steps: ")
    write(f"{encoding / period / before:.2%} of a step\n")
    write(f"  objects that the loss was about: {used / args.rounds:.0f} a step\n")


if __name__ == "__main__":
    main()
