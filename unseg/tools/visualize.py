"""Draw a pseudo-mask file, or the annotations of a data set, on its images.

python -m unseg.tools.visualize x.json@DIR --output FOLDER [--count 20] [--threshold 0.5]
python -m unseg.tools.visualize coco_2017_val --output FOLDER

Objects without a mask are drawn as boxes.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from detectron2.utils.logger import setup_logger
from PIL import Image
from pycocotools import mask as mask_util

from unseg.data import register_if_file
from unseg.data.image import read_image
from unseg.discovery.rle import parse_segmentation
from unseg.engine.drawing import draw_instances, side_by_side

logger = logging.getLogger("unseg.tools.visualize")


def draw_record(record: dict[str, Any], threshold: float) -> np.ndarray:
    """The image of a dataset dict and, beside it, the image with its masks, and boxes of the rest.

    Args:
        record: in Detectron2's dataset format.
        threshold: annotations that have a lower ``score`` are left out.

    Raises:
        ImageReadError: the image cannot be read.
        ValueError: a malformed mask.
    """
    image = read_image(record["file_name"])
    rles, boxes = [], []
    for annotation in record.get("annotations", []):
        if annotation.get("score", 1.0) < threshold:
            continue
        if annotation.get("segmentation"):
            rles.append(parse_segmentation(annotation["segmentation"], *image.shape[:2]))
        elif "bbox" in annotation:
            box = list(map(float, annotation["bbox"]))
            boxes.append(BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYXY_ABS))
    drawn = image
    if rles:
        drawn = draw_instances(drawn, mask_util.decode(rles).transpose(2, 0, 1).astype(bool))
    if boxes:
        drawn = draw_instances(drawn, None, boxes=np.array(boxes))
    return side_by_side([image, drawn])


def choose_records(name: str, count: int) -> list[tuple[int, dict[str, Any]]]:
    """At most `count` dataset dicts, evenly spread, with their places in the data set.

    Args:
        name: ``x.json@DIR`` or a registered data set.

    Raises:
        KeyError: no data set of that name is registered.
        ValueError: it has no images, or holds videos.
    """
    records = DatasetCatalog.get(register_if_file(name))
    if not records:
        raise ValueError(f"data set {name!r} has no images")
    if "file_name" not in records[0]:
        raise ValueError(
            f"data set {name!r} is not one of single images (its records have "
            f"{sorted(records[0])}); videos of unseg are also registered as NAME_frames"
        )
    chosen = np.unique(np.linspace(0, len(records) - 1, count).round().astype(int))
    return [(index, records[index]) for index in chosen.tolist()]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="x.json@DIR or a registered name")
    parser.add_argument("--output", required=True, type=Path, help="folder for the pictures")
    parser.add_argument("--count", type=int, default=20, help="how many images, evenly spread")
    parser.add_argument("--threshold", type=float, default=0.0, help="lowest score to draw")
    args = parser.parse_args()
    setup_logger(name="unseg")
    chosen = choose_records(args.dataset, args.count)
    args.output.mkdir(parents=True, exist_ok=True)
    for index, record in chosen:
        name = f"{index:06d}_{Path(record['file_name']).stem}.png"
        Image.fromarray(draw_record(record, args.threshold)).save(args.output / name)
    logger.info("%d pictures in %s", len(chosen), args.output)


if __name__ == "__main__":
    main()
