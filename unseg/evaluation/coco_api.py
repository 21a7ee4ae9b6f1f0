"""Class-agnostic COCO metrics: one category on both sides, run by the fastest exact COCOeval.

Three implementations of COCOeval may be installed: Detectron2's C++ one (with ``detectron2._C``),
faster-coco-eval, and pycocotools' own in Python. All three get the same prepared lists here (boxes,
areas and run-length encodings come from pycocotools once), so they differ only in matching and
accumulation. tests/evaluation/test_coco_api.py compares the first two with pycocotools on random
cases full of ties, crowds and empty images; :func:`fastest_implementation` repeats a small case at
run time, because releases of faster-coco-eval that nobody tested here may be installed.

Legend: T IoU thresholds (.50:.05:.95), R recall thresholds (101), A size ranges (all, small,
medium, large), M caps on detections per image.
"""

import contextlib
import functools
import io
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from unseg.compat import detectron2_extension
from unseg.discovery.io import CATEGORY
from unseg.evaluation.coco_records import Annotation, prepare_detections, prepare_ground_truth

logger = logging.getLogger(__name__)

# (images, ground truth, detections, task, caps) -> precision (T, R, A, M), recall (T, A, M).
# -1 where there is no ground truth.
Implementation = Callable[
    [list[Annotation], list[Annotation], list[Annotation], str, list[int]],
    tuple[np.ndarray, np.ndarray],
]

# COCO's AP is taken at this many detections an image, whatever the other caps are.
AP_CAP = 100
TOLERANCE = 1e-9
_SIZES = ("s", "m", "l")
_IOU_50, _IOU_75 = 0, 5


