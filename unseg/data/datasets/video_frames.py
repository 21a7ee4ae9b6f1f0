"""Files of the YouTube-VIS form (UVO's videos) read as single frames with one class."""

import os
from typing import Any

from pycocotools import mask as mask_util

from unseg.data.datasets.coco_json import dataset_annotation, read_json, warn_left_out


def load_class_agnostic_frames(
    json_file: str | os.PathLike, image_root: str | os.PathLike
) -> list[dict[str, Any]]:
    """Dataset dicts, one a frame, of a file of the YouTube-VIS form.

    ``videos`` have id, width, height and file_names; ``annotations`` have video_id and per frame
    ``segmentations``, and optionally ``bboxes`` and ``areas``, with None where the object is not
    to be seen. Masks without a valid polygon are left out with a warning that counts them. Frames
    are numbered from 1 in the order of video ids and times. Records have ``video_id`` and ``frame``
    (from 0) besides the standard fields.

    Args:
        json_file: path of the file.
        image_root: folder of the frames.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not JSON or has no videos, or an annotation has another number of frames
            than its video.
    """
    content = read_json(json_file)
    if "videos" not in content:
        raise ValueError(f"{json_file} has no 'videos': it is not of the YouTube-VIS form")
    tracks: dict[Any, list[dict[str, Any]]] = {video["id"]: [] for video in content["videos"]}
    for track in sorted(content.get("annotations") or [], key=lambda a: a.get("category_id") or 0):
        tracks[track["video_id"]].append(track)
    records: list[dict[str, Any]] = []
    invalid = 0
    for video in sorted(content["videos"], key=lambda video: video["id"]):
        for frame, file_name in enumerate(video["file_names"]):
            objects = _objects(tracks[video["id"]], frame, video)
            valid = [annotation for annotation in objects if annotation is not None]
            invalid += len(objects) - len(valid)
            records.append(
                {
                    "file_name": os.path.join(image_root, file_name),
                    "image_id": len(records) + 1,
                    "height": video["height"],
                    "width": video["width"],
                    "video_id": video["id"],
                    "frame": frame,
                    "annotations": valid,
                }
            )
    warn_left_out(json_file, invalid)
    return records


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
