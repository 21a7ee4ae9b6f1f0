"""COCO-like annotation files (COCO, LVIS, UVO frames) read with all categories taken for one.

The official files are enough: nothing has to be converted first. Kept from them are crowd flags,
areas (COCO's size classes are defined by them, and Detectron2's loader drops them) and, within an
image, the order by category, so that numbers equal pycocotools' ``useCats=0`` on the official file
even in ties.
"""

import json
import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_util

from unseg.discovery.io import CATEGORY

logger = logging.getLogger(__name__)

README = "datasets/README.md"


def find_file(candidates: Sequence[str | os.PathLike]) -> str:
    """The first of some paths that exists.

    Raises:
        FileNotFoundError: none does; the message names all of them and the page with the layout.
    """
    for path in candidates:
        if PathManager.exists(str(path)):
            return str(path)
    paths = " or ".join(str(path) for path in candidates)
    raise FileNotFoundError(
        f"{paths} does not exist. {README} in unseg's repository shows the expected tree; its root "
        "is the environment variable DETECTRON2_DATASETS as it was when unseg was imported"
    )


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a JSON annotation file.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is not JSON, or lists no images or videos.
    """
    with PathManager.open(find_file([path])) as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not ("images" in content or "videos" in content):
        raise ValueError(f"{path} is not a COCO-like file: it has neither 'images' nor 'videos'")
    return content


def url_file_name(image: dict[str, Any]) -> str:
    """``val2017/000000000139.jpg`` from ``coco_url``: LVIS images come from several COCO splits.

    Raises:
        ValueError: the image has no ``coco_url``.
    """
    if not image.get("coco_url"):
        raise ValueError(
            f"image {image.get('id')} has no coco_url to be named by: only LVIS files have it "
            "(file_name_from_url, or --file-name-from-url)"
        )
    return str(PurePosixPath(*PurePosixPath(image["coco_url"]).parts[-2:]))


def merge_categories(
    content: dict[str, Any], *, file_name_from_url: bool = False
) -> dict[str, Any]:
    """A COCO file's content with one category, "object" with id 1.

    Args:
        content: of a COCO, LVIS or UVO frame file; not changed. ``annotations`` may be absent.
        file_name_from_url: name images by the last two parts of ``coco_url`` (LVIS).

    Returns:
        info, licenses, images, annotations (id from 1, image_id, category_id 1, bbox, iscrowd,
        and area and segmentation where there), categories. Fields of images and annotations that
        are about categories are left out.

    Raises:
        ValueError: an annotation without a box, or an image without the URL that is to name it.
    """
    dropped = {"category_id", "neg_category_ids", "not_exhaustive_category_ids"}
    images = [{k: v for k, v in i.items() if k not in dropped} for i in content["images"]]
    if file_name_from_url:
        images = [image | {"file_name": url_file_name(image)} for image in images]
    annotations = []
    for annotation in sorted(content.get("annotations", []), key=_category_of):
        if not annotation.get("bbox"):
            raise ValueError(f"annotation {annotation.get('id')} has no bbox")
        kept = {k: v for k, v in annotation.items() if k not in dropped}
        # Id 0 would not do: COCOeval takes a match with it for no match.
        kept |= {"id": len(annotations) + 1, "category_id": CATEGORY["id"]}
        annotations.append(kept | {"iscrowd": int(annotation.get("iscrowd", 0))})
    return {
        "info": content.get("info", {}),
        "licenses": content.get("licenses", []),
        "images": images,
        "annotations": annotations,
        "categories": [CATEGORY],
    }


def _category_of(annotation: dict[str, Any]) -> int:
    return annotation.get("category_id") or 0


def select_images(content: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A COCO file's content reduced to some images and their annotations.

    Args:
        content: not changed.
        names: file names as in ``images[].file_name``.

    Raises:
        ValueError: a name is not there; the message counts them and gives the first.
    """
    wanted = set(names)
    images = [image for image in content["images"] if image["file_name"] in wanted]
    missing = sorted(wanted - {image["file_name"] for image in images})
    if missing:
        raise ValueError(f"{len(missing)} of {len(wanted)} images are not there: {missing[0]}, ...")
    ids = {image["id"] for image in images}
    annotations = [a for a in content.get("annotations", []) if a["image_id"] in ids]
    return content | {"images": images, "annotations": annotations}


def load_class_agnostic_json(
    json_file: str | os.PathLike, image_root: str | os.PathLike, *, file_name_from_url: bool = False
) -> list[dict[str, Any]]:
    """Dataset dicts of a COCO-like file with one class; images in the order of their ids.

    Annotations have, beside Detectron2's standard fields, ``area`` (pixels, as in the file) and
    ``iscrowd``. A file without annotations (image_info_unlabeled2017.json) gives dicts with none:
    set ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` to False to keep them in training. Annotations
    without a valid polygon (see :func:`dataset_annotation`) or of unlisted images are left out with
    a warning that counts them.

    Args:
        json_file: path of the file.
        image_root: folder of the images.
        file_name_from_url: see :func:`merge_categories`.
    """
    content = merge_categories(read_json(json_file), file_name_from_url=file_name_from_url)
    by_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    invalid = unlisted = 0
    for annotation in content["annotations"]:
        prepared = dataset_annotation(annotation)
        if annotation["image_id"] not in by_image:
            unlisted += 1
        elif prepared is None:
            invalid += 1
        else:
            by_image[annotation["image_id"]].append(prepared)
    warn_left_out(json_file, invalid, unlisted)
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": by_image[image["id"]],
        }
        for image in sorted(content["images"], key=lambda image: image["id"])
    ]


def warn_left_out(json_file: str | os.PathLike, invalid: int, unlisted: int = 0) -> None:
    """Say how many annotations of a file were left out and why, if any were."""
    if invalid or unlisted:
        logger.warning(
            "%s: annotations left out: %d without a valid polygon, %d of unlisted images",
            json_file,
            invalid,
            unlisted,
        )


def dataset_annotation(annotation: dict[str, Any]) -> dict[str, Any] | None:
    """One COCO annotation as in Detectron2's dataset dicts, class 0; None if its mask is invalid.

    Uncompressed run-length encodings are compressed. The rule for polygons is that of Detectron2's
    loader, so that `coco_2017_val` and our registrations of the same file hold the same objects:
    polygons of less than three points are left out (they have no pixels, and would stop the
    mappers), and so is an object that has no other polygon, box included: its mask is unknown, and
    pycocotools raises a TypeError for it. An object that has no segmentation at all keeps its box.
    """
    result = {
        "bbox": annotation["bbox"],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": int(annotation.get("iscrowd", 0)),
    }
    if annotation.get("area") is not None:
        result["area"] = annotation["area"]
    mask = annotation.get("segmentation")
    if isinstance(mask, dict):
        if isinstance(mask["counts"], list):
            mask = mask_util.frPyObjects(mask, *mask["size"])
        result["segmentation"] = mask
    elif mask:
        polygons = [p for p in mask if len(p) >= 6 and len(p) % 2 == 0]
        if not polygons:
            return None
        result["segmentation"] = polygons
    return result


def default_root() -> Path:
    """The root of all data sets: ``$DETECTRON2_DATASETS``, else ``datasets``, as in Detectron2."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()
