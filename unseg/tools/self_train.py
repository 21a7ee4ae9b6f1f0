"""Self-training: a model learns masks, the next one learns the masks that it finds, and so on.

    python -m unseg.tools.self_train --config-file LEARNER.yaml --output DIR
        (--masks x.json | --discovery-config FREE.yaml [--discovery-weights W])
        (--images DIR | --dataset NAME) [--num-gpus N] [--resume] [KEY VALUE ...]

Round 1 learns the given masks (of any discoverer, or any file that can be trained on) or those that
the discovery config finds. Its masks on the same images, filtered by SELF_TRAINING.SCORE_THRESHOLD,
MAX_MASKS_PER_IMAGE and MAX_WIDTH, are learned by round 2, which starts from MODEL.WEIGHTS again,
and so on for SELF_TRAINING.ROUNDS. Each round is evaluated on DATASETS.TEST.

DIR gets masks0.json, round1/, masks1.json, round2/, ..., results.json and, in the log, a table.
A run may be killed at any moment, and goes on with --resume. --masks x.json@DIR names the images
too. KEY VALUE are settings of the learner.
"""

import argparse
import sys

from detectron2.utils.logger import setup_logger

from unseg.engine import SelfTrainingError, SelfTrainingOptions, StageError, self_train


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--config-file", required=True, metavar="FILE", help="of the learner")
    result.add_argument("--output", required=True, metavar="DIR", help="folder of the run")
    masks = result.add_mutually_exclusive_group(required=True)
    masks.add_argument("--masks", metavar="FILE", help="round 1 learns them: x.json or x.json@DIR")
    masks.add_argument("--discovery-config", metavar="FILE", help="of a model that finds them")
    result.add_argument("--discovery-weights", metavar="FILE", help="MODEL.WEIGHTS of that model")
    source = result.add_mutually_exclusive_group()
    source.add_argument("--images", metavar="DIR", help="a folder of images, with its subfolders")
    source.add_argument("--dataset", metavar="NAME", help="a registered name, or x.json@DIR")
    result.add_argument("--num-gpus", type=int, default=1, help="processes on this machine")
    result.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    result.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return result


def main() -> None:
    """Entry point."""
    arguments = vars(parser().parse_args())
    resume, opts = arguments.pop("resume"), arguments.pop("opts")
    setup_logger(name="unseg")
    try:
        self_train(SelfTrainingOptions(opts=tuple(opts), **arguments), resume=resume)
    except (SelfTrainingError, StageError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
