"""PASCAL VOC with one class: boxes from the XML files, instance masks from the segmentation PNGs.

Trees (``VOC2007``, ``VOC2012``): ``Annotations/*.xml``, ``SegmentationObject/*.png``,
``JPEGImages/*.jpg``, and the lists of splits in ``ImageSets/Main`` (boxes) and
``ImageSets/Segmentation`` (masks).
"""

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from unseg.data.datasets.coco_json import find_file

# In the segmentation PNGs: the seam around objects and regions left unlabeled.
VOID = 255


def read_split(folder: str | os.PathLike, kind: str, split: str) -> list[str]:
    """Image names of a split.

    Args:
        folder: of one year, e.g. ``.../VOC2007``.
        kind: "Main" or "Segmentation".
        split: "train", "val", "trainval", "test", or several joined by "+".

    Raises:
        FileNotFoundError: there is no such list.
    """
    names = []
    for part in split.split("+"):
        path = find_file([Path(folder, "ImageSets", kind, f"{part}.txt")])
        # Some copies have a second column (a class label, or +1/-1).
        lines = Path(path).read_text().splitlines()
        names += [line.split()[0] for line in lines if line.strip()]
    return names


def _record(folder: str | os.PathLike, name: str, height: int, width: int) -> dict[str, Any]:
    return {
        "file_name": str(Path(folder, "JPEGImages", f"{name}.jpg")),
        "image_id": name,
        "height": height,
        "width": width,
    }


def load_voc_boxes(
    folder: str | os.PathLike, split: str, *, keep_difficult: bool = True
) -> list[dict[str, Any]]:
    """Dataset dicts with the boxes of a split, all of class 0.

    VOC counts pixels from 1 and includes the last one, so a box is (xmin - 1, ymin - 1, xmax, ymax)
    in continuous coordinates.

    Args:
        folder: of one year.
        split: a list in ``ImageSets/Main``, or several joined by "+".
        keep_difficult: also objects marked "difficult". VOC itself neither rewards nor punishes
            finding them; papers on class-agnostic detection rarely say what they did.

    Raises:
        FileNotFoundError: the list or an XML file is missing.
    """
    return _load(
        folder, read_split(folder, "Main", split), lambda name: _boxes(folder, name, keep_difficult)
    )


def load_voc_instances(folder: str | os.PathLike, split: str) -> list[dict[str, Any]]:
    """Dataset dicts with the instance masks of a split, all of class 0.

    The unlabeled seam around objects belongs to no mask, so boxes (tight around the masks) are a
    few pixels smaller than those of the XML files.

    Args:
        folder: of one year.
        split: a list in ``ImageSets/Segmentation``, or several joined by "+".

    Raises:
        FileNotFoundError: the list or a PNG file is missing.
    """
    return _load(
        folder, read_split(folder, "Segmentation", split), lambda name: _instances(folder, name)
    )


def _load(
    folder: str | os.PathLike,
    names: list[str],
    read: Callable[[str], tuple[int, int, list[dict[str, Any]]]],
) -> list[dict[str, Any]]:
    """Records of some images from a function that gives height, width and annotations."""
    records = []
    for name in names:
        height, width, annotations = read(name)
        records.append(_record(folder, name, height, width) | {"annotations": annotations})
    return records


def _boxes(
    folder: str | os.PathLike, name: str, keep_difficult: bool
) -> tuple[int, int, list[dict[str, Any]]]:
    path = find_file([Path(folder, "Annotations", f"{name}.xml")])
    tree = ElementTree.parse(path)
    annotations = []
    for element in tree.findall("object"):
        if not keep_difficult and element.findtext("difficult", "0").strip() == "1":
            continue
        sides = ("xmin", "ymin", "xmax", "ymax")
        x0, y0, x1, y1 = (float(element.findtext(f"bndbox/{side}")) for side in sides)
        box = [x0 - 1, y0 - 1, x1, y1]
        annotations.append(_annotation(box, (box[2] - box[0]) * (box[3] - box[1])))
    height, width = (int(tree.findtext(f"size/{side}")) for side in ("height", "width"))
    return height, width, annotations


def _instances(folder: str | os.PathLike, name: str) -> tuple[int, int, list[dict[str, Any]]]:
    path = find_file([Path(folder, "SegmentationObject", f"{name}.png")])
    with Image.open(path) as image:
        ids = np.array(image)  # palette indices: 0 background, 1.. objects
    annotations = []
    for number in np.setdiff1d(ids, (0, VOID)):
        rle = mask_util.encode(np.asfortranarray(ids == number, dtype=np.uint8))
        x, y, w, h = mask_util.toBbox(rle).tolist()
        annotation = _annotation([x, y, x + w, y + h], float(mask_util.area(rle)))
        annotations.append(annotation | {"segmentation": rle})
    return *ids.shape, annotations


def _annotation(box: list[float], area: float) -> dict[str, Any]:
    return {
        "bbox": box,
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "area": area,
    }
