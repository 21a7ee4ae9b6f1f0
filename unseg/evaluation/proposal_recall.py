"""Average recall of mask and box proposals, the measure of proposal methods.

Detectron2's own ("box_proposals") is of boxes only, at 100 and 1000, and leaves out images without
proposals, which raises it. Here objects of all images of the data set count, processed or not.

Legend: N proposals by falling score, G objects of an image that are not crowds, A size ranges
(all, small, medium, large), T IoU thresholds (.50:.05:.95).
"""

import functools
import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from tabulate import tabulate

from unseg.evaluation.build import EVALUATORS
from unseg.evaluation.coco_records import (
    dataset_ground_truth,
    prepare_ground_truth,
    tasks_of_ground_truth,
)
from unseg.evaluation.predicted_masks import comparable_masks, predicted_mask_iou, tight_boxes
from unseg.evaluation.recall import (
    AREA_RANGES,
    AUC_COUNTS,
    IOU_THRESHOLDS,
    NEVER,
    area_under_curve,
    average_recall,
    check_caps,
    counted_by_size,
    exact_box_iou,
    match_ranks,
)
from unseg.layers import PackedMasks
from unseg.structures import RLE

logger = logging.getLogger(__name__)

# Keys of the results. Detectron2's "box_proposals" is another measure.
RESULT_KEYS = {"segm": "segm_proposals", "bbox": "box_proposals_coco"}


@dataclass(frozen=True)
class ImageObjects:
    """The objects of one image; crowds are left out (they cannot change recall).

    Attributes:
        size: (H, W), None if the data set does not say.
        boxes: float64 (G, 4) XYWH.
        counted: bool (A, G), by annotated area.
        masks: G run-length encodings; empty if masks are not evaluated.
    """

    size: tuple[int, int] | None
    boxes: np.ndarray
    counted: np.ndarray
    masks: list[RLE]


@dataclass(frozen=True)
class ImageMatches:
    """What is kept of one image's proposals.

    Attributes:
        proposals: how many there were.
        has_masks: whether they had the field for masks.
        ranks: int32 (A, T, G) by task; a task is missing if the proposals could not tell.
    """

    proposals: int
    has_masks: bool
    ranks: dict[str, np.ndarray]


@dataclass(frozen=True)
class Proposals:
    """Checked proposals of one image.

    Attributes:
        order: int64 (N,): which are evaluated, by falling score, equal ones in their order.
        boxes: float64 (N, 4) XYWH, in that order.
        masks: all masks as they came, because a copy of a thousand takes longer than their overlaps
            with the objects; or None.
    """

    order: np.ndarray
    boxes: np.ndarray
    masks: PackedMasks | list[RLE] | None


