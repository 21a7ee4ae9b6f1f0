"""From a command line to an exemplar pool: what each process of the job does."""

import argparse
import contextlib
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from unseg.checkpoint import CheckpointError, weights_hash
from unseg.config import load_config
from unseg.data import register_datasets_in_config
from unseg.data.image import EXTENSIONS
from unseg.discovery import (
    ExemplarError,
    categories_in_folder,
    choose_medoids,
    load_exemplar_pool,
)
from unseg.engine.dataset_job import ImageLoader, ImageSource, list_hash
from unseg.engine.exemplar_job import (
    ExemplarJob,
    ExemplarMaker,
    exemplar_settings,
    floats_from_text,
    floats_to_text,
    sheet_path,
)
from unseg.engine.exemplar_plan import (
    ExemplarPlan,
    check_build_settings,
    plan_folder,
    plan_medoids,
    plan_random,
)
from unseg.engine.find_masks import image_source, load_model, share_of_process
from unseg.engine.sharded_map import WorkDir, sharded_map
from unseg.structures import ExemplarPool

logger = logging.getLogger(__name__)


def build_exemplars(args: argparse.Namespace, log: str | None = None) -> None:
    """One process of the job.

    Args:
        args: of :func:`unseg.engine.find_masks_parser`.
        log: a file for the log beside the standard output, ending in ``.txt``.

    Raises:
        ExemplarError, CheckpointError, OSError: the command line, the config or a file that they
            name is wrong. The output is what it was before.
    """
    with _as_exemplar_errors():
        cfg = _load_config(args)
        register_datasets_in_config(cfg)
        for name in ("unseg", "fvcore"):
            setup_logger(log, distributed_rank=comm.get_rank(), name=name)
        build = _Build(cfg, args)
        if build.resume and build.is_written():
            logger.info("%s is complete; delete it to build it again", args.output)
            return
        maker = ExemplarMaker(cfg, load_model(cfg, args.random_weights))
        if comm.is_main_process() and not build.resume:
            build.remove_partial_results()
        comm.synchronize()
    pool = build.run(maker)
    if pool is not None:
        _report(pool, args.output, build.wanted)


@contextlib.contextmanager
def _as_exemplar_errors() -> Iterator[None]:
    """What is wrong with settings is the user's to know, not a failure of the program."""
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:  # unknown keys, data sets, mappers
        raise ExemplarError(str(error.args[0])) from error
    except ValueError as error:
        raise ExemplarError(str(error)) from error


def _load_config(args: argparse.Namespace) -> CfgNode:
    try:
        return load_config(args.config_file, args.opts)
    except (AssertionError, yaml.YAMLError) as error:  # fvcore's, for wrong overrides
        raise ExemplarError(f"{args.config_file}: {error}") from error


