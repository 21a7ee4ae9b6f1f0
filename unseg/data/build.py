"""Build the loaders of training and testing from a config."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader

from unseg.data.annotation_stream import AnnotationDataset, AnnotationIndex
from unseg.data.mappers import build_mapper
from unseg.data.sampling import DrawDataset, ResumableLoader, TrainingBatchSampler

logger = logging.getLogger(__name__)


def skips_bad_images(cfg: CfgNode) -> bool:
    """Whether ``INPUT.ON_BAD_IMAGE`` is "skip" rather than "raise".

    Raises:
        ValueError: it is neither.
    """
    choice = cfg.INPUT.ON_BAD_IMAGE
    if choice not in ("raise", "skip"):
        raise ValueError(f"INPUT.ON_BAD_IMAGE must be raise or skip, got {choice!r}")
    return choice == "skip"


def _training_dicts(cfg: CfgNode) -> list[dict[str, Any]]:
    return get_detection_dataset_dicts(
        list(cfg.DATASETS.TRAIN),
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )


def _repeat_factors(cfg: CfgNode, dicts: list[dict[str, Any]]) -> np.ndarray | None:
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return None
    if name == "RepeatFactorTrainingSampler":
        # A key of Detectron2 main; 0.5 always takes the square root.
        options = {} if cfg.DATALOADER.get("REPEAT_SQRT", True) else {"sqrt": False}
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts, cfg.DATALOADER.REPEAT_THRESHOLD, **options
        )
        return factors.double().numpy()
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN {name!r} is not supported: use TrainingSampler or "
        "RepeatFactorTrainingSampler"
    )


def _annotation_index(
    cfg: CfgNode, mapper: Callable[..., Any], dicts: list[dict[str, Any]]
) -> AnnotationIndex | None:
    """What the mapper wants an epoch to go through; None is the images."""
    choose = getattr(mapper, "annotation_index", None)
    index = choose(dicts) if choose else None
    if index is not None and cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN {cfg.DATALOADER.SAMPLER_TRAIN!r}: the mapper draws "
            "annotations, not images: use TrainingSampler"
        )
    return index


def build_train_loader(cfg: CfgNode) -> ResumableLoader:
    """Batches of ``DATASETS.TRAIN`` for this rank, reproducible from ``SEED``.

    DATALOADER.*, SOLVER.IMS_PER_BATCH and INPUT.* are read as well. With ``SEED`` -1 a seed is
    drawn; it is the loader's ``seed``. If the mapper has a method ``annotation_index(dicts)``, and
    it returns an index, an epoch goes through those annotations instead of the images, and a batch
    has SOLVER.IMS_PER_BATCH of them.

    Raises:
        ValueError: the batch is not divisible by the number of ranks, or a setting is unknown.
    """
    world_size = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is not a positive multiple of the "
            f"number of processes, {world_size}"
        )
    skip_bad = skips_bad_images(cfg)
    dicts = _training_dicts(cfg)
    is_wide = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        is_wide = np.array([d["width"] > d["height"] for d in dicts])
    repeat_factors = _repeat_factors(cfg, dicts)
    mapper = build_mapper(cfg, True)
    index = _annotation_index(cfg, mapper, dicts)
    # Serialised: workers do not copy it page by page.
    records: Sequence[dict[str, Any]] = DatasetFromList(dicts, copy=False)
    if index is not None:
        records, repeat_factors = AnnotationDataset(records, index), index.repeat_factors
        is_wide = None if is_wide is None else is_wide[index.images]
    num_images = len(records)  # the closure must not keep the list alive

    def make_batches(seed: int, start_iteration: int) -> TrainingBatchSampler:
        return TrainingBatchSampler(
            num_images,
            cfg.SOLVER.IMS_PER_BATCH // world_size,
            seed=seed,
            start_batch=start_iteration,
            rank=comm.get_rank(),
            world_size=world_size,
            is_wide=is_wide,
            repeat_factors=repeat_factors,
        )

    return ResumableLoader(
        DrawDataset(records, mapper, skip_bad=skip_bad),
        make_batches,
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Detectron2's test loader with the mapper of ``cfg.INPUT.MAPPER``.

    An image that cannot be read raises, whatever ``INPUT.ON_BAD_IMAGE`` says.
    """
    return build_detection_test_loader(cfg, dataset_name, mapper=build_mapper(cfg, False))
