"""The default mapper: one view of an image with its instance masks."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances

from unseg.data.image import ImageReadError, read_image
from unseg.data.mappers.augmentation import build_augmentations
from unseg.data.mappers.registry import MAPPERS

_USED_FIELDS = ("bbox", "bbox_mode", "segmentation", "category_id")


@MAPPERS.register()
class InstanceMapper:
    """Detectron2's default mapper for any image file and any mask encoding.

    Differs from ``detectron2.data.DatasetMapper`` in reading every kind of image (see
    :func:`unseg.data.image.read_image`), in accepting run-length encoded masks whatever
    ``INPUT.MASK_FORMAT`` says, and in boxes that are always recomputed from the transformed masks
    (pseudo-masks have no boxes of their own). Keypoints are not supported.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str = "RGB",
        with_masks: bool = True,
        class_agnostic: bool = False,
        proposal_topk: int | None = None,
        keep_crowds: bool = False,
    ):
        """
        Args:
            is_train: also return the annotations, as ``instances``.
            augmentations: applied to the image and the masks.
            image_format: "RGB" or "BGR".
            with_masks: give ``instances`` the field ``gt_masks`` (BitMasks).
            class_agnostic: every category becomes 0.
            proposal_topk: give at most so many of the precomputed proposals as ``proposals``;
                None: there are none.
            keep_crowds: give the regions of crowd annotations as ``crowd_masks``.
        """
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.with_masks = with_masks
        self.class_agnostic = class_agnostic
        self.proposal_topk = proposal_topk
        self.keep_crowds = keep_crowds

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool) -> dict[str, Any]:
        if cfg.MODEL.KEYPOINT_ON:
            raise ValueError("MODEL.KEYPOINT_ON: InstanceMapper gives no keypoints")
        topk = None
        if cfg.MODEL.LOAD_PROPOSALS:
            split = "TRAIN" if is_train else "TEST"
            topk = cfg.DATASETS[f"PRECOMPUTED_PROPOSAL_TOPK_{split}"]
        return {
            "is_train": is_train,
            "augmentations": build_augmentations(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
            "with_masks": cfg.MODEL.MASK_ON,
            "class_agnostic": cfg.INPUT.CLASS_AGNOSTIC,
            "proposal_topk": topk,
            "keep_crowds": cfg.INPUT.KEEP_CROWDS,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            dataset_dict: one image in Detectron2's dataset format.

        Returns:
            a copy with ``image`` (3, H, W) uint8 and, in training, ``instances`` with gt_boxes,
            gt_classes and gt_masks instead of ``annotations``, ``sem_seg`` (H, W) int64
            if the dict names a ``sem_seg_file_name``, and, if crowds are kept, ``crowd_masks``
            (BitMasks).

        Raises:
            ImageReadError: the image (or the semantic segmentation) cannot be read.
            SizeMismatchError: its size is not the one in the dict.
            ValueError: masks are wanted (or crowds kept) and an annotation (a crowd) has none, or
                the semantic segmentation is of another size.
        """
        dataset_dict = copy.copy(dataset_dict)
        annotations = dataset_dict.pop("annotations", [])
        image = read_image(dataset_dict["file_name"], self.image_format)
        detection_utils.check_image_size(dataset_dict, image)
        semantic = None
        if self.is_train and "sem_seg_file_name" in dataset_dict:
            semantic = _read_semantic(dataset_dict.pop("sem_seg_file_name"), image.shape[:2])
        original_size = image.shape[:2]
        augmented = T.AugInput(image, sem_seg=semantic)
        transforms = self.augmentations(augmented)
        image = _unflipped(augmented.image).transpose(2, 0, 1)
        dataset_dict["image"] = torch.from_numpy(np.ascontiguousarray(image))
        if semantic is not None:
            dataset_dict["sem_seg"] = torch.from_numpy(augmented.sem_seg.astype(np.int64))
        if self.proposal_topk is not None:
            detection_utils.transform_proposals(
                dataset_dict, image.shape[1:], transforms, proposal_topk=self.proposal_topk
            )
        if self.is_train:
            try:
                instances = self._instances(annotations, transforms, original_size, image.shape[1:])
                if self.keep_crowds:
                    dataset_dict["crowd_masks"] = _crowds(annotations, transforms, image.shape[1:])
            except ValueError as error:
                raise ValueError(f"{dataset_dict['file_name']}: {error}") from error
            dataset_dict["instances"] = instances
        return dataset_dict

    def _add_fields(
        self,
        instances: Instances,
        annotations: Sequence[dict[str, Any]],
        transforms: T.TransformList,
        original_size: tuple[int, int],
    ) -> None:
        """For subclasses: set fields of `instances` that have objects out of view among them still.

        Args:
            instances: N objects in the transformed image; boxes, classes and, if the annotations
                have them, masks are set. The result is filtered afterwards by boxes and masks.
            annotations: their N annotations as in the dataset dict (not to be changed).
            transforms: what was done to the image.
            original_size: height and width of the image file.
        """

    def _instances(
        self,
        annotations: list[dict],
        transforms: T.TransformList,
        original_size: tuple[int, int],
        size: tuple[int, int],
    ) -> Instances:
        """Transformed annotations without crowds, and without those that fell out of view."""
        annotations = [a for a in annotations if not a.get("iscrowd", 0)]
        instances = _transformed(annotations, transforms, size)
        if instances.has("gt_masks"):
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        elif self.with_masks and len(instances):
            raise ValueError("its annotations have no 'segmentation', but MODEL.MASK_ON is True")
        elif self.with_masks:  # models read the field also from images without objects
            instances.gt_masks = BitMasks(torch.zeros((0, *size), dtype=torch.bool))
        if self.class_agnostic:
            instances.gt_classes = torch.zeros_like(instances.gt_classes)
        self._add_fields(instances, annotations, transforms, original_size)
        instances = detection_utils.filter_empty_instances(instances)
        if not self.with_masks and instances.has("gt_masks"):
            instances.remove("gt_masks")
        return instances


def _transformed(
    annotations: Sequence[dict[str, Any]], transforms: T.TransformList, size: tuple[int, int]
) -> Instances:
    """Annotations in the transformed image, out of view or not, as Detectron2 makes Instances."""
    transformed = [
        detection_utils.transform_instance_annotations(
            # a deep copy, because transforms may write into polygons
            copy.deepcopy({k: annotation[k] for k in _USED_FIELDS if k in annotation}),
            transforms,
            size,
        )
        for annotation in annotations
    ]
    for annotation in transformed:
        if isinstance(annotation.get("segmentation"), np.ndarray):
            annotation["segmentation"] = _unflipped(annotation["segmentation"])
    return detection_utils.annotations_to_instances(transformed, size, "bitmask")


def _crowds(
    annotations: Sequence[dict[str, Any]], transforms: T.TransformList, size: tuple[int, int]
) -> BitMasks:
    """The regions of the crowds among the annotations, without those that fell out of view."""
    crowds = [annotation for annotation in annotations if annotation.get("iscrowd", 0)]
    if not crowds:
        return BitMasks(torch.zeros((0, *size), dtype=torch.bool))
    if not all("segmentation" in crowd for crowd in crowds):
        raise ValueError("a crowd has no 'segmentation', but INPUT.KEEP_CROWDS is True")
    masks = _transformed(crowds, transforms, size).gt_masks
    return masks[masks.nonempty()]


def _unflipped(array: np.ndarray) -> np.ndarray:
    """A copy, if strides are negative: torch refuses those, and numpy takes a flipped image of one
    column for contiguous."""
    return array.copy() if min(array.strides) < 0 else array


def _read_semantic(file_name: str, size: tuple[int, int]) -> np.ndarray:
    """Label map (H, W) uint8 of an image of that size."""
    try:
        labels = detection_utils.read_image(file_name, "L").squeeze(2)
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageReadError(f"{file_name}: cannot be read as an image: {error}") from error
    if labels.shape != size:
        raise ValueError(f"{file_name}: its size is {labels.shape}, that of its image is {size}")
    return labels
