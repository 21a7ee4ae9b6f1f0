"""Training, evaluation and dataset-wide work."""

from unseg.engine.build_exemplars import build_exemplars
from unseg.engine.find_masks import find_masks, find_masks_parser
from unseg.engine.main import main
from unseg.engine.optimizer import build_optimizer
from unseg.engine.pseudo_masks import (
    ImageSource,
    PseudoMaskJob,
    images_in_folder,
    images_of_dataset,
)
from unseg.engine.self_training import (
    SelfTrainingError,
    SelfTrainingOptions,
    self_train,
)
from unseg.engine.sharded_map import WorkDir, sharded_map
from unseg.engine.stages import Stage, StageError
from unseg.engine.trainer import Trainer

__all__ = [
    "ImageSource",
    "PseudoMaskJob",
    "SelfTrainingError",
    "SelfTrainingOptions",
    "Stage",
    "StageError",
    "Trainer",
    "WorkDir",
    "build_exemplars",
    "build_optimizer",
    "find_masks",
    "find_masks_parser",
    "images_in_folder",
    "images_of_dataset",
    "main",
    "self_train",
    "sharded_map",
]
