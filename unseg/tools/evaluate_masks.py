"""Measure a pseudo-mask file itself, class-agnostically, against a data set with annotations.

    python -m unseg.tools.evaluate_masks x.json --dataset coco_2017_val
    python -m unseg.tools.evaluate_masks x.json --dataset annotations.json@DIR

Images are matched by id where the file names agree as well, else by file name. Images of the data
set that the file lacks count as images without masks.
"""

import argparse
import json
import logging
import math
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from unseg.checkpoint import atomic_write
from unseg.data import register_if_file
from unseg.discovery import load_pseudo_masks
from unseg.discovery.statistics import mask_statistics
from unseg.evaluation import evaluate_class_agnostic
from unseg.evaluation.coco_records import dataset_ground_truth, tasks_of_ground_truth
from unseg.structures import ImageRecord

logger = logging.getLogger("unseg.tools.evaluate_masks")


def match_images(
    records: Sequence[ImageRecord], images: Sequence[dict[str, Any]]
) -> dict[Any, ImageRecord]:
    """Records by the image id of the ground truth.

    A record belongs to the image whose file name ends in the record's (or the other way round, one
    of them may be relative to a deeper folder). Ambiguous names are decided by the image id.

    Raises:
        ValueError: no record belongs to any image, two belong to the same one, or sizes differ.
    """
    by_stem: dict[str, list[dict[str, Any]]] = {}
    for image in images:
        by_stem.setdefault(PurePosixPath(str(image["file_name"])).name, []).append(image)
    matched: dict[Any, ImageRecord] = {}
    for record in records:
        found = [
            image
            for image in by_stem.get(PurePosixPath(record.file_name).name, [])
            if _same_file(record.file_name, str(image["file_name"]))
        ]
        if len(found) > 1:
            found = [image for image in found if image["id"] == record.image_id]
        if not found:
            continue
        image = found[0]
        size = (record.height, record.width)
        if image["height"] is not None and size != (image["height"], image["width"]):
            raise ValueError(
                f"{record.file_name} is {size} in the pseudo-masks and "
                f"{(image['height'], image['width'])} (H, W) in the data set"
            )
        if image["id"] in matched:
            raise ValueError(
                f"{matched[image['id']].file_name} and {record.file_name} of the pseudo-masks are "
                f"both taken for {image['file_name']} of the data set"
            )
        matched[image["id"]] = record
    if not matched:
        raise ValueError(
            f"none of the {len(records)} images of the pseudo-masks is in the data set: e.g. "
            f"{records[0].file_name if records else 'nothing'} and {images[0]['file_name']}"
        )
    return matched


def _same_file(a: str, b: str) -> bool:
    parts = [PurePosixPath(name).parts for name in (a, b)]
    common = min(map(len, parts))
    return parts[0][-common:] == parts[1][-common:]


def evaluate_file(
    path: str, dataset: str, max_dets: Sequence[int] = (1, 10, 100)
) -> dict[str, dict[str, float]]:
    """Mask and box metrics of a pseudo-mask file; see ``evaluate_class_agnostic`` for the keys.

    Args:
        path: the pseudo-mask file.
        dataset: a registered name, or ``x.json@DIR``.
        max_dets: caps for average recall.

    Returns:
        Numbers by task: "bbox", and "segm" if all objects of the data set have masks.

    Raises:
        KeyError: the data set is not registered.
        ValueError: the data set has no annotations, or what :func:`match_images` refuses.
    """
    records = load_pseudo_masks(path)
    ground_truth, origin = dataset_ground_truth(register_if_file(dataset))
    if not ground_truth["annotations"]:
        raise ValueError(f"data set {dataset!r} ({origin}) has no annotations to measure against")
    matched = match_images(records, ground_truth["images"])
    missing = len(ground_truth["images"]) - len(matched)
    logger.info(
        "%s against %s (%s): %d images, %d of them without an entry in the file; %d entries are of "
        "other images\n%s",
        path,
        dataset,
        origin,
        len(ground_truth["images"]),
        missing,
        len(records) - len(matched),
        mask_statistics(matched.values()).summary(),
    )
    results = [
        {
            "image_id": image_id,
            "score": mask.score,
            "bbox": mask.box,
            "segmentation": mask.rle,
        }
        for image_id, record in matched.items()
        for mask in record.masks
    ]
    tasks = tasks_of_ground_truth(ground_truth["annotations"], dataset)
    return {task: evaluate_class_agnostic(ground_truth, results, task, max_dets) for task in tasks}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="the pseudo-mask file")
    parser.add_argument(
        "--dataset", required=True, help="with annotations: a registered name, or x.json@DIR"
    )
    parser.add_argument("--max-dets", type=int, nargs="+", default=[1, 10, 100], metavar="N")
    parser.add_argument("--output", metavar="FILE", help="also write the numbers as JSON")
    args = parser.parse_args()
    setup_logger(name="unseg")
    numbers = evaluate_file(args.file, args.dataset, args.max_dets)
    header = ["task", *next(iter(numbers.values()))]
    rows = [[task, *values.values()] for task, values in numbers.items()]
    logger.info("\n%s", tabulate(rows, header, tablefmt="pipe", floatfmt=".2f"))
    if args.output:
        # NaN (no objects of a size) is not JSON.
        known = {
            task: {key: None if math.isnan(value) else value for key, value in values.items()}
            for task, values in numbers.items()
        }
        with atomic_write(args.output) as file:
            json.dump(known, file, indent=1, allow_nan=False)


if __name__ == "__main__":
    main()
