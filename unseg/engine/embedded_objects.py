"""The objects of an image whose embeddings are kept: those that a model finds, or its annotations.

Legend: N objects of an image, D embedding dimensions, H W the image's height and width in pixels.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import BoxMode, Instances
from pycocotools import mask as mask_util
from torch import Tensor

from unseg.data import EmbeddingRows
from unseg.discovery.rle import parse_segmentation
from unseg.engine.proposal_files import encode_masks_of
from unseg.structures import RLE, ImageRecord

HEADS = "MODEL.ROI_HEADS.NAME must be one of the HierarchicalEmbedding... heads"


@dataclass(frozen=True, eq=False)
class Objects:
    """Objects of one image.

    Attributes:
        boxes: float32 (N, 4) XYXY in pixels of the image file.
        scores: float32 (N,).
        classes: int64 (N,), -1 where unknown.
        masks: N compressed encodings of (H, W), or None.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: list[RLE] | None

    def __len__(self) -> int:
        return len(self.boxes)


def found_objects(output: dict[str, Any], size: tuple[int, int]) -> tuple[Objects, np.ndarray]:
    """The objects in a model's output for one image, and their tangents (N, D) float32.

    Args:
        output: its ``instances``, at the original image size, have ``scores``, ``pred_boxes``,
            ``pred_tangents`` (N, D) and, if the model gives masks, ``pred_masks``.
        size: (H, W) of the image.

    Raises:
        ValueError: a field is missing or of another length or shape, NaN/inf, another image size,
            malformed masks.
    """
    instances: Instances | None = output.get("instances") if isinstance(output, dict) else None
    if instances is None:
        raise ValueError("the model's output has no 'instances'")
    if tuple(instances.image_size) != size:
        raise ValueError(f"instances are of an image of {instances.image_size}, it is {size}")
    values = instances.get_fields()
    if "pred_tangents" not in values:
        raise ValueError(f"the instances have no pred_tangents, but {sorted(values)}: {HEADS}")
    for key in ("scores", "pred_boxes"):
        if key not in values:
            raise ValueError(f"the instances have no {key}, but {sorted(values)}")
    tangents = _checked(values["pred_tangents"], 2, "pred_tangents")
    masks = None
    if "pred_masks" in values:
        masks = encode_masks_of(values["pred_masks"], size)
    objects = Objects(
        boxes=_checked(values["pred_boxes"].tensor, 2, "pred_boxes"),
        scores=_checked(values["scores"], 1, "scores"),
        classes=np.full(len(tangents), -1, dtype=np.int64),
        masks=masks,
    )
    return objects, tangents


def _checked(values: Tensor, axes: int, name: str) -> np.ndarray:
    array = values.detach().float().cpu().numpy()
    if array.ndim != axes:
        raise ValueError(f"{name} must have {axes} axes, it is {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} are NaN/inf")
    return array


def annotated_objects(
    annotations: Sequence[dict[str, Any]], size: tuple[int, int]
) -> tuple[Objects, int]:
    """The annotated objects of an image in Detectron2's format, with scores 1.

    Args:
        annotations: with ``bbox``, ``bbox_mode``, ``category_id`` and ``segmentation``.
        size: (H, W) of the image.

    Returns:
        the objects, and how many annotations were left out: crowd regions and those whose mask or
        box has no pixel.

    Raises:
        ValueError: an annotation has no mask, or a malformed one; the message says which.
    """
    masks, boxes, classes = [], [], []
    for number, annotation in enumerate(annotations):
        if annotation.get("iscrowd"):
            continue
        where = f"annotations[{number}]"
        if annotation.get("segmentation") is None:
            raise ValueError(f"{where} has no segmentation: masks are embedded")
        try:
            mask = parse_segmentation(_as_lists(annotation["segmentation"]), *size)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        mode = BoxMode(annotation["bbox_mode"])
        box = BoxMode.convert(list(map(float, annotation["bbox"])), mode, BoxMode.XYXY_ABS)
        if not np.isfinite(box).all():
            raise ValueError(f"{where}: bbox is NaN/inf")
        if mask_util.area(mask) and box[2] > box[0] and box[3] > box[1]:
            masks.append(mask)
            boxes.append(box)
            classes.append(int(annotation["category_id"]))
    objects = Objects(
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        scores=np.ones(len(boxes), dtype=np.float32),
        classes=np.array(classes, dtype=np.int64),
        masks=masks,
    )
    return objects, len(annotations) - len(objects)


