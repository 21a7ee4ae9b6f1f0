"""Self-training (FreeSOLO, stages A to E) with any discoverer and any learner.

    masks0 -> round1 -> masks1 -> round2 -> ... -> results.json

Masks from anywhere train a model, its masks on the same images train the next one. Every arrow is a
stage: a file of masks or a training, in a process of its own. A run is described by its plan; a
finished stage is recognised by its result, which is written last, and never done again.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.engine import default_argument_parser

from unseg.checkpoint import atomic_write, file_hash
from unseg.config import load_config
from unseg.data.datasets.pseudo import split_file_name
from unseg.discovery.io import read_header
from unseg.engine.dataset_job import job_settings, plain
from unseg.engine.find_masks import find_masks, find_masks_parser
from unseg.engine.main import run
from unseg.engine.rounds import (
    RESULTS_FILE,
    Results,
    RoundTrainer,
    make_table,
    mask_statistics_in,
)
from unseg.engine.sharded_map import differences
from unseg.engine.stages import Stage, launch_ranks, run_in_process

logger = logging.getLogger(__name__)


class SelfTrainingError(ValueError):
    """The run cannot begin or go on; the message says why."""


@dataclass(frozen=True)
class SelfTrainingOptions:
    """What to do.

    Attributes:
        config_file: YAML of the learner, with ``SELF_TRAINING``.
        output: folder of the run.
        opts: config overrides of the learner, ``KEY VALUE ...``.
        masks: the file of masks that round 1 learns from; ``x.json@DIR`` names its images as well.
        discovery_config: instead, YAML of the model that finds these masks ...
        discovery_weights: ... and its MODEL.WEIGHTS, if they are not those of the YAML.
        images: folder of the images.
        dataset: instead, the data set of the images.
        num_gpus: processes of each stage.
    """

    config_file: str
    output: str
    opts: tuple[str, ...] = ()
    masks: str | None = None
    discovery_config: str | None = None
    discovery_weights: str | None = None
    images: str | None = None
    dataset: str | None = None
    num_gpus: int = 1


def self_train(
    options: SelfTrainingOptions,
    *,
    resume: bool = False,
    run_stage: Callable[[Stage], None] = run_in_process,
) -> Results:
    """Do all stages that are not finished.

    Args:
        options: what to do.
        resume: go on with a run that was begun in the folder, if there is one.
        run_stage: does one stage.

    Returns:
        what ``results.json`` in the folder holds: for each of ``rounds``, its ``metrics`` (data set
        -> task -> metric -> number, or None for NaN) and the ``mask_statistics`` of what it learned
        from (None for masks of another origin).

    Raises:
        SelfTrainingError: the options contradict each other; the folder holds a run already, one of
            other settings, or one that another process is working on; a model finds no masks.
        StageError: a stage failed.
    """
    pipeline = SelfTraining(options)
    with pipeline.opened(resume=resume):
        stages = pipeline.stages()
        for number, stage in enumerate(stages):
            if stage.is_finished():
                logger.info("%s: finished before", stage.title)
                continue
            later = [other.title for other in stages[number + 1 :] if other.has_begun()]
            if later:  # what it learned from would be another one than the plan says
                raise SelfTrainingError(
                    f"{pipeline.folder}: {stage.title} is missing, but there is {later[0]}: name "
                    "another --output, or delete everything that came after"
                )
            logger.info("%s: begins, log in %s", stage.title, stage.log)
            run_stage(stage)
        results = pipeline.results()
    logger.info("%s\n%s", pipeline.folder / RESULTS_FILE, make_table(results))
    return results


class SelfTraining:
    """The stages of a run, its folder and its results."""

    def __init__(self, options: SelfTrainingOptions):
        self.options = options
        self.folder = Path(os.path.abspath(options.output))
        self.cfg = load_config(options.config_file, options.opts)
        self.settings = self.cfg.SELF_TRAINING
        if self.settings.ROUNDS < 1:
            raise SelfTrainingError(
                f"SELF_TRAINING.ROUNDS must be at least 1, got {self.settings.ROUNDS}"
            )
        if (options.masks is None) == (options.discovery_config is None):
            raise SelfTrainingError("give either a file of masks or a discovery config")
        self.given_masks, self.source, self.image_root = _masks_and_images(options)
        # The learner's device is every stage's, whatever the discoverer's YAML says.
        device = ["MODEL.DEVICE", self.cfg.MODEL.DEVICE]
        self.opts = [*options.opts, *device]
        self.discovery_opts = device
        if options.discovery_weights is not None:
            self.discovery_opts = [*device, "MODEL.WEIGHTS", options.discovery_weights]

    # Where things are.

    def masks(self, number: int) -> Path:
        """Masks that round ``number + 1`` learns from."""
        if number == 0 and self.given_masks is not None:
            return self.given_masks
        return self.folder / f"masks{number}.json"

    def round_folder(self, number: int) -> Path:
        """OUTPUT_DIR of a round, from 1."""
        return self.folder / f"round{number}"

    def weights(self, number: int) -> str:
        """What a round ends with: the averaged weights, if there is an average."""
        name = "ema/model_final.pth" if self.cfg.SOLVER.EMA.ENABLED else "model_final.pth"
        return str(self.round_folder(number) / name)

    # What is done.

    def stages(self) -> list[Stage]:
        """All stages in their order."""
        stages = [] if self.given_masks is not None else [self._discovery()]
        for number in range(1, self.settings.ROUNDS + 1):
            if number > 1:
                stages.append(self._labelling(number - 1))
            stages.append(self._training(number))
        return stages

    def _discovery(self) -> Stage:
        return self._finding(
            0, "masks0 (discovery)", self.options.discovery_config, self.discovery_opts
        )

    def _labelling(self, number: int) -> Stage:
        opts = {
            "MODEL.WEIGHTS": self.weights(number),
            "DISCOVERY.SCORE_THRESHOLD": self.settings.SCORE_THRESHOLD,
            "DISCOVERY.MAX_MASKS_PER_IMAGE": self.settings.MAX_MASKS_PER_IMAGE,
            "DISCOVERY.MAX_WIDTH": self.settings.MAX_WIDTH,
            # What the threshold drops anyway need not be brought to the size of the image first.
            "MODEL.FREESOLO.UPDATE_THR": max(
                self.cfg.MODEL.FREESOLO.UPDATE_THR, self.settings.SCORE_THRESHOLD
            ),
        }
        title = f"masks{number} (of round {number}'s model)"
        return self._finding(number, title, self.options.config_file, [*self.opts, *_words(opts)])

    def _finding(self, number: int, title: str, config_file: str, opts: list[str]) -> Stage:
        masks, log = self.masks(number), self.folder / f"masks{number}.log"
        flags = ["--config-file", config_file, *self.source, "--output", str(masks), "--resume"]
        args = find_masks_parser().parse_args([*flags, *opts])
        return Stage(
            title,
            partial(launch_ranks, find_masks, self.options.num_gpus, args, str(log)),
            log,
            (masks, Path(f"{masks}.parts")),
            partial(_has_masks, masks, job_settings(load_config(config_file, opts))),
        )

    def _training(self, number: int) -> Stage:
        masks, folder = self.masks(number - 1), self.round_folder(number)
        opts = {
            "DATASETS.TRAIN": (f"{masks}@{self.image_root}",),
            "OUTPUT_DIR": folder,
        }
        if number > 1:
            if self.settings.FROM_PREVIOUS:
                opts["MODEL.WEIGHTS"] = self.weights(number - 1)
            if self.cfg.MODEL.FREESOLO.DATA.BOXES == "xyxy_as_xywh":
                opts["MODEL.FREESOLO.DATA.BOXES"] = "masks"  # the released code's round 2 was right
        # Without a checkpoint, --resume loads MODEL.WEIGHTS.
        flags = ["--config-file", self.options.config_file, "--resume"]
        args = default_argument_parser().parse_args([*flags, *self.opts, *_words(opts)])
        return Stage(
            f"round{number} (training)",
            partial(_train, masks, self.options.num_gpus, args),
            folder / "log.txt",
            (folder,),
            (folder / RESULTS_FILE).is_file,
        )

    # The folder of the run.

    @contextlib.contextmanager
    def opened(self, *, resume: bool) -> Iterator[None]:
        """Hold the folder for this process, with the plan in it.

        Raises:
            SelfTrainingError: see :func:`self_train`.
        """
        path = self.folder / "plan.json"
        plan = self._plan()
        if not path.exists():
            self._refuse_remains()
            with atomic_write(path) as file:
                json.dump(plan, file, indent=1, sort_keys=True)
        elif not resume:
            raise SelfTrainingError(
                f"{self.folder} holds a run already: go on with it by --resume, name another "
                "--output, or delete the folder to start over"
            )
        with open(path, "r+") as file:  # writable, because NFS gives locks on no other files
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SelfTrainingError(f"another process works in {self.folder}") from error
            _compare(json.load(file), plan, self.folder)
            yield

    def _plan(self) -> dict[str, Any]:
        """What the results depend on, without devices and numbers of processes."""
        learner = plain(self.cfg)
        for node, key in (("MODEL", "DEVICE"), ("DATALOADER", "NUM_WORKERS")):
            del learner[node][key]
        del learner["OUTPUT_DIR"], learner["DATASETS"]["TRAIN"]
        exemplars = learner["MODEL"]["EXEMPLAR"]
        if exemplars["POOL"]:
            if not os.path.isfile(exemplars["POOL"]):
                raise SelfTrainingError(f"MODEL.EXEMPLAR.POOL {exemplars['POOL']} does not exist")
            exemplars["POOL"] = file_hash(exemplars["POOL"])
        discovery = None
        if self.options.discovery_config is not None:
            cfg = load_config(self.options.discovery_config, self.discovery_opts)
            discovery = {**job_settings(cfg), "weights": cfg.MODEL.WEIGHTS}
        return {
            "learner": learner,
            "discovery": discovery,
            "masks": None if self.given_masks is None else file_hash(self.given_masks),
            "images": self.source[1],
        }

    def _refuse_remains(self) -> None:
        remains = [path for stage in self.stages() for path in stage.traces if path.exists()]
        if remains:
            raise SelfTrainingError(
                f"{remains[0]} exists, but no plan.json that says how it was made: name another "
                "--output"
            )

    def results(self) -> Results:
        """Gather the results of all rounds and write them."""
        rounds = [
            {
                "round": number,
                "masks": self.masks(number - 1).name,
                "mask_statistics": mask_statistics_in(self.masks(number - 1)),
                "metrics": json.loads((self.round_folder(number) / RESULTS_FILE).read_text()),
            }
            for number in range(1, self.settings.ROUNDS + 1)
        ]
        results = {"rounds": rounds}
        with atomic_write(self.folder / RESULTS_FILE) as file:
            json.dump(results, file, indent=1, allow_nan=False)
        return results


def _train(masks: Path, num_gpus: int, args: argparse.Namespace) -> None:
    statistics = mask_statistics_in(masks)
    if statistics is not None and not statistics["masks"]:
        raise SelfTrainingError(
            f"{masks} has no masks to learn from: see its log, and SELF_TRAINING.SCORE_THRESHOLD"
        )
    launch_ranks(run, num_gpus, args, RoundTrainer)


def _masks_and_images(options: SelfTrainingOptions) -> tuple[Path | None, list[str], str]:
    """The file of masks if there is one, find_masks's flags for the images, and their root."""
    masks, dataset = options.masks, options.dataset
    if masks is not None:
        parts = split_file_name(masks)
        if parts is not None:
            if options.images or dataset:
                raise SelfTrainingError(f"{masks} names its images: leave --images, --dataset out")
            masks = parts[0]
            dataset = f"{os.path.abspath(masks)}@{parts[1]}"
        if not os.path.isfile(masks):
            raise SelfTrainingError(f"{masks} does not exist")
        masks = Path(os.path.abspath(masks))
    if options.images:
        folder = os.path.abspath(options.images)
        return masks, ["--images", folder], folder
    if not dataset:
        raise SelfTrainingError("name the images: a folder, a data set, or masks as x.json@DIR")
    parts = split_file_name(dataset)
    return masks, ["--dataset", dataset], dataset if parts is None else parts[1]


def _words(opts: Mapping[str, Any]) -> list[str]:
    """``KEY VALUE ...`` of a command line."""
    return [str(word) for item in opts.items() for word in item]


def _has_masks(path: Path, settings: dict[str, Any]) -> bool:
    """Whether a file of masks is there that was made with these settings."""
    header = read_header(path)
    return header is not None and header["unseg"].get("settings") == settings


def _compare(found: Any, plan: Any, folder: Path) -> None:
    """Refuse to go on with a run that was begun with another plan."""
    changed = sorted(differences(found, plan))
    if changed:
        old, new = (_look_up(tree, changed[0].split(".")) for tree in (found, plan))
        raise SelfTrainingError(
            f"{folder} was begun with other settings: {changed[0]} was {old!r:.200} and is "
            f"{new!r:.200} now; name another --output, or delete the folder to start over"
        )


def _look_up(tree: Any, keys: list[str]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
