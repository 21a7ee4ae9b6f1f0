"""Draw a pseudo-mask file, or the annotations of a data set, on its images.

python -m unseg.tools.visualize x.json@DIR --output FOLDER [--count 20] [--threshold 0.5]
python -m unseg.tools.visualize coco_2017_val --output FOLDER
"""

import argparse
import logging
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.utils.logger import setup_logger
from PIL import Image
from pycocotools import mask as mask_util

from unseg.config import get_cfg
from unseg.data import register_datasets_in_config
from unseg.data.image import read_image
from unseg.discovery.rle import parse_segmentation
from unseg.engine.drawing import draw_instances, side_by_side

logger = logging.getLogger("unseg.tools.visualize")


def draw_record(record: dict, threshold: float) -> np.ndarray:
    """The image of a dataset dict and, beside it, the image with its masks."""
    image = read_image(record["file_name"])
    size = image.shape[:2]
    rles = [
        parse_segmentation(annotation["segmentation"], *size)
        for annotation in record.get("annotations", [])
        if "segmentation" in annotation and annotation.get("score", 1.0) >= threshold
    ]
    masks = mask_util.decode(rles).transpose(2, 0, 1).astype(bool) if rles else np.zeros((0, *size))
    return side_by_side([image, draw_instances(image, masks)])


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
    cfg = get_cfg()
    cfg.DATASETS.TEST = (args.dataset,)
    register_datasets_in_config(cfg)
    records = DatasetCatalog.get(args.dataset)
    chosen = np.unique(np.linspace(0, len(records) - 1, args.count).round().astype(int))
    args.output.mkdir(parents=True, exist_ok=True)
    for index in chosen.tolist():
        record = records[index]
        name = f"{index:06d}_{Path(record['file_name']).stem}.png"
        Image.fromarray(draw_record(record, args.threshold)).save(args.output / name)
    logger.info("%d pictures in %s", len(chosen), args.output)


if __name__ == "__main__":
    main()
