"""Pseudo-mask files as Detectron2 data sets: ``x.json@DIR`` in DATASETS.TRAIN or DATASETS.TEST."""

from collections.abc import Iterable, Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from unseg.discovery.io import CATEGORY, load_pseudo_masks
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

    Annotations carry ``score`` and, where there is one, ``embedding`` (float32 array) beside
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


def register_pseudo_masks(name: str, json_file: str, image_root: str) -> None:
    """Register a pseudo-mask file (or any COCO JSON, read class-agnostically) as a data set.

    Args:
        name: the name to register.
        json_file: see :func:`unseg.discovery.load_pseudo_masks`.
        image_root: folder or URI prefix of the file names, or the name of a registered data set
            whose ``image_root`` to use.
    """
    if image_root in DatasetCatalog.list():
        root = MetadataCatalog.get(image_root).get("image_root")
        if root is None:
            raise ValueError(f"{name}: the data set {image_root} does not say where its images are")
        image_root = root
    DatasetCatalog.register(
        name, lambda: list(to_dataset_dicts(load_pseudo_masks(json_file), image_root))
    )
    MetadataCatalog.get(name).set(
        thing_classes=[CATEGORY["name"]],
        evaluator_type="coco_class_agnostic",
        image_root=image_root,
        pseudo_mask_file=json_file,
    )


def register_datasets_in_config(cfg: CfgNode) -> None:
    """Register every ``x.json@DIR`` of DATASETS.TRAIN and DATASETS.TEST, once per process.

    Raises:
        ValueError: the part after the @ is missing.
    """
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if _SEPARATOR not in name or name in DatasetCatalog.list():
            continue
        stem, image_root = name.split(_SEPARATOR, 1)
        if not image_root:
            raise ValueError(
                f"data set {name!r}: write x.json@DIR, where DIR holds the images or is the name "
                "of a registered data set"
            )
        register_pseudo_masks(name, f"{stem}.json", image_root)
