#!/usr/bin/env python
"""COCO-20k: the part of COCO train2014 that object discovery is measured on (19 817 images).

    python datasets/prepare_coco20k.py --names coco_20k_filenames.txt

The list of file names comes with the code of LOST and TokenCut; it has one name a line, with or
without a folder in front. Categories are kept: `unseg_coco_20k_cls_agnostic` merges them.
"""

import argparse
import json
import logging
import sys
from pathlib import Path, PurePosixPath

from unseg.checkpoint.files import atomic_write
from unseg.data.datasets.coco_json import default_root, read_json, select_images

IMAGES = 19_817

logger = logging.getLogger("prepare_coco20k")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = default_root() / "coco/annotations"
    parser.add_argument("--names", type=Path, required=True, help="list of image file names")
    parser.add_argument(
        "--instances",
        type=Path,
        default=folder / "instances_train2014.json",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=folder / "instances_coco20k.json",
        help="default: %(default)s",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Write the annotations of the named images."""
    args = parse_arguments(arguments)
    lines = args.names.read_text().split()
    names = {PurePosixPath(line).name for line in lines}
    if len(names) != IMAGES:
        logger.warning("%s has %d names, COCO-20k has %d", args.names, len(names), IMAGES)
    content = select_images(read_json(args.instances), names)
    with atomic_write(args.output) as file:
        json.dump(content, file)
    logger.info(
        "%s: %d images, %d annotations",
        args.output,
        len(content["images"]),
        len(content["annotations"]),
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    main(sys.argv[1:])
