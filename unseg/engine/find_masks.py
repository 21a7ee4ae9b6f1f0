"""From a command line to a pseudo-mask file: what each process of the job does."""

import argparse
import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from unseg.checkpoint import CheckpointError, SafeCheckpointer
from unseg.config import load_config
from unseg.data import register_datasets_in_config, register_if_file
from unseg.data.build import skips_bad_images
from unseg.discovery.statistics import MaskStatistics
from unseg.engine.pseudo_masks import (
    ImageSource,
    PseudoMaskJob,
    images_in_folder,
    images_of_dataset,
)
from unseg.engine.sharded_map import WorkDir

logger = logging.getLogger(__name__)


def find_masks_parser(
    description: str | None = None, *, output: str = "the JSON file to write"
) -> argparse.ArgumentParser:
    """The flags of :func:`find_masks` (and of other jobs like it) and of its launch.

    Args:
        description: of the command.
        output: what ``--output`` is.
    """
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--config-file", required=True, metavar="FILE")
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="DIR", help="a folder of images, with its subfolders")
    source.add_argument("--dataset", metavar="NAME", help="a registered name, or x.json@DIR")
    result.add_argument("--output", required=True, metavar="FILE", help=output)
    result.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    result.add_argument("--num-gpus", type=int, default=1, help="processes on this machine")
    result.add_argument("--num-shards", type=int, default=0, help="independent processes in all")
    result.add_argument("--shard", type=int, default=0, help="which of them this is, from 0")
    result.add_argument(
        "--random-weights", action="store_true", help="load no weights (to try a model out)"
    )
    result.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return result


def find_masks(args: argparse.Namespace, log: str | None = None) -> None:
    """One process of the job.

    Args:
        args: of :func:`find_masks_parser`.
        log: a file for the log beside the standard output, ending in ``.txt``.
    """
    cfg = load_config(args.config_file, args.opts)
    register_datasets_in_config(cfg)
    for name in ("unseg", "fvcore"):
        setup_logger(log, distributed_rank=comm.get_rank(), name=name)
    weights = "random" if args.random_weights else None  # the file must not claim other ones
    job = PseudoMaskJob(cfg, image_source(cfg, args), args.output, weights=weights)
    independent = args.num_shards > 0
    if (args.resume or independent) and job.is_written():
        logger.info("%s is complete; delete it to find its masks again", args.output)
        return
    if comm.is_main_process():
        job.start(resume=args.resume or independent)
    comm.synchronize()
    model = build_model(cfg)
    if not args.random_weights:
        load_weights(model, cfg.MODEL.WEIGHTS)
    units, name = share_of_process(args, job.work_dir)
    job.run(model, units, name=name)
    comm.synchronize()
    if not comm.is_main_process():
        return
    statistics = job.collect_if_complete()
    if statistics is not None:
        _report(statistics, args.output)


def share_of_process(args: argparse.Namespace, work_dir: WorkDir) -> tuple[list[int], str]:
    """The missing units that this process does, and its name; all ranks of a launch call it."""
    missing = work_dir.missing()
    if args.num_shards > 0:
        units = [unit for unit in missing if unit % args.num_shards == args.shard]
        return units, f"{args.shard:05d}-of-{args.num_shards:05d}"
    # All ranks deal out the list that the first one saw, for they begin at different times.
    units = comm.all_gather(missing)[0][comm.get_rank() :: comm.get_world_size()]
    return units, f"rank-{comm.get_rank():05d}"


def image_source(cfg: CfgNode, args: argparse.Namespace) -> ImageSource:
    """The images that the command line names."""
    if args.dataset:
        return images_of_dataset(register_if_file(args.dataset))
    return images_in_folder(args.images, skip_bad=skips_bad_images(cfg))


def _report(statistics: MaskStatistics, output: str) -> None:
    """Log what was found and what looks wrong with it."""
    logger.info("wrote %s\n%s", output, statistics.summary())
    for warning in statistics.warnings():
        logger.warning(warning)


class _AllWeights(SafeCheckpointer):
    """Masks from a half-initialised backbone look like masks: nothing may be missing."""

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        missing = [*incompatible.missing_keys, *(key for key, *_ in incompatible.incorrect_shapes)]
        if missing:
            raise CheckpointError(
                f"MODEL.WEIGHTS lack {len(missing)} weights of the model or have them in another "
                f"shape: {', '.join(sorted(missing)[:5])}, ..."
            )
        super()._log_incompatible_keys(incompatible)


def load_weights(model: nn.Module, path: str) -> None:
    """Load all weights of a model.

    Raises:
        CheckpointError: the model has weights, and `path` is empty or lacks some of them.
    """
    if not path and any(True for _ in model.parameters()):
        raise CheckpointError(
            "the model has weights, but MODEL.WEIGHTS is empty: --random-weights goes on with "
            "random ones"
        )
    _AllWeights(model).load(path)
