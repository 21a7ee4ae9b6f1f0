"""Run a model on images and draw what it finds, with the flags of Detectron2's demo.

python -m unseg.demo --config-file CONFIG --input a.jpg b.jpg --output FOLDER
    [--confidence-threshold 0.5] [--opts MODEL.WEIGHTS weights.pth]
"""

import argparse
import glob
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger
from PIL import Image

from unseg.checkpoint import SafeCheckpointer
from unseg.config import load_config
from unseg.data.image import EXTENSIONS, read_image
from unseg.engine.drawing import draw_instances

logger = logging.getLogger("unseg.demo")


class Predictor:
    """A model for single images: Detectron2's DefaultPredictor with safe weight loading."""

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: the model and MODEL.WEIGHTS.
        """
        self.model = build_model(cfg).eval()
        SafeCheckpointer(self.model).load(cfg.MODEL.WEIGHTS)
        self.resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
        self.image_format = cfg.INPUT.FORMAT

    @torch.no_grad()
    def __call__(self, rgb: np.ndarray) -> dict[str, Any]:
        """The model's output for one image.

        Args:
            rgb: (H, W, 3) uint8.
        """
        height, width = rgb.shape[:2]
        image = rgb if self.image_format == "RGB" else rgb[:, :, ::-1]
        image = self.resize.get_transform(image).apply_image(image)
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return self.model([{"image": tensor, "height": height, "width": width}])[0]


def draw_prediction(rgb: np.ndarray, instances: Instances, threshold: float) -> np.ndarray:
    """The masks of scores from `threshold` on, drawn on the image, labelled with their scores."""
    instances = instances[instances.scores >= threshold].to("cpu")
    labels = [f"{score:.0%}" for score in instances.scores.tolist()]
    return draw_instances(rgb, instances.pred_masks.numpy(), labels)


def expand_inputs(patterns: list[str]) -> list[str]:
    """Image files of file names, folders and wildcards.

    Raises:
        FileNotFoundError: one of them stands for no image.
    """
    files = []
    for pattern in patterns:
        if Path(pattern).is_dir():
            found = sorted(
                str(p) for p in Path(pattern).iterdir() if p.suffix.lower() in EXTENSIONS
            )
        elif "://" in pattern:
            found = [pattern]
        else:
            found = sorted(glob.glob(pattern))
        if not found:
            raise FileNotFoundError(f"--input {pattern}: no image there")
        files += found
    return files


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--input", required=True, nargs="+", help="images, folders or wildcards")
    parser.add_argument("--output", required=True, help="a folder, or a file for a single image")
    parser.add_argument("--confidence-threshold", type=float, default=0.5)
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE ...")
    args = parser.parse_args()
    setup_logger(name="unseg")
    setup_logger(name="fvcore")
    predictor = Predictor(load_config(args.config_file, args.opts))
    files = expand_inputs(args.input)
    output = Path(args.output)
    single = len(files) == 1 and output.suffix.lower() in EXTENSIONS
    (output.parent if single else output).mkdir(parents=True, exist_ok=True)
    for file in files:
        rgb = read_image(file)
        instances = predictor(rgb)["instances"]
        target = output if single else output / f"{Path(file).stem}.png"
        drawn = draw_prediction(rgb, instances, args.confidence_threshold)
        Image.fromarray(drawn).save(target)
        count = int((instances.scores >= args.confidence_threshold).sum())
        logger.info("%s: %d of %d masks drawn, %s", file, count, len(instances), target)


if __name__ == "__main__":
    main()