def ranked_proposals(instances: Instances, limit: int) -> Proposals:
    """The `limit` best proposals, ranked.

    Args:
        instances: at the original image size, with ``scores`` or ``objectness_logits`` (N,);
            ``pred_boxes`` or ``proposal_boxes``, or ``pred_masks``, or both: masks are (N, H, W)
            bool or uint8, BitMasks, PackedMasks, WindowMasks or COCO run-length encodings. Without
            boxes, those of the masks are taken. Equal scores go by ``pred_classes`` first, if there
            are any, as under COCOeval's ``useCats=0``.
        limit: keep at most so many.

    Raises:
        ValueError: scores are missing or not finite, boxes are not finite, there are neither boxes
            nor masks, or masks of another form or size.
    """
    fields = instances.get_fields()
    scores = fields.get("scores", fields.get("objectness_logits"))
    boxes = fields.get("pred_boxes", fields.get("proposal_boxes"))
    masks = fields.get("pred_masks")
    if scores is None or (boxes is None and masks is None):
        raise ValueError(f"proposals need scores, and boxes or masks; they have {sorted(fields)}")
    scores = scores.detach().cpu().double()
    if scores.ndim != 1 or not torch.isfinite(scores).all():
        raise ValueError("scores must be a vector of finite numbers")
    order = torch.arange(len(scores))
    if "pred_classes" in fields:
        order = torch.argsort(fields["pred_classes"].cpu(), stable=True)
    order = order[torch.argsort(-scores[order], stable=True)][:limit]
    comparable = None if masks is None else comparable_masks(masks, tuple(instances.image_size))
    tensor = (tight_boxes(comparable) if boxes is None else boxes.tensor.detach()).cpu()[order]
    if not torch.isfinite(tensor).all():
        raise ValueError("boxes are NaN/inf")
    # In the boxes' own precision, as in the results files of this package and Detectron2.
    xywh = BoxMode.convert(tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    return Proposals(order.numpy(), xywh.double().numpy(), comparable)


@EVALUATORS.register()
class ProposalRecallEvaluator(DatasetEvaluator):
    """Average recall of class-agnostic proposals, of masks and of boxes.

    The numbers are those of pycocotools' COCOeval with ``useCats=0``. Crowds count neither as
    objects nor against proposals. Memory grows with the objects of the data set, not with the
    proposals: matching is done image by image (see :mod:`unseg.evaluation.recall`).

    It can be listed in ``TEST.EVALUATORS`` beside ClassAgnosticCOCOEvaluator: their results have
    different keys. Of an output that has both, ``instances`` are taken, not ``proposals``.

    A model's own caps come first (``TEST.DETECTIONS_PER_IMAGE``, a proposal method's ``TOPK``,
    proposals kept before and after NMS): AR@1000 needs all of them at 1000 or more.
    """

    @configurable
    def __init__(
        self,
        dataset_name: str,
        *,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        caps: Sequence[int] = (10, 100, 1000),
    ) -> None:
        """
        Args:
            dataset_name: a name in Detectron2's DatasetCatalog.
            tasks: of "bbox" and "segm". None: boxes, and masks where proposals and ground truth
                have them.
            distributed: collect the matches of all ranks on the main process, which alone returns
                numbers; otherwise each process evaluates its own.
            caps: numbers of proposals per image at which average recall is reported.

        Raises:
            KeyError: no dataset of that name is registered.
            ValueError: an unknown task, a cap that is not a positive integer, or masks are asked
                for that some object of the ground truth does not have.
        """
        if tasks is not None and (not tasks or not set(tasks) <= set(RESULT_KEYS)):
            raise ValueError(f"tasks must be of 'bbox' and 'segm', got {tasks!r}")
        if dataset_name not in DatasetCatalog.list():
            raise KeyError(f"dataset {dataset_name!r} is not registered")
        self._name = dataset_name
        self._asked = None if tasks is None else tuple(tasks)
        self._distributed = distributed
        self._caps = check_caps(caps)
        coco, self._origin = dataset_ground_truth(dataset_name)
        self._tasks = self._asked or tasks_of_ground_truth(coco["annotations"], dataset_name)
        self._objects = _objects_by_image(coco, "segm" in self._tasks)
        self.reset()

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset_name: str) -> dict[str, Any]:
        """Arguments from ``TEST.PROPOSALS.CAPS``; a warning if the model keeps fewer proposals."""
        caps = tuple(cfg.TEST.PROPOSALS.CAPS)
        key, kept = _own_cap(cfg)
        if 0 < kept < max(caps, default=0):
            logger.warning(
                "%s %d is below TEST.PROPOSALS.CAPS %s: average recall cannot rise between them, "
                "and AUC, which goes to %d proposals, is too low",
                key,
                kept,
                caps,
                AUC_COUNTS[-1],
            )
        return {"dataset_name": dataset_name, "caps": caps}

    def reset(self) -> None:
        """Forget all proposals."""
        # By image id, so that an image seen twice counts once.
        self._matches: dict[Hashable, ImageMatches] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Match the proposals of some images.

        Args:
            inputs: dataset dicts, of which ``image_id`` is read.
            outputs: each with ``instances`` or ``proposals``, see :func:`ranked_proposals`; the
                first if it has both.

        Raises:
            ValueError: an output with neither, an image that the data set lacks, masks missing
                though `tasks` asks for them, or proposals that :func:`ranked_proposals` refuses;
                the message names the image.
        """
        for record, output in zip(inputs, outputs, strict=True):
            image_id = record["image_id"]
            if image_id not in self._objects:
                raise ValueError(f"image {image_id!r} is not in {self._name}")
            instances = output.get("instances", output.get("proposals"))
            try:
                if instances is None:
                    raise ValueError(
                        f"the output has neither 'instances' nor 'proposals', but {sorted(output)}"
                    )
                self._matches[image_id] = self._match(self._objects[image_id], instances)
            except ValueError as error:
                raise ValueError(f"image {image_id!r}: {error}") from error

    def _match(self, objects: ImageObjects, instances: Instances) -> ImageMatches:
        """Ranks by task, of the proposals of one image."""
        proposals = ranked_proposals(instances, max(*self._caps, *AUC_COUNTS))
        has_masks = proposals.masks is not None
        ranks = {}
        for task in self._tasks:
            if not len(instances) or not len(objects.boxes):
                iou = np.zeros((0, len(objects.boxes)))
            elif task == "bbox":
                iou = exact_box_iou(proposals.boxes, objects.boxes)
            elif has_masks:
                _check_size(proposals.masks, objects)
                iou = predicted_mask_iou(proposals.masks, objects.masks)[proposals.order]
            elif self._asked:
                raise ValueError("the proposals have no masks")
            else:
                continue
            ranks[task] = match_ranks(iou, objects.counted)
        return ImageMatches(len(instances), has_masks, ranks)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """``{"segm_proposals": numbers, "box_proposals_coco": numbers}``, either or both.

        AR@<cap> for every cap, AUC, AUCs, AUCm, AUCl (over log10 of 1 to 1000 proposals, see
        :func:`unseg.evaluation.recall.area_under_curve`), ARs@<cap>, ARm@<cap> and ARl@<cap> at the
        largest cap, all times 100; NaN where there is no object (of that size). {} on other ranks
        than the main one.

        Raises:
            ValueError: the proposals of some images have masks, those of others do not.
        """
        matches = self._matches
        if self._distributed and comm.get_world_size() > 1:
            comm.synchronize()
            gathered = comm.gather(matches, dst=0)
            if not comm.is_main_process():
                return {}
            # A sampler that pads the last batch sends an image to two ranks: keep one.
            matches = {k: v for part in gathered for k, v in part.items()}
        if len(matches) < len(self._objects):
            logger.warning(
                "%d of %d images of %s were not processed: all their objects count as missed",
                len(self._objects) - len(matches),
                len(self._objects),
                self._name,
            )
        numbers = {
            RESULT_KEYS[task]: self._summarize(task, matches)
            for task in self._choose_tasks(matches)
        }
        self._log(numbers, matches)
        return numbers

    def _choose_tasks(self, matches: dict[Hashable, ImageMatches]) -> tuple[str, ...]:
        """`tasks`, or what proposals and ground truth have."""
        if self._asked or "segm" not in self._tasks:
            return self._tasks
        if not any(found.has_masks for found in matches.values()):
            return tuple(task for task in self._tasks if task != "segm")
        without = [k for k, found in matches.items() if found.proposals and not found.has_masks]
        if without:
            raise ValueError(
                f"the proposals of {len(without)} of {len(matches)} images have no masks, "
                f"image {without[0]!r} is one; set tasks to ('bbox',) to evaluate boxes alone"
            )
        return self._tasks

    def _summarize(self, task: str, matches: dict[Hashable, ImageMatches]) -> dict[str, float]:
        """The numbers of one task over all images of the data set."""
        counted = np.concatenate(
            [np.zeros((len(AREA_RANGES), 0), bool), *(o.counted for o in self._objects.values())], 1
        )
        ranks = np.full((len(AREA_RANGES), len(IOU_THRESHOLDS), counted.shape[1]), NEVER, np.int32)
        start = 0
        for image_id, objects in self._objects.items():
            stop = start + objects.counted.shape[1]
            if image_id in matches:
                ranks[:, :, start:stop] = matches[image_id].ranks[task]
            start = stop
        recall = 100 * average_recall(ranks, counted, self._caps)
        areas = 100 * area_under_curve(ranks, counted)
        numbers = {f"AR@{cap}": float(recall[0, m]) for m, cap in enumerate(self._caps)}
        numbers |= {f"AUC{size}": float(area) for size, area in zip(AREA_RANGES, areas)}
        return numbers | {
            f"AR{size}@{self._caps[-1]}": float(row[-1])
            for size, row in zip(AREA_RANGES, recall)
            if size
        }

    def _log(
        self, numbers: dict[str, dict[str, float]], matches: dict[Hashable, ImageMatches]
    ) -> None:
        """One table, with what it was measured on."""
        most = max((found.proposals for found in matches.values()), default=0)
        if most < self._caps[-1]:
            logger.info("no image has more than %d proposals: recall cannot rise beyond", most)
        header = list(next(iter(numbers.values())))
        logger.info(
            "Recall of proposals on %s (%s): %d images, %d objects without crowds, %d proposals; "
            "IoU .50:.05:.95, AUC over log10 of 1 to 1000 proposals\n%s",
            self._name,
            self._origin,
            len(self._objects),
            sum(objects.counted.shape[1] for objects in self._objects.values()),
            sum(found.proposals for found in matches.values()),
            tabulate(
                [[key, *values.values()] for key, values in numbers.items()],
                ["proposals", *header],
                tablefmt="pipe",
                floatfmt=".2f",
            ),
        )


def _own_cap(cfg: CfgNode) -> tuple[str, int]:
    """The key that limits how many proposals the model of a config gives, and its value."""
    fcn = "MODEL.INSTANCE_FCN.TEST.TOPK"
    own_generator = cfg.MODEL.PROPOSAL_GENERATOR.NAME == "InstanceFCNProposalGenerator"
    keys = {
        "DeepMask": "MODEL.DEEPMASK.TEST.TOPK",
        "SharpMask": "MODEL.DEEPMASK.TEST.TOPK",
        "InstanceFCN": fcn,
        "ProposalNetwork": fcn if own_generator else "MODEL.RPN.POST_NMS_TOPK_TEST",
    }
    key = keys.get(cfg.MODEL.META_ARCHITECTURE, "TEST.DETECTIONS_PER_IMAGE")
    return key, functools.reduce(lambda node, name: node[name], key.split("."), cfg)


def _objects_by_image(coco: dict[str, Any], with_masks: bool) -> dict[Hashable, ImageObjects]:
    """Objects that are not crowds, by the data set's image ids, in the order of the ids."""
    prepared = prepare_ground_truth(coco, "segm" if with_masks else "bbox")
    groups: dict[int, list[dict[str, Any]]] = {i["id"]: [] for i in prepared.images.values()}
    for annotation in prepared.annotations:
        if not annotation["iscrowd"]:
            groups[annotation["image_id"]].append(annotation)
    objects = {}
    for image_id, image in prepared.images.items():
        group = groups[image["id"]]
        size = (image["height"], image["width"])
        objects[image_id] = ImageObjects(
            size=None if None in size else size,
            boxes=np.asarray([a["bbox"] for a in group], dtype=np.float64).reshape(-1, 4),
            counted=counted_by_size(np.asarray([a["area"] for a in group])),
            masks=[a["segmentation"] for a in group] if with_masks else [],
        )
    return objects


def _check_size(masks: PackedMasks | list[RLE], objects: ImageObjects) -> None:
    """Masks must be of the original image's size."""
    size = objects.size or tuple(objects.masks[0]["size"])
    found = masks.size if isinstance(masks, PackedMasks) else tuple(masks[0]["size"])
    if found != size:
        raise ValueError(f"pred_masks are {found}, the image is {size} (H, W)")