def _run(
    coco_class: type,
    eval_class: type,
    images: list[Annotation],
    ground_truth: list[Annotation],
    detections: list[Annotation],
    task: str,
    caps: list[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Evaluate with one pair of COCO and COCOeval classes."""
    # faster-coco-eval wants integers even where all masks are encoded already.
    images = [i | {"height": i["height"] or 0, "width": i["width"] or 0} for i in images]

    def index(annotations: list[Annotation]) -> Any:
        coco = coco_class()
        # COCOeval writes into the annotations.
        copies = [dict(annotation) for annotation in annotations]
        coco.dataset = {"images": images, "annotations": copies, "categories": [CATEGORY]}
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = eval_class(index(ground_truth), index(detections), task)
        evaluation.params.maxDets = list(caps)
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    return precision[:, :, 0], recall[:, 0]


def implementations() -> dict[str, Implementation]:
    """The installed implementations by name, fastest first; pycocotools is always the last."""
    found: dict[str, Implementation] = {}
    if hasattr(detectron2_extension(), "COCOevalEvaluateImages"):
        from detectron2.evaluation.fast_eval_api import COCOeval_opt

        found["detectron2"] = functools.partial(_run, COCO, COCOeval_opt)
    with contextlib.suppress(ImportError):
        import faster_coco_eval

        quiet = functools.partial(
            faster_coco_eval.COCOeval_faster, print_function=logging.getLogger("null").debug
        )
        found["faster_coco_eval"] = functools.partial(_run, faster_coco_eval.COCO, quiet)
    found["pycocotools"] = functools.partial(_run, COCO, COCOeval)
    return found


def _probe_case() -> tuple[list[Annotation], list[Annotation], list[Annotation]]:
    """Images, ground truth and detections with tied scores, tied IoUs, crowds, empty images."""
    rng = np.random.default_rng(0)
    images = [{"id": i, "height": 64, "width": 64} for i in range(1, 9)]
    ground_truth: list[Annotation] = []
    detections: list[Annotation] = []
    for image in images:
        number = int(rng.integers(0, 5)), int(rng.integers(0, 12))
        for annotations, count in zip((ground_truth, detections), number):
            for _ in range(count):
                x, y = (8 * rng.integers(0, 5, 2)).tolist()
                w, h = (8 * rng.integers(1, 4, 2)).tolist()
                mask = np.zeros((64, 64), dtype=np.uint8, order="F")
                mask[y : y + h, x : x + w] = 1
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": CATEGORY["id"],
                    "bbox": [float(x), float(y), float(w), float(h)],
                    "area": float(rng.choice([w * h, 1024, 5000, 9216])),
                    "iscrowd": 0,
                    "segmentation": mask_util.encode(mask),
                }
                if annotations is ground_truth:
                    annotation["iscrowd"] = int(rng.random() < 0.25)
                else:
                    annotation["score"] = float(rng.integers(0, 4)) / 4
                annotations.append(annotation)
    return images, ground_truth, detections


def equals_pycocotools(run: Implementation) -> bool:
    """Whether `run` gives pycocotools' curves to 1e-9 on a small case with ties and crowds."""
    images, ground_truth, detections = _probe_case()
    for task in ("bbox", "segm"):
        arguments = (images, ground_truth, detections, task, [1, 3, AP_CAP])
        expected = _run(COCO, COCOeval, *arguments)
        for got, want in zip(run(*arguments), expected):
            if got.shape != want.shape or not np.allclose(got, want, rtol=0, atol=TOLERANCE):
                return False
    return True


@functools.cache
def fastest_implementation() -> str:
    """Name of the fastest installed implementation that equals pycocotools on the probe."""
    for name, run in implementations().items():
        if name == "pycocotools":
            return name
        try:
            if equals_pycocotools(run):
                return name
            reason = "its numbers differ from pycocotools' on a small test"
        except Exception as error:  # noqa: BLE001 (a broken optional package must not stop us)
            reason = f"it fails on a small test: {error!r}"
        logger.warning("COCOeval of %s is not used: %s", name, reason)
    return "pycocotools"


def average_precision_caps(max_dets: Sequence[int]) -> list[int]:
    """The caps to evaluate: those asked for and the one of AP, rising.

    Raises:
        ValueError: a cap is not a positive integer, or there is none.
    """
    caps = list(max_dets)
    if not caps or any(isinstance(c, bool) or int(c) != c or c < 1 for c in caps):
        raise ValueError(f"max_dets must be positive integers, got {max_dets!r}")
    return sorted({int(c) for c in caps} | {AP_CAP})


def evaluate_class_agnostic(
    coco_gt: dict[str, Any],
    results: Sequence[Annotation],
    task: str = "segm",
    max_dets: Sequence[int] = (1, 10, 100),
    *,
    implementation: str | None = None,
) -> dict[str, float]:
    """COCO metrics of detections that have no class.

    All categories are taken for one, on both sides; crowd regions stay crowd regions. The numbers
    are those of pycocotools with ``useCats=0``, with three improvements: detections in categories
    that the ground truth lacks count (pycocotools drops them silently), ground truth with
    annotation id 0 can be found (there its match counts as a miss), and AP is right for any caps.

    Args:
        coco_gt: content of a COCO file: ``images`` (id, height, width) and ``annotations``
            (image_id, bbox, segmentation as polygons or run-length encoding, area, iscrowd).
            Missing areas come from the mask, else the box; missing boxes from the mask. Changed by
            nothing here.
        results: in COCO's result format: image_id, score, and bbox (XYWH, pixels) or segmentation
            (run-length encoding of the image's size), or both. Run-length strings are trusted:
            check those from unknown files with unseg.discovery.rle first.
        task: "bbox" or "segm". Size classes of detections are by box and by mask area.
        max_dets: caps on detections per image for average recall. AP, AP50, ..., ARs, ARm and ARl
            are taken at 100 whatever the caps are.
        implementation: a name of :func:`implementations`; None takes the fastest exact one.

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR@<cap> for each cap (100 among them), ARs, ARm, ARl, times
        100. NaN where there is no ground truth (of that size), 0 where nothing was detected.

    Raises:
        ValueError: an unknown task; a detection for an image that the ground truth lacks, with a
            score or box that is not finite, or with a mask of another size than its image.
    """
    if task not in ("bbox", "segm"):
        raise ValueError(f"task must be 'bbox' or 'segm', got {task!r}")
    caps = average_precision_caps(max_dets)
    ground_truth = prepare_ground_truth(coco_gt, task)
    detections = prepare_detections(results, ground_truth, task)
    run = implementations()[implementation or fastest_implementation()]
    precision, recall = run(
        list(ground_truth.images.values()), ground_truth.annotations, detections, task, caps
    )
    return summarize(precision, recall, caps)


def summarize(precision: np.ndarray, recall: np.ndarray, caps: list[int]) -> dict[str, float]:
    """The numbers of a results table from COCOeval's curves.

    Args:
        precision: (T, R, A, M), -1 where there is no ground truth.
        recall: (T, A, M), likewise.
        caps: the M caps, with 100 among them.
    """

    def percent(values: np.ndarray) -> float:
        values = values[values > -1]
        return 100 * float(values.mean()) if values.size else float("nan")

    at = caps.index(AP_CAP)
    metrics = {
        "AP": percent(precision[:, :, 0, at]),
        "AP50": percent(precision[_IOU_50, :, 0, at]),
        "AP75": percent(precision[_IOU_75, :, 0, at]),
    }
    metrics |= {f"AP{s}": percent(precision[:, :, a, at]) for a, s in enumerate(_SIZES, 1)}
    metrics |= {f"AR@{cap}": percent(recall[:, 0, m]) for m, cap in enumerate(caps)}
    metrics |= {f"AR{s}": percent(recall[:, a, at]) for a, s in enumerate(_SIZES, 1)}
    return metrics