class _Build:
    """What is to be built, and where it stands on disk."""

    def __init__(self, cfg: CfgNode, args: argparse.Namespace):
        """
        Raises:
            ExemplarError, OSError, KeyError, ValueError: what is asked for is wrong or not there.
        """
        self.cfg, self.args = cfg, args
        self.resume = args.resume or args.num_shards > 0
        self.wanted: dict[str, int] = {}
        self.output = Path(args.output)
        _check_output(self.output)
        check_build_settings(cfg)
        self.settings = cfg.MODEL.EXEMPLAR.BUILD
        self.categories: dict[str, list[str]] = {}
        if self.settings.SOURCE == "folder":
            if not args.images:
                raise ExemplarError(
                    "MODEL.EXEMPLAR.BUILD.SOURCE folder needs --images, a folder with one folder "
                    "per class; random and kmeans take images of a --dataset"
                )
            self.categories = categories_in_folder(args.images, EXTENSIONS)
            self.source = ImageSource(str(Path(args.images)), [])
            images = hashlib.sha256(json.dumps(self.categories).encode()).hexdigest()
        else:
            self.source = image_source(cfg, args)
            if not self.source.images:
                count = self.source.unreadable
                raise ExemplarError(f"none of the {count} images can be read")
            images = list_hash(self.source.images)
        self.info = {
            "settings": exemplar_settings(cfg),
            # The file must not claim weights that were not loaded.
            "weights": "random" if args.random_weights else weights_hash(cfg.MODEL.WEIGHTS),
            "source": {
                "kind": self.settings.SOURCE,
                # Not the whole path: the folder may lie elsewhere on another machine.
                "name": args.dataset or Path(args.images).resolve().name,
                "images": images,
            },
        }
        self.features = WorkDir(f"{self.output}.features.parts", self.info, self._num_batches())

    def _num_batches(self) -> int:
        return -(-len(self.source.images) // self.cfg.DISCOVERY.BATCH_SIZE)

    def is_written(self) -> bool:
        """Whether the output is there already, made from the same images with these settings."""
        try:
            found = load_exemplar_pool(self.output).info
        except ExemplarError:
            return False
        return {key: found.get(key) for key in self.info} == self.info

    def remove_partial_results(self) -> None:
        """Forget what an earlier run has left."""
        for path in (self.features.path, Path(f"{self.output}.parts")):
            WorkDir(path, {}, 0).remove()

    def run(self, maker: ExemplarMaker) -> ExemplarPool | None:
        """This process's share; the pool if it has written it."""
        if self.settings.SOURCE == "kmeans":
            return self._run_in_two_passes(maker)
        job = self._job(self._plan())
        if comm.is_main_process():
            self._open(job.work_dir)
        comm.synchronize()
        units, name = share_of_process(self.args, job.work_dir)
        return self._finish(job, maker, units, name)

    def _open(self, work_dir: WorkDir) -> None:
        with _as_exemplar_errors():
            # Without --resume everything has been removed before.
            work_dir.open(resume=True)

    def _finish(
        self, job: ExemplarJob, maker: ExemplarMaker, units: Sequence[int], name: str
    ) -> ExemplarPool | None:
        job.run(maker, units, name)
        comm.synchronize()
        return job.collect_if_complete() if comm.is_main_process() else None

    def _job(self, plan: ExemplarPlan) -> ExemplarJob:
        self.wanted = plan.wanted()
        return ExemplarJob(self.cfg, plan, self.output, self.info)

    def _plan(self) -> ExemplarPlan:
        settings, source = self.settings, self.source
        if settings.SOURCE == "folder":
            return plan_folder(
                source.root, self.categories, settings.PER_CATEGORY, settings.BATCH_SIZE
            )
        count = settings.NUM_CATEGORIES * settings.PER_CATEGORY
        if count > len(source.images):
            logger.warning("%d exemplars are wanted, of %d images", count, len(source.images))
        return plan_random(
            source.root,
            [image.file_name for image in source.images],
            count,
            batch_size=settings.BATCH_SIZE,
            seed=settings.SEED,
            unreadable=source.unreadable,
        )

    def _run_in_two_passes(self, maker: ExemplarMaker) -> ExemplarPool | None:
        """First the features of all images, then the exemplars of the clusters' medoids.

        Of independent processes the one that is last with the first pass does all of the second,
        which is as long as a few hundred images; any of them goes on with it if that one has died.
        """
        if comm.is_main_process():
            self._open(self.features)
        comm.synchronize()
        units, name = share_of_process(self.args, self.features)
        sharded_map(
            ImageLoader(self.cfg, self.source),
            _ImageEncoder(self.cfg, maker),
            self.features,
            units,
            name=name,
            num_workers=self.cfg.DATALOADER.NUM_WORKERS,
        )
        comm.synchronize()
        with contextlib.ExitStack() as stack:
            plan = None
            if comm.is_main_process():
                # Held to the end: who comes second finds everything written.
                there = stack.enter_context(self.features.lock())
                plan = self._plan_from_features() if self._is_first_pass_done(there) else None
            plan = comm.all_gather(plan)[0]
            return None if plan is None else self._second_pass(maker, plan)

    def _is_first_pass_done(self, there: bool) -> bool:
        if not there:
            logger.info("another process has written %s", self.output)
            return False
        missing = len(self.features.missing())
        if missing:
            logger.info(
                "%d of %d batches are still to be encoded by other processes, the last of which "
                "cuts out the exemplars; run one of them again if it has died",
                missing,
                self.features.num_units,
            )
        return not missing

    def _plan_from_features(self) -> ExemplarPlan:
        rows: dict[int, np.ndarray] = {}
        for result in self.features.results():
            rows |= {int(index): floats_from_text(text) for index, text in result.items()}
        images = self.source.images
        if not rows:
            self.features.remove()
            raise ExemplarError(f"none of the {len(images)} images can be read; nothing is written")
        indices = sorted(rows)
        settings = self.settings
        medoids = choose_medoids(
            np.stack([rows[index] for index in indices]),
            settings.NUM_CATEGORIES,
            settings.PER_CATEGORY,
            settings.SEED,
        )
        return plan_medoids(
            self.source.root,
            [images[index].file_name for index in indices],
            medoids,
            settings.PER_CATEGORY,
            batch_size=settings.BATCH_SIZE,
            unreadable=self.source.unreadable + len(images) - len(indices),
        )

    def _second_pass(self, maker: ExemplarMaker, plan: ExemplarPlan) -> ExemplarPool | None:
        job = self._job(plan)
        if comm.is_main_process():
            self._open(job.work_dir)
        comm.synchronize()
        if self.args.num_shards > 0:
            units, name = job.work_dir.missing(), "last"
        else:
            units, name = share_of_process(self.args, job.work_dir)
        pool = self._finish(job, maker, units, name)
        if pool is not None:
            self.features.remove()
        return pool


class _ImageEncoder:
    """Embeds whole images, as the test mapper has made them."""

    def __init__(self, cfg: CfgNode, maker: ExemplarMaker):
        self.flip = -1 if cfg.INPUT.FORMAT == "BGR" else 1
        self.maker = maker

    def __call__(self, loaded: list[tuple[int, dict[str, Any] | None]]) -> tuple[dict, int]:
        good = [(index, x["image"]) for index, x in loaded if x is not None]
        images = [image.permute(1, 2, 0).numpy()[:, :, :: self.flip] for _, image in good]
        rows = self.maker.encode(images) if images else []
        texts = {str(i): floats_to_text(row) for (i, _), row in zip(good, rows, strict=True)}
        return texts, len(loaded)


def _check_output(output: Path) -> None:
    if output.suffix != ".npz":
        raise ExemplarError(f"--output {output} must end in .npz; the sheet is a .png beside it")
    for path in (output, sheet_path(output)):
        if path.is_dir():
            raise ExemplarError(f"{path} is a folder; a file will be written there")


def _report(pool: ExemplarPool, output: str, wanted: dict[str, int]) -> None:
    """Log what was made and what looks wrong with it."""
    statistics = pool.info["statistics"]
    counts = Counter(exemplar.category for exemplar in pool.exemplars)
    numbers = sorted(set(counts.values()))
    span = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    logger.info(
        "wrote %s and its contact sheet %s\n"
        "%d exemplars of %d categories, %s each\n"
        "masks: %d refined by the model, %d coarse (GrabCut's), %d whole images\n"
        "%d images could not be read",
        output,
        sheet_path(output),
        len(pool),
        len(counts),
        span,
        *(statistics[key] for key in ("refined", "coarse", "whole", "skipped")),
    )
    few = [f"{name} ({counts[name]})" for name, count in wanted.items() if counts[name] < count]
    if few:
        more = ", ..." if len(few) > 5 else ""
        logger.warning(
            "fewer exemplars than wanted of %d categories: %s%s",
            len(few),
            ", ".join(few[:5]),
            more,
        )
    for warning in mask_warnings(statistics):
        logger.warning(warning)


def mask_warnings(statistics: dict[str, int]) -> list[str]:
    """What a pool's counts of mask origins say about its model and its images."""
    total = sum(statistics[key] for key in ("refined", "coarse", "whole"))
    warnings = []
    if 2 * statistics["coarse"] > total:
        warnings.append(
            f"{statistics['coarse']} of {total} masks are GrabCut's alone, as none of the model's "
            "agrees with them (MODEL.EXEMPLAR.BUILD.MIN_IOU): are MODEL.WEIGHTS those of a trained "
            "model?"
        )
    if 2 * statistics["whole"] > total:
        warnings.append(
            f"{statistics['whole']} of {total} exemplars are whole images, in which neither "
            "GrabCut nor the model found an object: do the images show one each?"
        )
    return warnings
