"""Average recall side by side with pycocotools: the parts "recall" and "inputs" of proposals.py."""

import contextlib
import io
import time
from collections.abc import Callable

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from measuring import Report, measure
from proposal_scenes import (
    Scene,
    Sizes,
    as_coco,
    as_output,
    as_results,
    dataset_dicts,
    make_scene,
)
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from unseg.evaluation import ProposalRecallEvaluator
from unseg.evaluation.recall import AUC_COUNTS
from unseg.structures import WindowMasks, encode_masks

RECALL_GOAL = 5.0
DATASET = "benchmark_proposals"


def cpu_seconds(call: Callable[[], object]) -> tuple[float, object]:
    """CPU time on one thread, wall time on several."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    result = call()
    return clock() - start, result


def pycocotools_matches(coco_content: dict, results: list[dict]) -> tuple[dict, COCOeval]:
    """Seconds by step up to the matching, and what holds it; fields are added to `results`."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = coco_content
        seconds = {"index": cpu_seconds(truth.createIndex)[0]}
        seconds["loadRes"], found = cpu_seconds(lambda: truth.loadRes(results))
        evaluation = COCOeval(truth, found, "segm")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = list(AUC_COUNTS)
        seconds["evaluate"] = cpu_seconds(evaluation.evaluate)[0]
    return seconds, evaluation


def recall_of_pycocotools(coco_content: dict, results: list[dict]) -> tuple[dict, np.ndarray]:
    """Seconds by step, and recall in percent, averaged over thresholds: (sizes, caps)."""
    seconds, evaluation = pycocotools_matches(coco_content, results)
    with contextlib.redirect_stdout(io.StringIO()):
        seconds["accumulate"] = cpu_seconds(evaluation.accumulate)[0]
    return seconds, 100 * evaluation.eval["recall"][:, 0].mean(0)


def recall_of_unseg(scenes: list[Scene], sizes: Sizes) -> tuple[dict, dict[str, float]]:
    """Seconds by step, and the numbers."""

    def output(image: int) -> dict:
        masks = scenes[image % len(scenes)].masks
        return as_output(masks, image, len(masks), sizes.image_size)

    outputs = [output(image) for image in range(sizes.images)]
    seconds = {}
    seconds["construction"], evaluator = cpu_seconds(
        lambda: ProposalRecallEvaluator(DATASET, tasks=("segm",))
    )

    def process() -> None:
        for image, found in enumerate(outputs):
            evaluator.process([{"image_id": image + 1}], [found])

    seconds["process"] = cpu_seconds(process)[0]
    seconds["evaluate"], numbers = cpu_seconds(evaluator.evaluate)
    return seconds, numbers["segm_proposals"]


def largest_difference(numbers: dict[str, float], recall: np.ndarray) -> float:
    """Between the evaluator's numbers and those made of pycocotools' recall."""
    areas = np.trapezoid(recall, np.log10(AUC_COUNTS), axis=1) / 3
    expected = {f"AR@{cap}": recall[0, AUC_COUNTS.index(cap)] for cap in (10, 100, 1000)}
    for size, row, area in zip(("", "s", "m", "l"), recall, areas):
        expected[f"AUC{size}"] = area
        expected[f"AR{size}@1000"] = row[-1]
    if not numbers.keys() <= expected.keys():
        raise RuntimeError(f"the evaluator gives other numbers: {sorted(numbers)}")
    return max(abs(value - expected[key]) for key, value in numbers.items())


def run_recall(report: Report, sizes: Sizes) -> None:
    scenes = [make_scene(n, sizes.image_size, sizes.proposals) for n in range(sizes.scenes)]
    dicts = dataset_dicts(scenes, sizes.images, sizes.image_size)
    report.write(f"recall: {sizes.proposals} proposals on each of {sizes.images} images of ")
    report.write(f"{sizes.image_size[0]} x {sizes.image_size[1]}, ")
    report.write(f"{sum(len(d['annotations']) for d in dicts) / len(dicts):.1f} objects each\n")
    DatasetCatalog.register(DATASET, lambda: dicts)
    try:
        fast, numbers = recall_of_unseg(scenes, sizes)
        plain, recall = recall_of_pycocotools(as_coco(dicts), as_results(scenes, sizes.images))
        report.compare("time", sum(plain.values()), sum(fast.values()), "s  ", RECALL_GOAL)
        for name, steps in (("plain", plain), ("unseg", fast)):
            parts = ", ".join(f"{step} {value:.2f}" for step, value in steps.items())
            report.write(f"            {name}, s: {parts}\n")
        worst = largest_difference(numbers, recall)
        equal = report.check(worst <= 1e-9, "at most 1e-09")
        report.write(
            f"            AR@10 {numbers['AR@10']:.2f}, AR@1000 {numbers['AR@1000']:.2f}; "
        )
        report.write(f"numbers differ by {worst:.0e}, {equal}\n")
        run_inputs(report, sizes, scenes)
    finally:
        DatasetCatalog.remove(DATASET)


def window_masks(scene: Scene, size: tuple[int, int]) -> WindowMasks:
    """The scene's ellipses as windows of 56 x 56 cells."""
    place = (torch.arange(56) + 0.5) / 28 - 1
    inside = ((place[:, None] ** 2 + place**2) <= 1).float()
    boxes = torch.from_numpy(scene.boxes).float()
    return WindowMasks(inside.expand(len(boxes), 56, 56).contiguous(), boxes, size)


def run_inputs(report: Report, sizes: Sizes, scenes: list[Scene]) -> None:
    """By what the masks come as, on a few images."""
    scenes = scenes[: sizes.input_images]
    evaluator = ProposalRecallEvaluator(DATASET, tasks=("segm",))
    coco = as_coco(DatasetCatalog.get(DATASET)[: len(scenes)])

    def dense(scene: Scene) -> Tensor:
        return torch.from_numpy(mask_util.decode(scene.masks).transpose(2, 0, 1).copy()).bool()

    def evaluate(masks: list[object]) -> None:
        for image, some in enumerate(masks):
            found = as_output(some, image, sizes.proposals, sizes.image_size)
            evaluator.process([{"image_id": image + 1}], [found])

    results = as_results(scenes, len(scenes))
    inputs = {
        "run lengths": ([scene.masks for scene in scenes], None),
        "bool": ([dense(scene) for scene in scenes], encode_masks),
        "windows": ([window_masks(s, sizes.image_size) for s in scenes], WindowMasks.to_rle),
    }
    report.write(f"inputs: ms an image, {sizes.proposals} proposals\n")
    for name, (masks, encode) in inputs.items():
        calls = {
            "plain": lambda m=masks, e=encode: (
                e and [e(some) for some in m],
                pycocotools_matches(coco, [result.copy() for result in results]),
            ),
            "unseg": lambda m=masks: evaluate(m),
        }
        times = measure(calls, min(sizes.rounds, 2))
        each = {side: value / len(masks) for side, value in times.items()}
        report.compare(name, each["plain"], each["unseg"], "ms ")
