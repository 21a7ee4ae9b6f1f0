"""Ground truth and detections in the one form that COCOeval gets: one category, integer image ids.

Everything that can differ between files and implementations is settled here, with pycocotools'
mask operations: boxes, areas, run-length encodings, crowd flags, ids and the order of ties.
"""

import json
import logging
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_util

from unseg.structures import RLE

logger = logging.getLogger(__name__)

Annotation = dict[str, Any]

# Metadata that say where ground truth comes from, for the results table.
_ORIGINS = ("json_file", "annotation_file", "pseudo_mask_file", "dirname")


@dataclass(frozen=True)
class GroundTruth:
    """Prepared ground truth.

    Attributes:
        images: by the file's image id; ``id`` inside counts from 1 in the order of the file's ids
            (COCOeval breaks ties between images by that order), height and width in pixels or None.
        annotations: id (from 1), image_id, category_id 1, bbox (XYWH), area, iscrowd, and for the
            mask task a run-length encoding.
    """

    images: dict[Hashable, Annotation]
    annotations: list[Annotation]


def to_rle(segmentation: Any, height: int | None, width: int | None, where: str) -> RLE:
    """The run-length encoding that pycocotools makes of a COCO segmentation.

    Args:
        segmentation: polygons, or a compressed or uncompressed run-length encoding.
        height, width: of the image in pixels; None (unknown) will do for encodings.
        where: names the annotation in errors.

    Raises:
        ValueError: polygons for an image of unknown size, none of three points, or an encoding of
            another size.
    """
    if isinstance(segmentation, dict):
        size = list(segmentation["size"])
        if height is not None and size != [height, width]:
            raise ValueError(f"{where}: the mask is {size}, its image {[height, width]} (H, W)")
        if isinstance(segmentation["counts"], list):
            return mask_util.frPyObjects(segmentation, *size)
        return segmentation
    if height is None:
        raise ValueError(f"{where}: polygons need the height and width of their image")
    # Shorter ones have no pixels, but if one comes first pycocotools takes all of them for boxes.
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    if not polygons:
        raise ValueError(f"{where}: no polygon has three points")
    return mask_util.merge(mask_util.frPyObjects(polygons, height, width))


def tasks_of_ground_truth(annotations: Sequence[Annotation], name: str) -> tuple[str, ...]:
    """("bbox", "segm"), or ("bbox",) with a warning if some object of data set `name` has no mask.

    Masks of a part of the objects are not evaluated: found objects of the rest would be errors.
    """
    without = sum(not annotation.get("segmentation") for annotation in annotations)
    if not without:
        return ("bbox", "segm")
    logger.warning(
        "masks are not evaluated: %d of %d objects of %s have boxes only",
        without,
        len(annotations),
        name,
    )
    return ("bbox",)


def _by_category(annotations: Iterable[Annotation]) -> list[Annotation]:
    """Stable sort by category: the order in which useCats=0 sees them, which decides ties."""
    return sorted(annotations, key=lambda annotation: annotation.get("category_id") or 0)


def prepare_ground_truth(coco: dict[str, Any], task: str) -> GroundTruth:
    """Ground truth of a COCO file's content for the task "bbox" or "segm".

    Annotations of images that are not listed are left out with a warning.

    Raises:
        ValueError: image ids that cannot be sorted together or are not unique; an annotation with
            neither box nor mask, or without a mask for "segm"; a mask of the wrong size.
    """
    try:
        records = sorted(coco["images"], key=lambda image: image["id"])
    except TypeError as error:
        raise ValueError(f"image ids must be all integers or all strings: {error}") from error
    images = {
        image["id"]: {"id": n, "height": image.get("height"), "width": image.get("width")}
        for n, image in enumerate(records, 1)
    }
    if len(images) != len(records):
        raise ValueError("image ids of the ground truth are not unique")
    annotations = []
    source = coco.get("annotations", [])
    for annotation in _by_category(a for a in source if a["image_id"] in images):
        prepared = _prepare_object(annotation, images[annotation["image_id"]], task)
        annotations.append(prepared | {"id": len(annotations) + 1})
    if len(annotations) < len(source):
        logger.warning("%d annotations are of unlisted images", len(source) - len(annotations))
    return GroundTruth(images, annotations)


def _prepare_object(annotation: Annotation, image: Annotation, task: str) -> Annotation:
    where = f"annotation {annotation.get('id', '?')} of image {annotation['image_id']}"
    box, area, rle = annotation.get("bbox"), annotation.get("area"), None
    if annotation.get("segmentation") and (task == "segm" or box is None or area is None):
        rle = to_rle(annotation["segmentation"], image["height"], image["width"], where)
    elif task == "segm":
        raise ValueError(f"{where} has no segmentation, so masks cannot be evaluated")
    elif box is None:
        raise ValueError(f"{where} has neither a box nor a segmentation")
    box = mask_util.toBbox(rle).tolist() if box is None else [float(x) for x in box]
    if area is None:
        area = box[2] * box[3] if rle is None else mask_util.area(rle)
    prepared = {
        "image_id": image["id"],
        "category_id": 1,
        "bbox": box,
        "area": float(area),
        "iscrowd": int(annotation.get("iscrowd", 0)),
    }
    return prepared | ({"segmentation": rle} if task == "segm" else {})


