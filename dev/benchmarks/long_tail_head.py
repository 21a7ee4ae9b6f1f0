"""What the hierarchical-embedding head adds to the inference of a Mask R-CNN, in one run.

    OMP_NUM_THREADS=1 python dev/benchmarks/long_tail_head.py           one thread; some minutes
    python dev/benchmarks/long_tail_head.py --quick                     a small model, no goal

Mask R-CNN R-50-FPN (Detectron2's settings, one mask for all classes) with random weights on an
image of 800 x 1067 pixels with 100 detections, the most that the config allows, and with 20.
Plain: StandardROIHeads; unseg: HierarchicalEmbeddingROIHeads with the same weights, default
settings. Detections are compared bit for bit. Goal: at most 15 % more.

Both are called in turn in every round. On one thread times are medians of CPU time; on several they
are the shortest wall times, since other work on the machine only adds to those. The exit status is
1 if results differ or the goal is missed.
"""

import argparse
import sys
from pathlib import Path

import unseg  # noqa: F401 (registers; before detectron2, whose import warns)

# isort: split
import torch
from detectron2.modeling import build_model
from measuring import Report, measure
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from unseg.compat import cpu_name
from unseg.config import load_config

GOAL = 15.0  # percent
DETECTIONS = (100, 20)
HEADS = {"plain": "StandardROIHeads", "unseg": "HierarchicalEmbeddingROIHeads"}
CONFIG = Path(__file__).resolve().parents[2] / "configs/Base-LongTail.yaml"
QUICK = {
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.HIERARCHICAL_EMBEDDING.CONV_DIM": 16,
}


def make_models(detections: int, quick: bool, image: Tensor) -> dict[str, nn.Module]:
    """Both models, with the same weights but for the embedding head's.

    Norms have the statistics of the image (3, H, W), without which features of random weights
    overflow and nothing is found.
    """
    models = {}
    words = ["MODEL.DEVICE", "cpu", "TEST.DETECTIONS_PER_IMAGE", detections]
    # Random weights find nothing with confidence.
    words += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RESNETS.NORM", "BN"]
    words += [word for item in QUICK.items() for word in item] if quick else []
    for name, heads in HEADS.items():
        torch.manual_seed(0)
        cfg = load_config(str(CONFIG), [*words, "MODEL.ROI_HEADS.NAME", heads])
        models[name] = build_model(cfg).eval()
    backbone = models["plain"].backbone.train()
    for part in backbone.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        backbone(models["plain"].preprocess_image([{"image": image}]).tensor)
    backbone.eval()
    state = models["plain"].state_dict()
    missing, unknown = models["unseg"].load_state_dict(state, strict=False)
    if unknown or any(not key.startswith("roi_heads.embedding_head.") for key in missing):
        raise RuntimeError(f"the models differ: {unknown}, {missing}")
    return models


def run(report: Report, detections: int, rounds: int, quick: bool) -> None:
    size = (64, 96) if quick else (800, 1067)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), generator=generator).to(torch.uint8)
    models, inputs = make_models(detections, quick, image), [{"image": image}]
    with torch.no_grad():
        found = {name: model(inputs)[0]["instances"] for name, model in models.items()}
        plain, ours = found["plain"], found["unseg"]
        equal = all(
            torch.equal(getattr(plain, field), getattr(ours, field))
            for field in ("scores", "pred_classes", "pred_masks")
        ) and torch.equal(plain.pred_boxes.tensor, ours.pred_boxes.tensor)
        calls = {name: lambda m=model: m(inputs) for name, model in models.items()}
        times = measure(calls, rounds)
    added = 100 * (times["unseg"] / times["plain"] - 1)
    report.write(f"{len(ours)} detections: {report.check(equal, 'the same detections')}\n")
    note = report.check(added <= GOAL, f"at most {GOAL:g} %") if report.goals else ""
    report.write(f"  plain{times['plain']:9.1f} ms   unseg{times['unseg']:9.1f} ms")
    report.write(f"   {added:+.1f} %   {note}\n")


def main() -> int:
    """Run the benchmark; the exit status is 1 if results differ or the goal is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small model, one round, no goal")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    report = Report(sys.stdout.write, goals=not args.quick)
    report.write(f"{cpu_name()}; torch {torch.__version__}\n")
    for threads in args.threads:
        torch.set_num_threads(threads)
        report.write(f"\n{threads} thread{'s' if threads > 1 else ''}, ")
        report.write(f"{'median CPU' if threads == 1 else 'shortest wall'} time\n")
        with threadpool_limits(threads):
            for detections in DETECTIONS:
                run(report, detections, 1 if args.quick else args.rounds, args.quick)
                sys.stdout.flush()
    report.write(f"\n{report.failures} checks failed\n")
    return int(report.failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
