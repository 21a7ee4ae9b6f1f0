#!/usr/bin/env python
"""A class-agnostic copy of a COCO or LVIS annotation file, for programs other than unseg.

    python datasets/prepare_class_agnostic.py instances_val2017.json class_agnostic_val2017.json

All objects get category 1, "object". Crowd regions stay crowd regions: turned into objects (or left
out) they cost a perfect detector two points of AP, and a thorough one twenty. LVIS files name
images by URL: give --file-name-from-url, the folder of images is then `coco`.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from unseg.checkpoint.files import atomic_write
from unseg.data.datasets.coco_json import merge_categories, read_json

logger = logging.getLogger("prepare_class_agnostic")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path, help="COCO or LVIS annotation file")
    parser.add_argument("output", type=Path, help="file to write")
    parser.add_argument(
        "--file-name-from-url",
        action="store_true",
        help="name images by the last two parts of coco_url, as LVIS needs it",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Write the file with merged categories."""
    args = parse_arguments(arguments)
    content = merge_categories(read_json(args.input), file_name_from_url=args.file_name_from_url)
    origin = {"description": f"class-agnostic version of {args.input.name}, made by unseg"}
    content["info"] = {**(content["info"] or {}), **origin}
    content["licenses"] = content["licenses"] or []
    with atomic_write(args.output) as file:
        json.dump(content, file)
    logger.info(
        "%s: %d images, %d annotations, %d of them crowd regions",
        args.output,
        len(content["images"]),
        len(content["annotations"]),
        sum(annotation["iscrowd"] for annotation in content["annotations"]),
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    main(sys.argv[1:])
