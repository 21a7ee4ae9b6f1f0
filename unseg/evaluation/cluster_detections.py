"""Embedded detections as ClusterLVISEvaluator keeps them, and the objects that they match.

Legend: N detections of the data set, n of an image, G objects of an image, D dimensions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor

from unseg.evaluation.cluster_naming import (
    box_ious,
    mask_ious,
    match_with_objects,
)
from unseg.evaluation.coco_class_agnostic import instances_to_results
from unseg.evaluation.coco_records import to_rle


@dataclass(frozen=True, eq=False)
class ImageDetections:
    """What an image's detections say.

    Attributes:
        results: n, in COCO's result format; the category is not the detection's.
        tangents: float32 (n, D), or None.
        clusters: int64 (n,), or None.
        has_masks: whether the prediction has the field, be it empty.
    """

    results: list[dict[str, Any]]
    tangents: np.ndarray | None
    clusters: np.ndarray | None
    has_masks: bool


@dataclass(frozen=True, eq=False)
class Detections:
    """All detections, by image id, each image's in the model's order.

    Attributes:
        results: N, in COCO's result format.
        clusters: int64 (N,).
        classes: int64 (N,), the class of the object matched with each, -1 for none.
        tangents: float32 (N, D), or None if the model gives clusters only.
    """

    results: list[dict[str, Any]]
    clusters: np.ndarray
    classes: np.ndarray
    tangents: Tensor | None

    @property
    def num_clusters(self) -> int:
        return int(self.clusters.max(initial=-1)) + 1


def keep_detections(instances: Instances, image_id: Any) -> ImageDetections:
    """An image's detections, checked, without tensors on a device."""
    fields = instances.get_fields()
    if "pred_tangents" not in fields and "pred_clusters" not in fields:
        raise ValueError(
            f"image {image_id!r}: detections have neither pred_tangents nor pred_clusters, but "
            f"{sorted(fields)}: the model needs an embedding head"
        )
    if "pred_boxes" not in fields:
        raise ValueError(f"image {image_id!r}: detections need pred_boxes")
    # Classes would change the order.
    named = {name: value for name, value in fields.items() if name != "pred_classes"}
    results = instances_to_results(Instances(instances.image_size, **named), image_id)
    tangents, clusters = fields.get("pred_tangents"), fields.get("pred_clusters")
    if tangents is not None:
        tangents = tangents.detach().cpu().float().numpy()
        if tangents.ndim != 2 or not np.isfinite(tangents).all():
            raise ValueError(
                f"image {image_id!r}: pred_tangents must be finite and (n, D), got {tangents.shape}"
            )
    if clusters is not None:
        clusters = clusters.detach().cpu().numpy()
        if clusters.ndim != 1 or clusters.dtype.kind not in "iu" or clusters.min(initial=0) < 0:
            raise ValueError(f"image {image_id!r}: pred_clusters must be (n,) integers from 0")
    return ImageDetections(results, tangents, clusters, "pred_masks" in fields)


def column_of(images: Sequence[ImageDetections], name: str) -> np.ndarray | None:
    """What all images have, one after the other; None if one has it not."""
    parts = [getattr(image, name) for image in images]
    if not parts or any(part is None for part in parts):
        return None
    return np.concatenate(parts)


def collect_detections(
    images: Mapping[Any, ImageDetections],
    content: Mapping[str, Any],
    classes: Mapping[int, int],
    cluster: Callable[[Tensor], np.ndarray],
    *,
    min_iou: float,
    by_masks: bool,
) -> Detections:
    """All images' detections in the order of image ids, clustered and matched with objects.

    Args:
        images: by image id, in any order: the result is the same for any.
        content: of an LVIS file, with these images.
        classes: 0-based class of each category id.
        cluster: clusters (N,) of tangents (N, D), if not all detections have theirs.
        min_iou: least IoU of a detection and its object.
        by_masks: whether that is the masks' or the boxes'.

    Raises:
        ValueError: detections of some images have no tangents, of others no clusters.
    """
    order = sorted(images)
    full = [images[image_id] for image_id in order if images[image_id].results]
    tangents, clusters = column_of(full, "tangents"), column_of(full, "clusters")
    tangents = None if tangents is None else torch.from_numpy(tangents)
    if full and tangents is None and clusters is None:
        raise ValueError("detections of some images have no pred_tangents, of others no clusters")
    if clusters is None:
        clusters = np.zeros(0) if tangents is None else cluster(tangents)
    objects: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    matched = []
    for image_id in order:
        there, size = objects[image_id], sizes[image_id]
        match = _match(images[image_id].results, there, size if by_masks else None, min_iou)
        # -1, no object, takes the last entry.
        matched.append(np.array([classes[a["category_id"]] for a in there] + [-1])[match])
    return Detections(
        [result for image_id in order for result in images[image_id].results],
        np.asarray(clusters).astype(np.int64),
        np.concatenate([np.zeros(0, np.int64), *matched]),
        tangents,
    )


def _match(
    results: Sequence[Mapping[str, Any]],
    objects: Sequence[Mapping[str, Any]],
    size: tuple[int, int] | None,
    min_iou: float,
) -> np.ndarray:
    """The object of each of an image's detections, int64 (n,), -1 for none.

    Args:
        results, objects: in COCO's format.
        size: height and width of the image; None: boxes are compared.
        min_iou: least IoU.
    """
    if size is None:
        iou = box_ious([r["bbox"] for r in results], [a["bbox"] for a in objects])
    else:
        wheres = [f"annotation {a.get('id')} of image {a['image_id']!r}" for a in objects]
        masks = [to_rle(a["segmentation"], *size, w) for a, w in zip(objects, wheres, strict=True)]
        iou = mask_ious([result["segmentation"] for result in results], masks)
    return match_with_objects(iou, min_iou)
