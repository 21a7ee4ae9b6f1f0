"""The objects of a dataset dict as one map of numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from unseg.discovery.rle import parse_segmentation


def instance_index_map(
    annotations: Sequence[dict[str, Any]], height: int, width: int
) -> np.ndarray:
    """Which object each pixel of an image belongs to.

    A map cannot hold two objects in one pixel (masks of OVIS and COCO do overlap): the later one
    wins, so an object that is wholly covered is not in the map. Crowds are left out.

    Args:
        annotations: in Detectron2's form; ``segmentation`` holds polygons or a COCO run-length
            encoding, compressed or not.
        height, width: of the image file, in pixels.

    Returns:
        (H, W) int32: 0 is the background, i + 1 annotation i (crowds keep their number).

    Raises:
        ValueError: an annotation has no mask, or one that is malformed or of another size.
    """
    index_map = np.zeros((height, width), dtype=np.int32)
    for number, annotation in enumerate(annotations):
        if annotation.get("iscrowd", 0):
            continue
        if not annotation.get("segmentation"):
            raise ValueError(f"annotation {number} has no segmentation")
        try:
            rle = parse_segmentation(annotation["segmentation"], height, width)
        except ValueError as error:
            raise ValueError(f"annotation {number}: {error}") from error
        index_map[mask_util.decode(rle).view(bool)] = number + 1
    return index_map
