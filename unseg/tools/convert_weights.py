"""Convert a released checkpoint to Detectron2's names.

    python -m unseg.tools.convert_weights densecl densecl_r50.pth output.pth

The result is a backbone for MODEL.WEIGHTS of any config with that ResNet, ViT or VGG (dino,
torchvision: whichever of them the file holds) or, of a FreeSOLO checkpoint or one of DeepMask's
PyTorch port (deepmask), the whole model. The tool fails if a weight finds no place.
"""

import argparse
import logging

from detectron2.utils.logger import setup_logger

from unseg.checkpoint import convert, save_converted
from unseg.checkpoint.convert import CONVERTERS

logger = logging.getLogger("unseg.tools.convert_weights")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=sorted(CONVERTERS))
    parser.add_argument("input", help="the released file")
    parser.add_argument("output", help="the file to write (.pth)")
    args = parser.parse_args()
    setup_logger(name="unseg")
    converted = convert(args.kind, args.input)
    save_converted(converted, args.output)
    logger.info("wrote %d weights to %s", len(converted["model"]), args.output)


if __name__ == "__main__":
    main()