def prepare_detections(
    results: Sequence[Annotation], ground_truth: GroundTruth, task: str
) -> list[Annotation]:
    """Detections in COCO's result format, for :func:`prepare_ground_truth`'s images.

    Raises:
        ValueError: an unknown image, a score or box that is not finite, neither box nor mask, no
            mask for "segm", a mask of another size than its image.
    """
    detections = []
    for n, result in enumerate(_by_category(results), 1):
        image = ground_truth.images.get(result["image_id"])
        if image is None:
            raise ValueError(f"image {result['image_id']!r} is not in the ground truth")
        where = f"a detection of image {result['image_id']!r}"
        score = float(result["score"])
        if not math.isfinite(score):
            raise ValueError(f"{where} has the score {score}")
        box, rle = result.get("bbox"), result.get("segmentation")
        if rle is not None and (task == "segm" or box is None):
            rle = to_rle(rle, image["height"], image["width"], where)
        elif task == "segm":
            raise ValueError(f"{where} has no mask")
        if box is not None and not all(math.isfinite(x) for x in box):
            raise ValueError(f"{where} has the box {list(box)}")
        if box is None and rle is None:
            raise ValueError(f"{where} has neither a box nor a mask")
        detection = {"id": n, "image_id": image["id"], "category_id": 1, "score": score}
        _set_box_and_area(detection, box, rle, task)
        detections.append(detection | {"iscrowd": 0})
    return detections


def _set_box_and_area(detection: Annotation, box: Any, rle: RLE | None, task: str) -> None:
    """Sizes are by mask area for "segm", by box for "bbox", as COCO.loadRes does."""
    # One call per mask: with numpy 2, pycocotools 2.0.11 has no area for lists of more than 255.
    if task == "segm":
        detection["segmentation"] = rle
        detection["area"] = float(mask_util.area(rle))
        detection["bbox"] = mask_util.toBbox(rle).tolist()
    else:
        box = mask_util.toBbox(rle).tolist() if box is None else [float(x) for x in box]
        detection["area"] = box[2] * box[3]
        detection["bbox"] = box


def coco_from_dataset_dicts(dataset_dicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of a COCO file for Detectron2's dataset dicts.

    Boxes of any axis-aligned mode, segmentations, iscrowd, and (where a loader kept them) areas are
    taken over; what is missing is completed by :func:`prepare_ground_truth`.
    """
    images, annotations = [], []
    for record in dataset_dicts:
        images.append(
            {
                "id": record["image_id"],
                "height": record.get("height"),
                "width": record.get("width"),
                "file_name": record.get("file_name"),
            }
        )
        for annotation in record.get("annotations", []):
            kept = {
                key: annotation[key]
                for key in ("segmentation", "area", "iscrowd", "category_id")
                if key in annotation
            }
            if "bbox" in annotation:
                # An array, because BoxMode rounds lists to float32.
                box = np.asarray(annotation["bbox"], dtype=np.float64).reshape(1, 4)
                box = BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYWH_ABS)
                kept["bbox"] = box[0].tolist()
            annotations.append(kept | {"id": len(annotations) + 1, "image_id": record["image_id"]})
    return {
        "info": {},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [],
    }


def dataset_ground_truth(dataset_name: str) -> tuple[dict[str, Any], str]:
    """The content of a COCO file for a registered dataset, class-aware or not, and its origin.

    The dataset dicts are the ground truth, whatever their files hold besides. Detectron2's own
    loaders drop the areas by which COCO defines sizes (they are areas of polygons, not of pixels),
    so areas that the dicts lack are looked up in ``metadata.json_file`` where there is one. Nothing
    is cached on disk: a cache named after the dataset goes stale.

    Returns:
        COCO content, and the annotation file or folder as the metadata name it, else the name.

    Raises:
        KeyError: no dataset of that name is registered.
    """
    metadata = MetadataCatalog.get(dataset_name)
    coco = coco_from_dataset_dicts(DatasetCatalog.get(dataset_name))
    json_file = metadata.get("json_file")
    origins = (metadata.get(key) for key in _ORIGINS)
    origin = next((str(found) for found in origins if found), dataset_name)
    if json_file and any("area" not in annotation for annotation in coco["annotations"]):
        _add_areas(coco["annotations"], json_file)
    return coco, origin


def _add_areas(annotations: list[Annotation], json_file: str) -> None:
    """Give annotations without an area the one that the file has for the same image and box.

    Objects of one box in one image get their areas in the order of the file, which Detectron2's
    loaders keep. For annotations that the file does not have there is one warning.
    """
    with PathManager.open(json_file) as file:
        content = json.load(file)
    areas: dict[Hashable, list[float]] = {}
    for annotation in reversed(content.get("annotations", [])):
        if annotation.get("area") is not None and annotation.get("bbox"):
            areas.setdefault(_place(annotation), []).append(annotation["area"])
    missing = 0
    for annotation in annotations:
        if "area" in annotation:
            continue
        found = areas.get(_place(annotation)) if "bbox" in annotation else None
        if found:
            annotation["area"] = found.pop()
        else:
            missing += 1
    if missing:
        logger.warning(
            "%d of %d objects have no area, and %s does not have them: their sizes are by pixels",
            missing,
            len(annotations),
            json_file,
        )


def _place(annotation: Annotation) -> Hashable:
    # Rounded, because a loader may have gone through corners (or float32) and back.
    return annotation["image_id"], tuple(round(float(x), 2) for x in annotation["bbox"])
