"""Files of the YouTube-VIS form (also OVIS, UVO) read as single frames with one class."""

import os
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_util

from unseg.data.datasets.coco_json import (
    dataset_annotation,
    find_file,
    read_json,
    warn_left_out,
)
from unseg.discovery.io import CATEGORY


def load_class_agnostic_frames(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    frame_list: str | os.PathLike | None = None,
    min_instances: int = 0,
    every_n: int = 1,
) -> list[dict[str, Any]]:
    """Dataset dicts, one a frame, of a file of the YouTube-VIS form.

    ``videos`` have id, width, height and file_names; ``annotations`` have video_id and per frame
    ``segmentations``, and optionally ``bboxes`` and ``areas``, with None where the object is not
    to be seen. Masks without a valid polygon are left out with a warning that counts them. Frames
    are numbered from 1 in the order of video ids and times, those that the options leave out
    included. Records have ``video_id`` and ``frame`` (from 0) besides the standard fields, and
    annotations the ``instance_id`` of their track. Only frames that pass every option are kept.

    Args:
        json_file: path of the file.
        image_root: folder of the frames.
        frame_list: a text file with a frame a line, ``<video>/<frame>`` as in the file's
            file_names, with the extension or without. None: all frames.
        min_instances: how many objects (not crowds) a frame must show at least.
        every_n: take each n-th frame of a video, from its first.

    Raises:
        FileNotFoundError: the file or the list does not exist.
        ValueError: it is not JSON or has no videos, an annotation has another number of frames
            than its video, the list names frames that the file lacks, or an option is out of range.
    """
    if every_n < 1 or min_instances < 0:
        raise ValueError(
            f"every_n must be 1 or more and min_instances 0 or more, got {every_n}, {min_instances}"
        )
    content = read_json(json_file)
    if "videos" not in content:
        raise ValueError(f"{json_file} has no 'videos': it is not of the YouTube-VIS form")
    listed = None if frame_list is None else _read_frame_list(frame_list, content, json_file)
    tracks: dict[Any, list[dict[str, Any]]] = {video["id"]: [] for video in content["videos"]}
    for track in sorted(content.get("annotations") or [], key=lambda a: a.get("category_id") or 0):
        tracks[track["video_id"]].append(track)
    records: list[dict[str, Any]] = []
    invalid = 0
    image_id = 0
    for video in sorted(content["videos"], key=lambda video: video["id"]):
        for frame, file_name in enumerate(video["file_names"]):
            image_id += 1
            if frame % every_n or (listed is not None and _stem(file_name) not in listed):
                continue
            objects = _objects(tracks[video["id"]], frame, video)
            valid = [annotation for annotation in objects if annotation is not None]
            invalid += len(objects) - len(valid)
            if sum(not annotation["iscrowd"] for annotation in valid) < min_instances:
                continue
            records.append(
                {
                    "file_name": os.path.join(image_root, file_name),
                    "image_id": image_id,
                    "height": video["height"],
                    "width": video["width"],
                    "video_id": video["id"],
                    "frame": frame,
                    "annotations": valid,
                }
            )
    warn_left_out(json_file, invalid)
    return records


def register_video_frames(
    name: str,
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    frame_list: str | os.PathLike | None = None,
    min_instances: int = 0,
    every_n: int = 1,
) -> None:
    """Register the frames of a file of the YouTube-VIS form as a class-agnostic data set.

    Args:
        name: the name to register.
        json_file, image_root, frame_list, min_instances, every_n: as
            :func:`load_class_agnostic_frames` takes them; nothing is read before the data set is
            asked for.
    """

    def load() -> list[dict[str, Any]]:
        return load_class_agnostic_frames(
            json_file,
            image_root,
            frame_list=frame_list,
            min_instances=min_instances,
            every_n=every_n,
        )

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        thing_classes=[CATEGORY["name"]],
        evaluator_type="coco_class_agnostic",
        image_root=str(image_root),
        annotation_file=str(json_file),
    )


def _stem(file_name: str) -> str:
    return os.path.splitext(file_name)[0]


def _read_frame_list(
    frame_list: str | os.PathLike, content: dict[str, Any], json_file: str | os.PathLike
) -> set[str]:
    """The frames that a list names, without extensions."""
    known = {_stem(name) for video in content["videos"] for name in video["file_names"]}
    with PathManager.open(find_file([frame_list])) as file:
        names = {line.strip() for line in file} - {""}
    # A name without an extension may have a dot all the same.
    listed = {name if name in known else _stem(name) for name in names}
    missing = sorted(listed - known)
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(names)} frames in {frame_list} are not in {json_file}: "
            f"{missing[0]}, ..."
        )
    return listed


def _objects(
    tracks: list[dict[str, Any]], frame: int, video: dict[str, Any]
) -> list[dict[str, Any] | None]:
    """Annotations of the objects to be seen in one frame, None for those of invalid polygons."""
    length = len(video["file_names"])
    objects = []
    for track in tracks:
        if len(track["segmentations"]) != length:
            raise ValueError(
                f"annotation {track.get('id')} has {len(track['segmentations'])} frames, its video "
                f"has {length}"
            )
        mask = track["segmentations"][frame]
        if not mask:
            continue
        boxes, areas = track.get("bboxes"), track.get("areas")
        annotation = dataset_annotation(
            {
                "segmentation": mask,
                "iscrowd": track.get("iscrowd", 0),
                "bbox": boxes and boxes[frame],
                "area": areas[frame] if areas else None,
            }
        )
        if annotation is not None and not annotation["bbox"]:
            mask = annotation["segmentation"]
            annotation["bbox"] = tight_box(mask, video["height"], video["width"])
        if annotation is not None and "id" in track:
            annotation["instance_id"] = track["id"]
        objects.append(annotation)
    return objects


def tight_box(segmentation: Any, height: int, width: int) -> list[float]:
    """Tight box (XYWH, pixels) of a COCO segmentation: polygons or an encoding of either kind."""
    rle = segmentation
    if isinstance(segmentation, list):
        rle = mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = mask_util.frPyObjects(segmentation, height, width)
    return mask_util.toBbox(rle).tolist()
