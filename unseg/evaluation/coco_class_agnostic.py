"""Class-agnostic COCO evaluation of any registered dataset of instances.

Published numbers differ in what they count as ground truth (COCO-20k, three UVO sets, VOC with
or without difficult objects), so the table says which file and how many images and objects it is
about. On data sets that label only some objects (COCO, VOC, LVIS) found but unlabeled objects count
as errors: AR is the more trustworthy number there.
"""

import json
import logging
import os
import re
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from tabulate import tabulate

from unseg.checkpoint.files import atomic_write
from unseg.discovery.io import CATEGORY
from unseg.evaluation.build import EVALUATORS
from unseg.evaluation.coco_api import (
    average_precision_caps,
    evaluate_class_agnostic,
    fastest_implementation,
)
from unseg.evaluation.coco_records import (
    Annotation,
    dataset_ground_truth,
    tasks_of_ground_truth,
)
from unseg.evaluation.predicted_masks import encode_predicted_masks
from unseg.structures import RLE

logger = logging.getLogger(__name__)

RESULTS_FILE = "coco_instances_results.json"


def as_file_name(dataset_name: str) -> str:
    """A data set's name as the name of a file or folder.

    Names may be ``/data/x.json@/data/images``. What changes gets a checksum of the whole name, so
    that two names stay two.
    """
    safe = re.sub(r"[^\w.-]+", "_", dataset_name).lstrip(".")[-100:]
    return safe if safe == dataset_name else f"{safe}-{zlib.crc32(dataset_name.encode()):08x}"


def output_folder(cfg: CfgNode, dataset_name: str) -> str:
    """``OUTPUT_DIR/inference``, with a folder per dataset where there are several."""
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    return (
        folder if len(cfg.DATASETS.TEST) < 2 else os.path.join(folder, as_file_name(dataset_name))
    )


def _with_text(rle: RLE) -> RLE:
    """An encoding that JSON can hold."""
    counts = rle["counts"]
    counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": list(rle["size"]), "counts": counts}


