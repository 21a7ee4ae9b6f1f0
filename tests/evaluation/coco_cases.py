"""Random COCO files and results, and pycocotools' own numbers for them."""

import contextlib
import copy
import io
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from unseg.structures import WindowMasks

# 80 classes with gaps in their ids, as in COCO.
CATEGORIES = [{"id": i, "name": f"class {i}"} for i in range(1, 91) if i % 9]
KEYS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10", "AR@100", "ARs", "ARm", "ARl"]


def windows_of(masks: torch.Tensor) -> WindowMasks:
    """Rectangles (N, H, W) as windows that they fill, to the pixel."""
    boxes = []
    for mask in masks:
        y, x = mask.nonzero(as_tuple=True)
        boxes.append([int(v) for v in (x.min(), y.min(), x.max() + 1, y.max() + 1)])
    ones = torch.ones(len(masks), 2, 2)
    return WindowMasks(ones, torch.tensor(boxes).float(), masks.shape[1:], align_corners=True)


def refuse_to_paste_all(monkeypatch) -> None:
    """Make WindowMasks raise where all masks of an image would be in memory at once."""

    def refuse(self, *args, **kwargs):
        raise AssertionError("all masks are pasted at once")

    monkeypatch.setattr(WindowMasks, "tensor", property(refuse))
    monkeypatch.setattr(WindowMasks, "__array__", refuse)


def encode(mask: np.ndarray) -> dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    flat = mask.ravel(order="F").astype(bool)
    changes = np.flatnonzero(np.diff(np.concatenate(([False], flat))))
    runs = np.diff(np.concatenate(([0], changes, [flat.size])))
    return {"size": list(mask.shape), "counts": runs.tolist()}


class Maker:
    """Draws boxes and masks; coarse grids and repeated boxes make exact ties likely."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.scale = float(self.rng.choice([1, 0.1, 1 / 3]))

    def box(self, height: int, width: int) -> list[int]:
        grid = int(self.rng.choice([1, 4, 10]))
        x, y = int(self.rng.integers(0, width - 4)), int(self.rng.integers(0, height - 4))
        w, h = int(self.rng.integers(1, width - x)), int(self.rng.integers(1, height - y))
        return [x // grid * grid, y // grid * grid, max(w // grid * grid, 1), max(h, 1)]

    def mask(self, box: list[int], height: int, width: int) -> np.ndarray:
        x, y, w, h = box
        mask = np.zeros((height, width), dtype=bool)
        mask[y : y + h, x : x + w] = True
        if self.rng.random() < 0.3:
            mask &= self.rng.random(mask.shape) < 0.7
        return mask

    def segmentation(self, box: list[int], height: int, width: int) -> Any:
        """Polygons, or a compressed or an uncompressed encoding."""
        kind = self.rng.integers(3)
        if kind == 0:
            x, y, w, h = box
            return [[x, y, x + w, y, x + w, y + h, x, y + h]]
        mask = self.mask(box, height, width)
        return encode(mask) if kind == 1 else uncompressed(mask)

    def scaled(self, box: list[int]) -> list[float]:
        return [self.scale * value for value in box]


def random_case(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A COCO file's content and results: 80 classes, ties, crowds, empty images."""
    maker = Maker(seed)
    rng = maker.rng
    images, annotations, results = [], [], []
    for image_id in rng.permutation(50)[: rng.integers(1, 6)].tolist():
        height, width = rng.integers(20, 130, 2).tolist()
        images.append({"id": image_id, "height": height, "width": width})
        boxes: list[list[int]] = []
        for _ in range(rng.integers(0, 8)):
            again = boxes and rng.random() < 0.3
            box = boxes[int(rng.integers(len(boxes)))] if again else maker.box(height, width)
            boxes.append(box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.choice([c["id"] for c in CATEGORIES])),
                    "bbox": maker.scaled(box),
                    "area": float(rng.choice([box[2] * box[3], 1024, 9216, 500.5])),
                    "iscrowd": int(rng.random() < 0.2),
                    "segmentation": maker.segmentation(box, height, width),
                }
            )
        for _ in range(rng.integers(0, 25)):
            near = boxes and rng.random() < 0.6
            box = list(boxes[int(rng.integers(len(boxes)))]) if near else maker.box(height, width)
            if rng.random() < 0.4:
                box[2] = max(1, box[2] // 2)
            tied = rng.random() < 0.5
            results.append(
                {
                    "image_id": image_id,
                    "category_id": int(rng.choice([c["id"] for c in CATEGORIES])),
                    "bbox": maker.scaled(box),
                    "segmentation": encode(maker.mask(box, height, width)),
                    "score": float(rng.integers(0, 5)) / 4 if tied else float(rng.normal()),
                }
            )
    content = {"info": {}, "images": images, "annotations": annotations, "categories": CATEGORIES}
    return content, results


def official(
    coco_gt: dict[str, Any], results: list[dict[str, Any]], task: str, use_cats: int = 0
) -> dict[str, float]:
    """The twelve numbers of pycocotools, times 100; NaN where it says -1."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(coco_gt)
        coco.createIndex()
        keep = {"bbox": "segmentation", "segm": "bbox"}[task]
        detections = [{k: v for k, v in r.items() if k != keep} for r in copy.deepcopy(results)]
        evaluation = COCOeval(coco, coco.loadRes(detections), task)
        evaluation.params.useCats = use_cats
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {k: 100 * v if v > -1 else float("nan") for k, v in zip(KEYS, evaluation.stats)}


def official_recall(
    coco_gt: dict[str, Any], results: list[dict[str, Any]], task: str, caps: list[int]
) -> np.ndarray:
    """pycocotools' recall averaged over thresholds, (4 sizes, caps) in [0, 1]; NaN where -1."""
    if not results:  # which loadRes refuses
        image = coco_gt["images"][0]
        empty = encode(np.zeros((image["height"], image["width"])))
        results = [
            {"image_id": image["id"], "category_id": coco_gt["categories"][0]["id"], "score": 0.0}
            | {"bbox": [0.0, 0.0, 0.0, 0.0], "segmentation": empty}
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(coco_gt)
        coco.createIndex()
        keep = {"bbox": "segmentation", "segm": "bbox"}[task]
        detections = [{k: v for k, v in r.items() if k != keep} for r in copy.deepcopy(results)]
        evaluation = COCOeval(coco, coco.loadRes(detections), task)
        evaluation.params.useCats = 0
        evaluation.params.maxDets = list(caps)
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"][:, 0]
    return np.where((recall > -1).all(0), recall.mean(0), np.nan)
