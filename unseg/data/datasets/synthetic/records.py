"""Dataset dicts of a set of scenes: Detectron2's standard form, LVIS's and YouTube-VIS's.

Nothing but masks is rendered for them. A set's dicts are made once per process and kept as bytes;
every call gets fresh copies, which the caller may change.
"""

import pickle
from functools import cache
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode

from unseg.data.datasets.synthetic.catalogue import (
    PART_NAMES,
    build_catalogue,
    frequency_groups,
    thing_and_part_groups,
)
from unseg.data.datasets.synthetic.clips import render_clip
from unseg.data.datasets.synthetic.presets import SceneSet
from unseg.data.datasets.synthetic.scene import Scene, render_scene
from unseg.data.datasets.synthetic.uri import frame_uri, image_uri

Record = dict[str, Any]
IDS_PER_CLIP = 1000  # instance ids of clip i are i * 1000 + 1, 2, ...


def load_records(scenes: SceneSet) -> list[Record]:
    """The dataset dicts of a set, in the form its style asks for.

    instances: file_name, image_id (from 0), height, width, annotations with bbox (XYWH_ABS, tight
        around the visible pixels), category_id (from 0), segmentation (compressed COCO RLE with
        text counts), area in pixels, iscrowd 0, and `touching`: whether the object borders on
        another one in the image (they share a side of a pixel).
    lvis: the same, and per image neg_category_ids and not_exhaustive_category_ids (from 1, as
        Detectron2 leaves LVIS's), per annotation an id (from 1) and `parts`: a list of dicts with
        category_id (index into the metadata's part_classes), bbox, bbox_mode, segmentation, area.
    parts: as `instances`, with parts as annotations too: after each object's its parts', whose
        category_id is num_categories + their part class and which have `parent`, the number of the
        object's annotation in the image (None for objects). Objects keep the pixels of their parts,
        and parts touch their object.
    video: one dict per clip as Mask2Former's YouTube-VIS loader makes them: video_id (from 0),
        file_names, length, height, width, and annotations: for each frame the list of its visible
        instances, each with id (the same through the clip), category_id, bbox, bbox_mode,
        segmentation, area, iscrowd. Instances hidden in a frame are missing from its list.
    frames: the frames of such clips as `instances` dicts, which also have video_id and frame (both
        from 0); image_id is video_id * 10000 + frame, and each annotation keeps its instance's id
        through the clip as `instance_id`.
    """
    return pickle.loads(_pickled_records(scenes))


@cache
def _pickled_records(scenes: SceneSet) -> bytes:
    make = {
        "instances": _image_record,
        "lvis": _lvis_record,
        "parts": _parts_record,
        "video": _video_record,
        "frames": _frame_records,
    }[scenes.style]
    records: list[Record] = []
    next_id = 1
    for index in range(scenes.count):
        made = make(scenes, index)
        records += made if isinstance(made, list) else [made]
        if scenes.style == "lvis":
            for annotation in made["annotations"]:
                annotation["id"] = next_id
                next_id += 1
    return pickle.dumps(records)


def lvis_ground_truth(scenes: SceneSet) -> Record:
    """A set of the style "lvis" or "parts" as an LVIS v1 annotation dict, for `lvis.LVIS`.

    Category and image ids follow the files of LVIS: categories from 1, images as in the records.
    Images are exhaustively annotated: every category absent from one is among its negatives.
    """
    if scenes.style not in ("lvis", "parts"):
        raise ValueError(
            f"{scenes.split}: LVIS ground truth needs style 'lvis' or 'parts', not {scenes.style!r}"
        )
    records, settings = load_records(scenes), scenes.settings
    names = build_catalogue(settings.num_categories, settings.catalogue_seed).names
    groups = frequency_groups(settings.num_categories)
    if scenes.style == "parts":
        names, groups = names + list(PART_NAMES), thing_and_part_groups(settings)
    images, annotations = [], []
    images_with: dict[int, set[int]] = {}
    for record in records:
        image_id = record["image_id"]
        for annotation in record["annotations"]:
            category = annotation["category_id"] + 1
            images_with.setdefault(category, set()).add(image_id)
            kept = {key: annotation[key] for key in ("bbox", "area", "segmentation")}
            kept |= {"id": len(annotations) + 1, "image_id": image_id, "category_id": category}
            annotations.append(kept)
        images.append(
            {
                "id": image_id,
                "coco_url": record["file_name"],
                "height": record["height"],
                "width": record["width"],
                "neg_category_ids": [
                    c + 1 for c in range(len(names)) if image_id not in images_with.get(c + 1, ())
                ],
                "not_exhaustive_category_ids": [],
            }
        )
    instances = np.bincount([a["category_id"] for a in annotations], minlength=len(names) + 1)
    return {
        "images": images,
        "annotations": annotations,
        "categories": [
            {
                "id": c + 1,
                "name": name,
                "synset": f"{name}.n.01",
                "frequency": groups[c],
                "image_count": len(images_with.get(c + 1, ())),
                "instance_count": int(instances[c + 1]),
            }
            for c, name in enumerate(names)
        ],
    }


