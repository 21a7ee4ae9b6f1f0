"""Run a model on images and draw what it finds, with the flags of Detectron2's demo.

python -m unseg.demo --config-file CONFIG --input a.jpg b.jpg --output FOLDER
    [--confidence-threshold 0.5] [--opts MODEL.WEIGHTS weights.pth]

Pictures keep the names of their images; where two share one, the second becomes name_2.
"""

import argparse
import glob
import logging
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger
from PIL import Image

from unseg.checkpoint import SafeCheckpointer
from unseg.config import load_config
from unseg.data.image import EXTENSIONS, read_image
from unseg.data.mappers.augmentation import ResizeShortestEdge
from unseg.engine.clusters import attach_clusters
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
        attach_clusters(self.model, cfg)
        self.resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
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
    """The objects of scores from `threshold` on, drawn on the image, labelled with their scores.

    Args:
        rgb: (H, W, 3) uint8.
        instances: with ``scores``, and ``pred_masks`` (N, H, W), or WindowMasks, or else
            ``pred_boxes``.
        threshold: lowest score to draw.

    Returns:
        (H, W, 3) uint8.
    """
    instances = instances[instances.scores >= threshold].to("cpu")
    labels = [f"{score:.0%}" for score in instances.scores.tolist()]
    if instances.has("pred_masks"):
        return draw_instances(rgb, np.asarray(instances.pred_masks), labels)
    return draw_instances(rgb, None, labels, boxes=instances.pred_boxes.tensor.numpy())


def expand_inputs(patterns: list[str]) -> list[str]:
    """Image files of file names, folders and wildcards, each once.

    Raises:
        FileNotFoundError: one of them stands for no image.
    """
    files = []
    for pattern in patterns:
        if Path(pattern).is_dir():
            found = sorted(
                str(p) for p in Path(pattern).iterdir() if p.suffix.lower() in EXTENSIONS
            )
        elif "://" in pattern or Path(pattern).is_file():  # a file's name may hold brackets
            found = [pattern]
        else:
            found = sorted(glob.glob(pattern))
        if not found:
            raise FileNotFoundError(f"--input {pattern}: no image there")
        files += found
    return list(dict.fromkeys(files))


def output_names(files: list[str]) -> list[str]:
    """Names for the pictures of some image files: those of the files, made different."""
    names: list[str] = []
    for file in files:
        name = PurePosixPath(file).name
        stem, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix
        if suffix.lower() not in EXTENSIONS:
            stem, suffix = name, ".png"
        name, number = f"{stem}{suffix}", 1
        while name in names:
            number += 1
            name = f"{stem}_{number}{suffix}"
        names.append(name)
    return names


def output_files(files: list[str], output: str) -> list[Path]:
    """Where the pictures of some images go; the folder is made.

    Args:
        files: images, as :func:`expand_inputs` gives them.
        output: a folder, or the name of an image file if there is one image.

    Raises:
        ValueError: a picture would overwrite one of the images.
    """
    target = Path(output)
    if len(files) == 1 and target.suffix.lower() in EXTENSIONS and not target.is_dir():
        targets = [target]
    else:
        targets = [target / name for name in output_names(files)]
    sources = {Path(file).resolve() for file in files if "://" not in file}
    for path in targets:
        if path.resolve() in sources:
            raise ValueError(f"--output {output}: {path} is an input, it would be overwritten")
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    return targets


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
    files = expand_inputs(args.input)
    targets = output_files(files, args.output)
    predictor = Predictor(load_config(args.config_file, args.opts))
    for file, target in zip(files, targets):
        rgb = read_image(file)
        instances = predictor(rgb)["instances"]
        drawn = draw_prediction(rgb, instances, args.confidence_threshold)
        Image.fromarray(drawn).save(target)
        count = int((instances.scores >= args.confidence_threshold).sum())
        logger.info("%s: %d of %d objects drawn, %s", file, count, len(instances), target)


if __name__ == "__main__":
    main()
