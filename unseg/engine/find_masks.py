"""From a command line to a pseudo-mask file: what each process of the job does."""

import argparse
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from unseg.checkpoint import CheckpointError, SafeCheckpointer
from unseg.config import load_config
from unseg.data import register_datasets_in_config, register_if_file
from unseg.data.build import skips_bad_images
from unseg.discovery.statistics import MaskStatistics
from unseg.engine.clusters import attach_clusters
from unseg.engine.dataset_job import (
    DatasetJob,
    ImageSource,
    images_in_folder,
    images_of_dataset,
)
from unseg.engine.pseudo_masks import PseudoMaskJob
from unseg.engine.sharded_map import WorkDir

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


def find_masks_parser(
    description: str | None = None,
    *,
    output: str = "the JSON file to write",
    folders: bool = True,
) -> argparse.ArgumentParser:
    """The flags of :func:`find_masks` (and of other jobs like it) and of its launch.

    Args:
        description: of the command.
        output: what ``--output`` is.
        folders: take a folder of ``--images`` instead of a ``--dataset``, too.
    """
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--config-file", required=True, metavar="FILE")
    source = result.add_mutually_exclusive_group(required=True)
    if folders:
        folder = "a folder of images, with its subfolders"
        source.add_argument("--images", metavar="DIR", help=folder)
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


def launch_job(
    job: Callable[[argparse.Namespace], object], parser: argparse.ArgumentParser
) -> None:
    """Run `job` on the command line, in as many processes as it asks for."""
    args = parser.parse_args()
    if args.num_shards and (args.num_gpus > 1 or not 0 <= args.shard < args.num_shards):
        parser.error("--shard must be below --num-shards, and each shard is one process")
    # The first rank that is done waits for the last one, longer than half an hour if need be.
    launch(job, args.num_gpus, dist_url="auto", args=(args,), timeout=timedelta(days=7))


def find_masks(args: argparse.Namespace, log: str | None = None) -> None:
    """One process of the job.

    Args:
        args: of :func:`find_masks_parser`.
        log: a file for the log beside the standard output, ending in ``.txt``.
    """
    statistics = run_job(PseudoMaskJob, args, log)
    if statistics is not None:
        _report(statistics, args.output)


def run_job(
    make_job: Callable[..., DatasetJob[_T]], args: argparse.Namespace, log: str | None = None
) -> _T | None:
    """One process of a job that runs a model on all images.

    Args:
        make_job: called as the class :class:`DatasetJob`.
        args: of :func:`find_masks_parser`.
        log: a file for the log beside the standard output, ending in ``.txt``.

    Returns:
        what the job's `collect` returns, if this process is the one that wrote the output.
    """
    cfg = load_config(args.config_file, args.opts)
    register_datasets_in_config(cfg)
    for name in ("unseg", "fvcore"):
        setup_logger(log, distributed_rank=comm.get_rank(), name=name)
    weights = "random" if args.random_weights else None  # the output must not claim other ones
    job = make_job(cfg, image_source(cfg, args), args.output, weights=weights)
    independent = args.num_shards > 0
    if (args.resume or independent) and job.is_written():
        logger.info("%s is complete; delete it to make it again", args.output)
        return None
    if comm.is_main_process():
        job.start(resume=args.resume or independent)
    comm.synchronize()
    model = load_model(job.cfg, args.random_weights)
    units, name = share_of_process(args, job.work_dir)
    job.run(model, units, name=name)
    comm.synchronize()
    return job.collect_if_complete() if comm.is_main_process() else None


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


def load_model(cfg: CfgNode, random_weights: bool) -> nn.Module:
    """The config's model with the weights and clusters that it names, or with random weights.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: see :func:`load_weights` and :func:`attach_clusters`.
    """
    if not random_weights:
        path = cfg.MODEL.WEIGHTS
        if path and "://" not in path and not os.path.isfile(path):
            raise FileNotFoundError(f"MODEL.WEIGHTS {path} does not exist")
        model = build_model(cfg)
        load_weights(model, path)
    else:
        with torch.random.fork_rng():
            # The same in all processes, and once resumed.
            torch.manual_seed(0)
            model = build_model(cfg)
    attach_clusters(model, cfg)
    return model