def _regions(masks: np.ndarray) -> list[Record]:
    """Segmentation, box and area of each of (N, H, W) masks; none may be empty."""
    if not len(masks):
        return []
    encoded = mask_util.encode(np.asfortranarray(masks.transpose(1, 2, 0).view(np.uint8)))
    boxes, areas = mask_util.toBbox(encoded).tolist(), mask_util.area(encoded).tolist()
    return [
        {
            "bbox": box,
            "bbox_mode": BoxMode.XYWH_ABS,
            "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")},
            "area": int(area),
        }
        for rle, box, area in zip(encoded, boxes, areas)
    ]


def touching_instances(masks: np.ndarray) -> np.ndarray:
    """Which of (N, H, W) disjoint masks share a side of a pixel with another one, (N,) bool."""
    labels = np.full(masks.shape[1:], -1, np.int16)
    for number, mask in enumerate(masks):
        labels[mask] = number
    touching = np.zeros(len(masks), bool)
    for first, second in ((labels[:, 1:], labels[:, :-1]), (labels[1:], labels[:-1])):
        border = (first != second) & (first >= 0) & (second >= 0)
        touching[first[border]] = True
        touching[second[border]] = True
    return touching


def _annotations(scene: Scene) -> list[Record]:
    """One annotation per row of `masks`, which must not be empty."""
    touching = touching_instances(scene.masks)
    return [
        {**region, "category_id": int(category), "iscrowd": 0, "touching": bool(touches)}
        for region, category, touches in zip(_regions(scene.masks), scene.categories, touching)
    ]


def _image_fields(scenes: SceneSet, file_name: str, image_id: int) -> Record:
    height, width = scenes.settings.size
    return {"file_name": file_name, "image_id": image_id, "height": height, "width": width}


def _image_record(scenes: SceneSet, index: int) -> Record:
    scene = render_scene(scenes.settings, scenes.seed, index, with_image=False)
    fields = _image_fields(scenes, image_uri(scenes.split, index), index)
    return {**fields, "annotations": _annotations(scene)}


def _lvis_record(scenes: SceneSet, index: int) -> Record:
    scene = render_scene(scenes.settings, scenes.seed, index, with_image=False)
    annotations = _annotations(scene)
    for annotation in annotations:
        annotation["parts"] = []
    parts = zip(_regions(scene.part_masks), scene.part_categories, scene.part_parents)
    for region, category, parent in parts:
        annotations[parent]["parts"].append({**region, "category_id": int(category)})
    present = set(scene.categories.tolist())
    absent = [c + 1 for c in range(scenes.settings.num_categories) if c not in present]
    return {
        **_image_fields(scenes, image_uri(scenes.split, index), index),
        "neg_category_ids": absent,
        "not_exhaustive_category_ids": [],
        "annotations": annotations,
    }


def _parts_record(scenes: SceneSet, index: int) -> Record:
    record = _lvis_record(scenes, index)
    annotations: list[Record] = []
    for whole in record["annotations"]:
        parts, parent = whole.pop("parts"), len(annotations)
        annotations.append({**whole, "parent": None})
        for part in parts:
            part["category_id"] += scenes.settings.num_categories
            annotations.append({**part, "iscrowd": 0, "touching": True, "parent": parent})
    fields = ("file_name", "image_id", "height", "width")
    return {**{key: record[key] for key in fields}, "annotations": annotations}


def _visible(scene: Scene) -> tuple[Scene, np.ndarray]:
    """The frame without its empty rows, and the numbers of the rows that remain."""
    rows = np.flatnonzero(scene.masks.any(axis=(1, 2)))
    kept = Scene(
        image=scene.image,
        masks=scene.masks[rows],
        categories=scene.categories[rows],
        order=scene.order[rows],
        part_masks=scene.part_masks,
        part_categories=scene.part_categories,
        part_parents=np.searchsorted(rows, scene.part_parents),
    )
    return kept, rows


def _video_record(scenes: SceneSet, index: int) -> Record:
    height, width = scenes.settings.size
    frames = []
    for scene in render_clip(scenes.settings, scenes.seed, index, with_image=False):
        kept, rows = _visible(scene)
        annotations = _annotations(kept)
        for annotation, row in zip(annotations, rows):
            annotation["id"] = index * IDS_PER_CLIP + int(row) + 1
        frames.append(annotations)
    return {
        "video_id": index,
        "file_names": [
            frame_uri(scenes.split, index, frame) for frame in range(scenes.settings.frames)
        ],
        "length": scenes.settings.frames,
        "height": height,
        "width": width,
        "annotations": frames,
    }


def _frame_records(scenes: SceneSet, index: int) -> list[Record]:
    video = _video_record(scenes, index)
    records = []
    for frame, (file_name, annotations) in enumerate(
        zip(video["file_names"], video["annotations"])
    ):
        for annotation in annotations:
            annotation["instance_id"] = annotation.pop("id")
        fields = _image_fields(scenes, file_name, index * 10_000 + frame)
        place = {"video_id": index, "frame": frame}
        records.append({**fields, **place, "annotations": annotations})
    return records
