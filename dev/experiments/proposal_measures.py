"""Measures one set of proposals; what proposals.py runs after each training.

    python dev/experiments/proposal_measures.py --config-file CONFIG --data NAME --write x.json
        [--masks FILE | --sliding SEED] [KEY VALUE ...]

Measured are a model's proposals (MODEL.WEIGHTS), the masks of a pseudo-mask file, or windows of the
config's DeepMask pyramid taken blindly. The data set is measured twice: as it is, and with all
objects ignored that do not touch another one. Objects touch if they share a side of a pixel
(`touching` in the records of unseg.data.datasets.synthetic).
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from report import write_whole

import unseg  # noqa: F401 (registers the data sets; before detectron2, whose import warns)

# isort: split
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger
from proposal_windows import WindowMeasure
from torch import Tensor, nn

from unseg.checkpoint import SafeCheckpointer
from unseg.config import load_config
from unseg.data import build_test_loader
from unseg.discovery import load_pseudo_masks
from unseg.evaluation import ProposalRecallEvaluator
from unseg.layers import PackedMasks, pack_masks, scaled_size
from unseg.modeling.proposals.deepmask_geometry import PatchGeometry
from unseg.modeling.proposals.pyramid import grid_windows, to_output

CAPS = (1, 10, 100, 1000)
Record = dict[str, Any]
Proposer = Callable[[], Iterator[tuple[Record, Instances]]]


# Sliding windows.


def canonical_windows(cfg: CfgNode, size: tuple[int, int], stride: int) -> Tensor:
    """All windows of the DeepMask pyramid on an image, float32 (N, 4) XYXY, scale by scale.

    Args:
        cfg: MODEL.DEEPMASK is read.
        size: (H, W) of the image.
        stride: of the map that the head reads.
    """
    geometry, boxes = PatchGeometry.from_config(cfg), []
    for scale in cfg.MODEL.DEEPMASK.TEST.SCALES:
        resized = scaled_size(size, 2**scale)
        windows = grid_windows(geometry.grid(*resized, stride), stride, 0, geometry.input_size)
        boxes.append(to_output(windows, resized, size))
    return torch.cat(boxes)


def draw_ellipses(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels whose centres are inside the ellipses that boxes (N, 4) XYXY bound: bool (N, H, W)."""
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    radii = (boxes[:, 2:] - boxes[:, :2]) / 2
    x, y = ((torch.arange(n) + 0.5)[None] for n in (size[1], size[0]))
    across = ((x - centers[:, :1]) / radii[:, :1]).square()  # (N, W)
    down = ((y - centers[:, 1:]) / radii[:, 1:]).square()
    return down[:, :, None] + across[:, None, :] <= 1


def sliding_proposals(
    cfg: CfgNode, size: tuple[int, int], stride: int, rng: np.random.Generator
) -> Instances:
    """Canonical ellipses of windows in random order, at most the largest of CAPS.

    A window's ellipse is centred in it. Both axes are as long as the longest side of the object
    that the window is made for: on unseg_synthetic_val_touching this had the highest recall of 100
    among 1:1, 5:4 and a mixture of 1:1, 5:3 and 3:5.

    Args:
        cfg, size, stride: see :func:`canonical_windows`.
        rng: of the order.
    """
    geometry = PatchGeometry.from_config(cfg)
    windows = canonical_windows(cfg, size, stride)
    windows = windows[torch.from_numpy(rng.permutation(len(windows))[: max(CAPS)])]
    margins = (windows[:, 2:] - windows[:, :2]) * (1 - geometry.object_size / geometry.input_size)
    inner = windows + torch.cat([margins, -margins], dim=1) / 2
    # In parts that the processor's caches hold.
    masks = PackedMasks.cat([pack_masks(draw_ellipses(part, size)) for part in inner.split(16)])
    masks = masks[masks.area > 0]
    return Instances(size, pred_masks=masks, scores=torch.arange(len(masks), 0, -1).float())


# Where proposals come from.


def from_sliding(cfg: CfgNode, name: str, seed: int) -> Proposer:
    """Sliding windows, in an order of their own in each image."""
    stride = build_backbone(cfg).output_shape()[cfg.MODEL.DEEPMASK.IN_FEATURE].stride

    def propose() -> Iterator[tuple[Record, Instances]]:
        for number, record in enumerate(DatasetCatalog.get(name)):
            rng = np.random.default_rng((seed, number))
            size = (record["height"], record["width"])
            yield record, sliding_proposals(cfg, size, stride, rng)

    return propose