def instances_to_results(instances: Instances, image_id: Any) -> list[Annotation]:
    """Predictions of one image in COCO's result format, all of category 1.

    Args:
        instances: with ``scores`` and ``pred_boxes``, ``pred_masks`` or both, at the original image
            size; masks are a tensor (N, H, W), PackedMasks, BitMasks, WindowMasks or a list of COCO
            run-length encodings. Or a proposal generator's: ``proposal_boxes``,
            ``objectness_logits``.
        image_id: of the dataset dict.

    Raises:
        ValueError: scores are missing or not finite, boxes are not finite, there are neither boxes
            nor masks, or masks of another form; the message names the image.
    """
    fields = instances.get_fields()
    scores = fields.get("scores", fields.get("objectness_logits"))
    boxes = fields.get("pred_boxes", fields.get("proposal_boxes"))
    masks = fields.get("pred_masks")
    if scores is None or (boxes is None and masks is None):
        raise ValueError(f"image {image_id!r}: predictions need scores, and boxes or masks")
    scores = scores.detach().cpu()
    if not torch.isfinite(scores).all():
        raise ValueError(
            f"image {image_id!r}: {int((~scores.isfinite()).sum())} scores are NaN/inf"
        )
    results = [
        {"image_id": image_id, "category_id": CATEGORY["id"], "score": s} for s in scores.tolist()
    ]
    if boxes is not None:
        tensor = boxes.tensor.detach().cpu()
        if not torch.isfinite(tensor).all():
            raise ValueError(f"image {image_id!r}: boxes are NaN/inf")
        xywh = BoxMode.convert(tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
        for result, box in zip(results, xywh, strict=True):
            result["bbox"] = box
    if masks is not None:
        try:
            encodings = encode_predicted_masks(masks)
        except ValueError as error:
            raise ValueError(f"image {image_id!r}: {error}") from error
        for result, rle in zip(results, encodings, strict=True):
            result["segmentation"] = _with_text(rle)
    if "pred_classes" in fields:
        # Classes decide nothing but the order of equal scores, as they do under useCats=0.
        order = torch.argsort(fields["pred_classes"].cpu(), stable=True).tolist()
        results = [results[i] for i in order]
    return results


@EVALUATORS.register()
class ClassAgnosticCOCOEvaluator(DatasetEvaluator):
    """COCO's AP and AR of masks and boxes with all categories taken for one.

    Ground truth may be any registered dataset of instances, class-aware or not, from COCO JSON or
    not (see :func:`unseg.evaluation.coco_records.dataset_ground_truth`). The numbers are those of
    pycocotools with ``useCats=0`` (see :func:`unseg.evaluation.coco_api.evaluate_class_agnostic`).

    AP, AP50, AP75, APs, APm, APl, ARs, ARm and ARl are taken at 100 detections per image, whatever
    `max_dets` says; AR@k also at every k of `max_dets`. A model's own caps come first
    (``TEST.DETECTIONS_PER_IMAGE``, proposals kept before and after NMS): AR@1000 needs all of them
    at 1000.
    """

    @configurable
    def __init__(
        self,
        dataset_name: str,
        *,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        max_dets: Sequence[int] = (1, 10, 100),
    ) -> None:
        """
        Args:
            dataset_name: a name in Detectron2's DatasetCatalog.
            tasks: of "bbox" and "segm". None: boxes, and masks where predictions and ground truth
                have them.
            distributed: collect the predictions of all ranks on the main process, which alone
                returns numbers; otherwise each process evaluates its own.
            output_dir: folder for ``coco_instances_results.json`` (COCO's result format,
                category 1 throughout), written whole or not at all. None: not written.
            max_dets: caps on detections per image at which average recall is reported.

        Raises:
            KeyError: no dataset of that name is registered.
            ValueError: an unknown task or a cap that is not a positive integer.
        """
        if tasks is not None and (not tasks or not set(tasks) <= {"bbox", "segm"}):
            raise ValueError(f"tasks must be of 'bbox' and 'segm', got {tasks!r}")
        if dataset_name not in DatasetCatalog.list():
            raise KeyError(f"dataset {dataset_name!r} is not registered")
        self._name = dataset_name
        self._tasks = None if tasks is None else tuple(tasks)
        self._distributed = distributed
        self._output_dir = output_dir
        self._max_dets = tuple(max_dets)
        average_precision_caps(max_dets)
        self._ground_truth: dict[str, Any] = {}
        self._origin = ""
        if not distributed or comm.is_main_process():
            # Here, so that a missing file is noticed before the inference and not after it.
            self._ground_truth, self._origin = dataset_ground_truth(dataset_name)
        self.reset()

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset_name: str) -> dict[str, Any]:
        """Arguments from ``TEST.CLASS_AGNOSTIC.MAX_DETS`` and ``OUTPUT_DIR``."""
        max_dets = tuple(cfg.TEST.CLASS_AGNOSTIC.MAX_DETS)
        if 0 < cfg.TEST.DETECTIONS_PER_IMAGE < max(max_dets):
            logger.warning(
                "TEST.DETECTIONS_PER_IMAGE %d is below TEST.CLASS_AGNOSTIC.MAX_DETS %s: average "
                "recall cannot rise between them",
                cfg.TEST.DETECTIONS_PER_IMAGE,
                max_dets,
            )
        return {
            "dataset_name": dataset_name,
            "output_dir": output_folder(cfg, dataset_name),
            "max_dets": max_dets,
        }

    def reset(self) -> None:
        """Forget all predictions."""
        # Lists of results by image id, and whether any image's predictions had the field for masks
        # (an image without detections still tells).
        self._predictions: dict[Any, list[Annotation]] = {}
        self._saw_masks = False

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Keep the predictions of some images; masks are kept run-length encoded.

        Args:
            inputs: dataset dicts, of which ``image_id`` is read.
            outputs: each with ``instances``, or with ``proposals`` (boxes only).

        Raises:
            ValueError: an output with neither, or what :func:`instances_to_results` refuses.
        """
        for record, output in zip(inputs, outputs, strict=True):
            image_id = record["image_id"]
            instances = output.get("instances", output.get("proposals"))
            if instances is None:
                raise ValueError(
                    f"image {image_id!r}: the output has neither 'instances' nor 'proposals', but "
                    f"{sorted(output)}"
                )
            self._saw_masks |= instances.has("pred_masks")
            self._predictions[image_id] = instances_to_results(instances, image_id)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Numbers by task ("bbox", "segm"), times 100; {} on other ranks than the main one.

        Raises:
            ValueError: `tasks` asks for masks that the ground truth or the predictions lack.
        """
        if self._distributed and comm.get_world_size() > 1:
            comm.synchronize()
            gathered = comm.gather((self._predictions, self._saw_masks), dst=0)
            if not comm.is_main_process():
                return {}
            # A sampler that pads the last batch sends an image to two ranks: keep one.
            predictions = {k: v for part, _ in gathered for k, v in part.items()}
            saw_masks = any(saw for _, saw in gathered)
        else:
            predictions, saw_masks = self._predictions, self._saw_masks
        self._warn_about_missing(predictions)
        # In the order of the ids, so that the file does not depend on the number of ranks.
        results = [r for image_id in sorted(predictions) for r in predictions[image_id]]
        self._write(results)
        numbers = {
            task: evaluate_class_agnostic(self._ground_truth, results, task, self._max_dets)
            for task in self._choose_tasks(saw_masks)
        }
        self._log(numbers)
        return numbers

    def _warn_about_missing(self, predictions: dict[Any, list[Annotation]]) -> None:
        images = len(self._ground_truth["images"])
        if len(predictions) < images:
            logger.warning(
                "%d of %d images of %s were not processed: all their objects count as missed",
                images - len(predictions),
                images,
                self._name,
            )
        if not any(predictions.values()):
            logger.warning("no predictions at all on %s: AP is 0", self._name)

    def _choose_tasks(self, saw_masks: bool) -> tuple[str, ...]:
        """`tasks`, or what predictions and ground truth have."""
        if self._tasks is not None:
            return self._tasks
        if not saw_masks:
            return ("bbox",)
        return tasks_of_ground_truth(self._ground_truth["annotations"], self._name)

    def _write(self, results: list[Annotation]) -> None:
        if not self._output_dir:
            return
        path = os.path.join(self._output_dir, RESULTS_FILE)
        with atomic_write(path) as file:
            json.dump(results, file)
        logger.info("%d results written to %s", len(results), path)

    def _log(self, numbers: dict[str, dict[str, float]]) -> None:
        """One table, with what it was measured on."""
        annotations = self._ground_truth["annotations"]
        crowds = sum(bool(a.get("iscrowd", 0)) for a in annotations)
        header = list(next(iter(numbers.values())))
        rows = [[task, *values.values()] for task, values in numbers.items()]
        logger.info(
            "Class-agnostic COCO evaluation of %s (%s): %d images, %d objects, %d crowd regions; "
            "COCOeval of %s\n%s",
            self._name,
            self._origin,
            len(self._ground_truth["images"]),
            len(annotations) - crowds,
            crowds,
            fastest_implementation(),
            tabulate(rows, ["task", *header], tablefmt="pipe", floatfmt=".2f"),
        )
