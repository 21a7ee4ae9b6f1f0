"""Training, evaluation and dataset-wide work."""

from unseg.engine.main import main
from unseg.engine.optimizer import build_optimizer
from unseg.engine.pseudo_masks import (
    ImageSource,
    PseudoMaskJob,
    images_in_folder,
    images_of_dataset,
)
from unseg.engine.sharded_map import WorkDir, sharded_map
from unseg.engine.trainer import Trainer

__all__ = [
    "ImageSource",
    "PseudoMaskJob",
    "Trainer",
    "WorkDir",
    "build_optimizer",
    "images_in_folder",
    "images_of_dataset",
    "main",
    "sharded_map",
]
