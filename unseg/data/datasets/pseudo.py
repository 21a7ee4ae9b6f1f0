"""Pseudo-mask files as Detectron2 data sets: ``x.json@DIR`` in DATASETS.TRAIN or DATASETS.TEST."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from unseg.data.datasets.coco_json import load_class_agnostic_json
from unseg.discovery.io import CATEGORY, parse_pseudo_masks, read_mask_json
from unseg.structures import ImageRecord, PseudoMask

_SEPARATOR = ".json@"


def _annotation(mask: PseudoMask) -> dict[str, Any]:
    annotation = {
        "bbox": mask.box,
        "bbox_mode": BoxMode.XYWH_ABS,
        "area": mask.area,
        "segmentation": mask.rle,
        "category_id": 0,
        "iscrowd": 0,
        "score": mask.score,
    }
    if mask.embedding is not None:
        annotation["embedding"] = mask.embedding
    return annotation


def to_dataset_dicts(records: Iterable[ImageRecord], image_root: str) -> Iterator[dict[str, Any]]:
    """Class-agnostic Detectron2 dataset dicts (category 0) of pseudo-mask records.

    Annotations carry ``score`` and, where there is one, ``embedding`` (float array) beside
    Detectron2's own fields.
    """
    root = image_root.rstrip("/")
    for record in records:
        yield {
            "file_name": f"{root}/{record.file_name}" if root else record.file_name,
            "image_id": record.image_id,
            "height": record.height,
            "width": record.width,
            "annotations": [_annotation(mask) for mask in record.masks],
        }


def load_masks_or_annotations(json_file: str, image_root: str) -> list[dict[str, Any]]:
    """Class-agnostic dataset dicts of a pseudo-mask file or of an annotation file.

    Masks that something found have scores: they are read by
    :func:`unseg.discovery.load_pseudo_masks`. A file without any score holds annotations: crowd
    flags, areas and boxes without masks are kept, see :func:`load_class_agnostic_json`.
    """
    content = read_mask_json(json_file)
    annotations, images = content["annotations"], content["images"]
    if not annotations or any(isinstance(a, dict) and "score" in a for a in annotations):
        records = parse_pseudo_masks(content, Path(json_file))
        return list(to_dataset_dicts(records, image_root))
    named = all(isinstance(image, dict) and "file_name" in image for image in images)
    return load_class_agnostic_json(json_file, image_root, file_name_from_url=not named)


def image_root_of(dataset_name: str) -> str:
    """Folder or URI prefix of a registered data set's images.

    That is its ``image_root``, or, where the metadata have none, the deepest folder that holds all
    images.

    Raises:
        ValueError: there is neither.
    """
    root = MetadataCatalog.get(dataset_name).get("image_root")
    if root is not None:
        return str(root).rstrip("/")
    folders = {os.path.dirname(d["file_name"]) for d in DatasetCatalog.get(dataset_name)}
    if not folders:
        raise ValueError(f"the data set {dataset_name} does not say where its images are")
    return os.path.commonpath(folders)


def register_pseudo_masks(name: str, json_file: str, image_root: str) -> None:
    """Register a pseudo-mask file (or any COCO JSON, read class-agnostically) as a data set.

    Args:
        name: the name to register.
        json_file: see :func:`load_masks_or_annotations`.
        image_root: folder or URI prefix of the file names, or the name of a registered data set
            whose ``image_root`` to use.
    """
    if image_root in DatasetCatalog.list():
        image_root = image_root_of(image_root)
    DatasetCatalog.register(name, lambda: load_masks_or_annotations(json_file, image_root))
    MetadataCatalog.get(name).set(
        thing_classes=[CATEGORY["name"]],
        evaluator_type="coco_class_agnostic",
        image_root=image_root,
        pseudo_mask_file=json_file,
    )


def split_file_name(name: str) -> tuple[str, str] | None:
    """The file and the image root of a data set that is named ``x.json@DIR``; None for others.

    Raises:
        ValueError: the part after the @ is missing.
    """
    stem, separator, image_root = name.partition(_SEPARATOR)
    if not separator:
        return None
    if not image_root:
        raise ValueError(
            f"data set {name!r}: write x.json@DIR, where DIR holds the images or is the name "
            "of a registered data set"
        )
    return f"{stem}.json", image_root


def register_if_file(name: str) -> str:
    """Register a data set that is named ``x.json@DIR``, once per process; returns the name.

    Raises:
        ValueError: the part after the @ is missing.
    """
    parts = split_file_name(name)
    if parts is not None and name not in DatasetCatalog.list():
        register_pseudo_masks(name, *parts)
    return name


def register_datasets_in_config(cfg: CfgNode) -> None:
    """:func:`register_if_file` for all of DATASETS.TRAIN and DATASETS.TEST."""
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        register_if_file(name)
