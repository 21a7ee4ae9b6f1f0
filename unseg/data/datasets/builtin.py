"""Data sets that Detectron2 does not register: class-agnostic ones, COCO-20k, UVO, images alone.

All have one class, "object", and are read from the official annotation files when they are asked
for (categories are merged then), or from the files of CutLER's layout under ``unseg_cutler_*``.
datasets/README.md shows the trees. No name is one that Detectron2, AdelaiDet or CutLER registers,
so that these packages can be imported together.

``json_file`` is not among the metadata: Detectron2's COCOEvaluator would read the categories of
that file past the merged ones and score one class of 80. The path is in ``annotation_file``.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from unseg.data.datasets.coco_json import (
    default_root,
    find_file,
    load_class_agnostic_json,
)
from unseg.data.datasets.video_frames import load_class_agnostic_frames
from unseg.data.datasets.voc import load_voc_boxes, load_voc_instances
from unseg.discovery.io import CATEGORY

EVALUATOR_TYPE = "coco_class_agnostic"

# name: (folder of images, annotation file); paths below the root.
COCO_FILES = {
    "unseg_coco_2017_train_cls_agnostic": (
        "coco/train2017",
        "coco/annotations/instances_train2017.json",
    ),
    "unseg_coco_2017_val_cls_agnostic": (
        "coco/val2017",
        "coco/annotations/instances_val2017.json",
    ),
    # Written by datasets/prepare_coco20k.py.
    "unseg_coco_20k_cls_agnostic": (
        "coco/train2014",
        "coco/annotations/instances_coco20k.json",
    ),
    # The "frame set": 1 frame a second, annotated exhaustively.
    "unseg_uvo_train_cls_agnostic": (
        "UVO/uvo_videos_sparse_frames",
        "UVO/FrameSet/UVO_frame_train.json",
    ),
    "unseg_uvo_val_cls_agnostic": (
        "UVO/uvo_videos_sparse_frames",
        "UVO/FrameSet/UVO_frame_val.json",
    ),
    # Derived files as CutLER's instructions lay them out.
    "unseg_cutler_coco": (
        "coco/val2017",
        "coco/annotations/coco_cls_agnostic_instances_val2017.json",
    ),
    "unseg_cutler_coco20k": ("coco/train2014", "coco/annotations/coco20k_trainval_gt.json"),
    "unseg_cutler_lvis": ("coco", "coco/annotations/lvis1.0_cocofied_val_cls_agnostic.json"),
    "unseg_cutler_voc": ("voc", "voc/annotations/trainvaltest_2007_cls_agnostic.json"),
    "unseg_cutler_uvo": (
        "uvo/all_UVO_frames",
        "uvo/annotations/val_sparse_cleaned_cls_agnostic.json",
    ),
}
# Where copies of a file are found besides.
OTHER_PLACES = {
    "coco/annotations/lvis1.0_cocofied_val_cls_agnostic.json": (
        "lvis/lvis1.0_cocofied_val_cls_agnostic.json",
        "lvis/annotations/lvis1.0_cocofied_val_cls_agnostic.json",
    ),
}
# Part of a file: so many images, the first by their ids.
FIRST_IMAGES = {
    # What proposal methods are measured on since DeepMask.
    "unseg_coco_2014_val_first5k_cls_agnostic": (
        "coco/val2014",
        "coco/annotations/instances_val2014.json",
        5000,
    ),
}
# Images without annotations: no evaluator.
UNLABELED_FILES = {
    "unseg_coco_2017_unlabeled": (
        "coco/unlabeled2017",
        "coco/annotations/image_info_unlabeled2017.json",
    ),
}
# Images are named by coco_url, below coco/.
LVIS_FILES = {
    "unseg_lvis_v1_train_cls_agnostic": ("coco", "lvis/lvis_v1_train.json"),
    "unseg_lvis_v1_val_cls_agnostic": ("coco", "lvis/lvis_v1_val.json"),
    "unseg_lvis_v0.5_train_cls_agnostic": ("coco", "lvis/lvis_v0.5_train.json"),
    "unseg_lvis_v0.5_val_cls_agnostic": ("coco", "lvis/lvis_v0.5_val.json"),
}
# In the YouTube-VIS form, read as frames. The official valid and test files have no annotations.
VIDEO_FILES = {
    **{
        f"unseg_ytvis_{year}_{split}_frames_cls_agnostic": (
            f"ytvis_{year}/{split}/JPEGImages",
            f"ytvis_{year}/{split}.json",
        )
        for year in (2019, 2021)
        for split in ("train", "valid", "test")
    },
    **{
        f"unseg_ovis_{split}_frames_cls_agnostic": (
            f"ovis/Images/{split}",
            f"ovis/annotations_{split}.json",
        )
        for split in ("train", "valid", "test")
    },
    "unseg_uvo_train_dense_cls_agnostic": (
        "UVO/uvo_videos_dense_frames",
        "UVO/VideoDenseSet/UVO_video_train_dense.json",
    ),
    "unseg_uvo_val_dense_cls_agnostic": (
        "UVO/uvo_videos_dense_frames",
        "UVO/VideoDenseSet/UVO_video_val_dense.json",
    ),
    "unseg_uvo_train_sparse_video_cls_agnostic": (
        "UVO/uvo_videos_sparse_frames",
        "UVO/VideoSparseSet/UVO_sparse_train_video.json",
    ),
    "unseg_uvo_val_sparse_video_cls_agnostic": (
        "UVO/uvo_videos_sparse_frames",
        "UVO/VideoSparseSet/UVO_sparse_val_video.json",
    ),
}
# year: splits of ImageSets/Main. "trainval_test" is what CutLER evaluates on.
VOC_BOX_SPLITS = {
    2007: ("train", "val", "trainval", "test", "trainval_test"),
    2012: ("train", "val", "trainval"),
}
VOC_INSTANCE_SPLITS = {
    2007: ("train", "val", "trainval", "test"),
    2012: ("train", "val", "trainval"),
}


@dataclass(frozen=True)
class BuiltinDataset:
    """A registration: how to load, and what the metadata say besides the class.

    Attributes:
        name: in DatasetCatalog.
        load: the dataset dicts.
        metadata: image_root, and annotation_file or dirname.
        labeled: False: no evaluator.
    """

    name: str
    load: Callable[[], list[dict[str, Any]]]
    metadata: dict[str, Any] = field(default_factory=dict)
    labeled: bool = True


def _load_file(
    loader: Callable[..., list[dict[str, Any]]], candidates: Sequence[str], image_root: str
) -> list[dict[str, Any]]:
    return loader(find_file(candidates), image_root)


def _from_files(
    root: Path, files: dict[str, tuple[str, str]], loader: Callable[..., list[dict[str, Any]]]
) -> Iterator[BuiltinDataset]:
    for name, (images, file) in files.items():
        image_root = str(root / images)
        candidates = [str(root / path) for path in (file, *OTHER_PLACES.get(file, ()))]
        yield BuiltinDataset(
            name,
            functools.partial(_load_file, loader, candidates, image_root),
            {"image_root": image_root, "annotation_file": candidates[0]},
            labeled=files is not UNLABELED_FILES,
        )


def _load_first(
    json_file: str | os.PathLike, image_root: str | os.PathLike, *, count: int
) -> list[dict[str, Any]]:
    """The `count` images of the lowest ids."""
    return load_class_agnostic_json(json_file, image_root)[:count]


def _voc(root: Path) -> Iterator[BuiltinDataset]:
    for year, splits in VOC_BOX_SPLITS.items():
        folder = str(root / f"VOC{year}")
        metadata = {"dirname": folder, "image_root": os.path.join(folder, "JPEGImages")}
        for split in splits:
            name = f"unseg_voc_{year}_{split}_cls_agnostic"
            load = functools.partial(load_voc_boxes, folder, split.replace("_", "+"))
            yield BuiltinDataset(name, load, metadata)
            load = functools.partial(load, keep_difficult=False)
            yield BuiltinDataset(f"{name}_no_difficult", load, metadata)
        for split in VOC_INSTANCE_SPLITS[year]:
            load = functools.partial(load_voc_instances, folder, split)
            yield BuiltinDataset(f"unseg_voc_{year}_{split}_instances", load, metadata)


def builtin_datasets(root: str | os.PathLike) -> list[BuiltinDataset]:
    """All data sets of this page below a root folder; nothing is read."""
    root = Path(root).expanduser()
    lvis = functools.partial(load_class_agnostic_json, file_name_from_url=True)
    return [
        *_from_files(root, COCO_FILES, load_class_agnostic_json),
        *(
            dataset
            for name, (images, file, count) in FIRST_IMAGES.items()
            for dataset in _from_files(
                root, {name: (images, file)}, functools.partial(_load_first, count=count)
            )
        ),
        *_from_files(root, UNLABELED_FILES, load_class_agnostic_json),
        *_from_files(root, LVIS_FILES, lvis),
        *_from_files(root, VIDEO_FILES, load_class_agnostic_frames),
        *_voc(root),
    ]


def register_builtin_datasets(root: str | os.PathLike | None = None) -> None:
    """Register all of them with Detectron2; a second call moves them to its root.

    Args:
        root: folder of all data sets. None: ``$DETECTRON2_DATASETS``, else ``datasets``.
    """
    for dataset in builtin_datasets(default_root() if root is None else root):
        if dataset.name in DatasetCatalog.list():
            DatasetCatalog.remove(dataset.name)
            MetadataCatalog.remove(dataset.name)
        DatasetCatalog.register(dataset.name, dataset.load)
        kind = {"evaluator_type": EVALUATOR_TYPE} if dataset.labeled else {}
        MetadataCatalog.get(dataset.name).set(
            thing_classes=[CATEGORY["name"]], **dataset.metadata, **kind
        )