def from_masks(path: Path, name: str) -> Proposer:
    """The masks of a pseudo-mask file, by their scores."""
    found = {record.image_id: record for record in load_pseudo_masks(path)}

    def propose() -> Iterator[tuple[Record, Instances]]:
        for record in DatasetCatalog.get(name):
            masks = found[record["image_id"]].masks
            proposals = Instances((record["height"], record["width"]))
            proposals.scores = torch.tensor([mask.score for mask in masks])
            proposals.pred_masks = [mask.rle for mask in masks]
            yield record, proposals

    return propose


def from_model(
    cfg: CfgNode,
    name: str,
    model: nn.Module,
    seconds: list[float],
    windows: WindowMeasure | None = None,
) -> Proposer:
    """A model's proposals; the time it takes for each image is appended to `seconds`."""

    def propose() -> Iterator[tuple[Record, Instances]]:
        for batch in build_test_loader(cfg, name):
            start = time.perf_counter()
            with torch.no_grad():
                outputs = model(batch)
            seconds.append(time.perf_counter() - start)
            ((record, output),) = zip(batch, outputs, strict=True)  # one by one, as in testing
            if windows is not None:
                windows.add(record["image_id"])
            proposals = output["proposals"]
            # Packed once for both evaluations.
            proposals.pred_masks = proposals.pred_masks.pack()
            yield record, proposals

    return propose


def load_model(cfg: CfgNode) -> nn.Module:
    """The model with MODEL.WEIGHTS, for inference."""
    model = build_model(cfg).eval()
    SafeCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


# Numbers.


def touching_only(name: str) -> str:
    """Register a copy of a synthetic data set in which objects that touch no other are crowds.

    Crowds count neither as objects nor against proposals.

    Returns:
        its name.
    """
    copied = f"{name}_touching_only"
    if copied not in DatasetCatalog.list():
        DatasetCatalog.register(copied, lambda: _ignore_isolated(DatasetCatalog.get(name)))
        MetadataCatalog.get(copied).set(evaluator_type="coco_class_agnostic")
    return copied


def _ignore_isolated(records: Iterable[Record]) -> list[Record]:
    return [
        record
        | {
            "annotations": [
                annotation | {"iscrowd": int(annotation["iscrowd"] or not annotation["touching"])}
                for annotation in record["annotations"]
            ]
        }
        for record in records
    ]


def measure_recall(name: str, propose: Proposer) -> dict[str, float]:
    """Recall of proposals on a data set and on its touching objects, in percent."""
    whole, touching = (
        ProposalRecallEvaluator(n, distributed=False, caps=CAPS)
        for n in (name, touching_only(name))
    )
    for record, proposals in propose():
        for evaluator in (whole, touching):
            evaluator.process([record], [{"proposals": proposals}])
    every, masks = whole.evaluate(), touching.evaluate()["segm_proposals"]
    numbers = {f"AR@{cap}": every["segm_proposals"][f"AR@{cap}"] for cap in CAPS}
    numbers["AUC"] = every["segm_proposals"]["AUC"]
    numbers["box AR@100"] = every["box_proposals_coco"]["AR@100"]
    return numbers | {f"touching AR@{cap}": masks[f"AR@{cap}"] for cap in (10, 100)}


def measure_model(cfg: CfgNode, name: str) -> dict[str, float]:
    """A model's recall, size and speed; of an InstanceFCN also its masks in positive windows."""
    model, seconds, windows = load_model(cfg), [], None
    if cfg.MODEL.META_ARCHITECTURE == "InstanceFCN":
        windows = WindowMeasure(model, name)
    numbers = measure_recall(name, from_model(cfg, name, model, seconds, windows))
    numbers["M parameters"] = sum(p.numel() for p in model.parameters()) / 1e6
    # The median: other work on the machine makes single images slow.
    numbers["ms/image"] = 1000 * statistics.median(seconds)
    return numbers | (windows.numbers() if windows is not None else {})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", type=Path, required=True)
    parser.add_argument("--data", required=True, metavar="NAME", help="a synthetic data set")
    parser.add_argument("--write", type=Path, required=True, metavar="FILE")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--masks", type=Path, metavar="FILE", help="measure these, no model")
    source.add_argument("--sliding", type=int, metavar="SEED", help="measure blind windows")
    parser.add_argument("words", nargs="*", metavar="KEY VALUE", help="for the config")
    return parser.parse_args()


def main() -> None:
    """Entry point."""
    args = parse_arguments()
    setup_logger(name="unseg")
    torch.set_num_threads(1)
    cfg = load_config(str(args.config_file), args.words)
    if args.masks:
        numbers = measure_recall(args.data, from_masks(args.masks, args.data))
    elif args.sliding is not None:
        numbers = measure_recall(args.data, from_sliding(cfg, args.data, args.sliding))
    else:
        numbers = measure_model(cfg, args.data)
    known = {key: None if math.isnan(value) else value for key, value in numbers.items()}
    write_whole(args.write, json.dumps(known, indent=1))


if __name__ == "__main__":
    main()
