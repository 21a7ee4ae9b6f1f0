"""The one main() behind every train_net.py."""

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from unseg.checkpoint import CheckpointError, SafeCheckpointer
from unseg.config import load_config
from unseg.data import register_datasets_in_config
from unseg.engine.hooks import averaged_weights
from unseg.engine.trainer import Trainer

logger = logging.getLogger(__name__)


def setup(args: argparse.Namespace) -> CfgNode:
    """The config of the command line, with its data sets registered and logging set up.

    Raises:
        ValueError: it asks for test-time augmentation, which would be ignored.
    """
    cfg = load_config(args.config_file, args.opts)
    if cfg.TEST.AUG.ENABLED:
        raise ValueError("TEST.AUG.ENABLED: test-time augmentation is not supported")
    register_datasets_in_config(cfg)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="unseg")
    return cfg


def run(args: argparse.Namespace, trainer_class: type[Trainer] = Trainer) -> Any:
    """Train, or with ``--eval-only`` evaluate, in this process; returns the results if any."""
    cfg = setup(args)
    if not args.eval_only:
        trainer = trainer_class(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    model = trainer_class.build_model(cfg)
    checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR)
    checkpoint = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    if cfg.SOLVER.EMA.ENABLED:
        _load_average(model, checkpoint)
    results = trainer_class.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def _load_average(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Replace the weights by the checkpoint's average, if it has one, and log which are used."""
    average = averaged_weights(checkpoint)
    if average is None:
        logger.info("SOLVER.EMA: the file holds no average; evaluating its weights as they are")
        return
    try:
        model.load_state_dict(average)
    except RuntimeError as error:
        raise CheckpointError(f"SOLVER.EMA: the average is not of this model: {error}") from error
    logger.info("SOLVER.EMA: evaluating the averaged weights")


def main(argv: Sequence[str] | None = None, trainer_class: type[Trainer] = Trainer) -> Any:
    """Entry point with Detectron2's flags: config, opts, GPUs, machines, resume, eval-only.

    Args:
        argv: the command line; default ``sys.argv``.
        trainer_class: what trains.

    Returns:
        the results of :func:`run` if everything runs in this process, else None.
    """
    args = default_argument_parser().parse_args(argv)
    if args.num_gpus * args.num_machines <= 1:
        return run(args, trainer_class)  # the launch() of Detectron2 0.5 would drop the results
    launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args, trainer_class),
    )
    return None