def _as_lists(segmentation: Any) -> Any:
    """Polygons may be arrays, sizes tuples."""
    if isinstance(segmentation, dict):
        return segmentation | {"size": [int(x) for x in segmentation["size"]]}
    return [np.asarray(polygon, dtype=float).tolist() for polygon in segmentation]


def decode_masks(masks: Sequence[RLE], height: int, width: int) -> Tensor:
    """bool (N, H, W); N may be 0."""
    if not masks:
        return torch.zeros((0, height, width), dtype=torch.bool)
    decoded = mask_util.decode(list(masks))  # (H, W, N)
    return torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1))).bool()


def to_entry(objects: Objects, tangents: np.ndarray) -> dict[str, Any]:
    """An image's objects and their tangents (N, D) float32 as JSON, to the last bit."""
    entry = {
        "boxes": _to_text(objects.boxes, "<f4"),
        "scores": _to_text(objects.scores, "<f4"),
        "classes": _to_text(objects.classes, "<i8"),
        "tangents": _to_text(tangents, "<f4"),
        "dim": tangents.shape[1],
        "masks": None,
    }
    if objects.masks is not None:
        counts = [mask["counts"] for mask in objects.masks]
        entry["masks"] = [c.decode() if isinstance(c, bytes) else c for c in counts]
    return entry


def to_rows(images: Sequence[tuple[ImageRecord, dict[str, Any]]], dim: int) -> EmbeddingRows:
    """Rows of a store: some images, in order, with their entries of :func:`to_entry`.

    Raises:
        ValueError: an entry's embeddings do not have `dim` dimensions, or some objects have masks
            and others none.
    """
    ids: list[int | str] = []
    masks: list[RLE] = []
    with_masks = set()
    for image, entry in images:
        if entry["dim"] != dim:
            raise ValueError(
                f"embeddings of {image.file_name} have {entry['dim']} dimensions, others {dim}"
            )
        count = len(_from_text(entry["scores"], "<f4"))
        ids += [image.image_id] * count
        size = [image.height, image.width]
        masks += [{"size": size, "counts": c.encode()} for c in entry["masks"] or ()]
        with_masks |= {entry["masks"] is not None} if count else set()
    if len(with_masks) == 2:
        raise ValueError("some objects have masks, others have none")

    def join(key: str, kind: str) -> np.ndarray:
        parts = [_from_text(entry[key], kind) for _, entry in images]
        return np.concatenate(parts) if parts else _from_text("", kind)

    boxes = join("boxes", "<f4").reshape(-1, 4)
    if False in with_masks:
        areas = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64).prod(axis=1).round()
    else:
        areas = np.array([int(mask_util.area(mask)) for mask in masks], dtype=np.int64)
    return EmbeddingRows(
        image_ids=np.array(ids, dtype=None if ids else np.int64),
        scores=join("scores", "<f4"),
        boxes=boxes,
        areas=areas.astype(np.int64),
        classes=join("classes", "<i8"),
        tangents=join("tangents", "<f4").reshape(-1, dim),
        masks=None if False in with_masks else masks,
    )


def _to_text(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(values.astype(kind).tobytes()).decode()


def _from_text(text: str, kind: str) -> np.ndarray:
    """What :func:`_to_text` was given, in the machine's own byte order."""
    array = np.frombuffer(base64.b64decode(text), dtype=kind)
    return array.astype(array.dtype.newbyteorder("="))
