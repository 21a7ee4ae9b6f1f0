"""Small LVIS files and results, and the package lvis run on them directly."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util

from unseg.evaluation.lvis_api import import_lvis

HEIGHT, WIDTH = 120, 160
FREQUENCIES = "rcfrcf"


def rectangle(x: int, y: int, w: int, h: int) -> dict[str, Any]:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = mask_util.encode(mask)
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def annotation(number: int, image: int, category: int, box: list[int], polygon=False) -> dict:
    x, y, w, h = box
    corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [float(v) for v in box],
        "area": float(w * h),
        "segmentation": corners if polygon else rectangle(*box),
    }


def lvis_content(annotations: list[dict], images, categories: int = 6, negative=None) -> dict:
    """Exhaustively annotated images; `negative`: ids of absent categories, by default all."""
    content = {"images": [], "annotations": annotations}
    for image in images:
        there = {a["category_id"] for a in annotations if a["image_id"] == image}
        absent = [c for c in range(1, categories + 1) if c not in there]
        content["images"].append(
            {
                "id": image,
                "height": HEIGHT,
                "width": WIDTH,
                "coco_url": f"http://images.cocodataset.org/val2017/{image:012d}.jpg",
                "neg_category_ids": absent if negative is None else negative,
                "not_exhaustive_category_ids": [],
            }
        )
    content["categories"] = [
        {"id": c, "name": f"class {c}", "frequency": FREQUENCIES[(c - 1) % 6]}
        for c in range(1, categories + 1)
    ]
    return content


def random_content(seed: int, images: int = 10, categories: int = 6) -> dict:
    """Boxes of all sizes, polygons and run lengths; federated: not all absences are known."""
    rng = np.random.default_rng(seed)
    annotations = []
    for image in range(3, 3 + images):
        for _ in range(int(rng.integers(0, 6))):
            x, y = int(rng.integers(0, WIDTH - 8)), int(rng.integers(0, HEIGHT - 8))
            w, h = int(rng.integers(4, WIDTH - x)), int(rng.integers(4, HEIGHT - y))
            category = int(rng.integers(1, categories))  # the last is without objects
            args = (image, category, [x, y, w, h], bool(rng.random() < 0.5))
            annotations.append(annotation(len(annotations) + 1, *args))
    content = lvis_content(annotations, range(3, 3 + images), categories)
    for image in content["images"]:
        image["neg_category_ids"] = image["neg_category_ids"][::2]
        if rng.random() < 0.5:
            image["not_exhaustive_category_ids"] = [int(rng.integers(1, categories + 1))]
    return content


def random_results(content: dict, seed: int) -> list[dict]:
    """Shifted, missed, doubled and wrongly named objects."""
    rng = np.random.default_rng(seed)
    results = []
    for a in content["annotations"]:
        for _ in range(int(rng.integers(0, 3))):
            x, y, w, h = (int(v) for v in a["bbox"])
            w = max(2, min(WIDTH - x, w + int(rng.integers(-6, 7))))
            h = max(2, min(HEIGHT - y, h + int(rng.integers(-6, 7))))
            category = a["category_id"] if rng.random() < 0.8 else int(rng.integers(1, 7))
            results.append(
                {
                    "image_id": a["image_id"],
                    "category_id": category,
                    "score": round(float(rng.random()), 2),
                    "bbox": [float(v) for v in (x, y, w, h)],
                    "segmentation": rectangle(x, y, w, h),
                }
            )
    return results


def lvis_numbers(content: dict, results: list[dict], task: str, folder: Path) -> dict[str, float]:
    """The package's own evaluation of two files, as its README has it; -1 where there is none."""
    lvis = import_lvis()
    kept = {"image_id", "category_id", "score", {"bbox": "bbox", "segm": "segmentation"}[task]}
    for name, what in (
        ("gt", content),
        ("dt", [{k: r[k] for k in kept} for r in results]),
    ):
        (folder / f"{name}.json").write_text(json.dumps(what))
    evaluation = lvis.LVISEval(str(folder / "gt.json"), str(folder / "dt.json"), task)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.run()
    return dict(evaluation.get_results())


def instances(boxes, scores=None, **fields) -> Instances:
    """Detections whose masks are their XYWH boxes."""
    made = Instances((HEIGHT, WIDTH))
    corners = [[x, y, x + w, y + h] for x, y, w, h in boxes]
    made.pred_boxes = Boxes(torch.tensor(corners, dtype=torch.float32).reshape(-1, 4))
    made.scores = torch.ones(len(boxes)) if scores is None else torch.tensor(scores)
    made.pred_masks = torch.zeros((len(boxes), HEIGHT, WIDTH), dtype=torch.bool)
    for mask, (x, y, w, h) in zip(made.pred_masks, boxes, strict=True):
        mask[int(y) : int(y + h), int(x) : int(x + w)] = True
    for name, value in fields.items():
        made.set(name, value)
    return made
