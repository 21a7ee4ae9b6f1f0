"""Training, evaluation and dataset-wide work."""

from unseg.engine.build_exemplars import build_exemplars
from unseg.engine.dataset_job import ImageSource, images_in_folder, images_of_dataset
from unseg.engine.embed_dataset import EmbeddingCounts, EmbeddingJob, embed_dataset
from unseg.engine.find_masks import find_masks, find_masks_parser, launch_job
from unseg.engine.main import main
from unseg.engine.optimizer import build_optimizer
from unseg.engine.proposal_files import ProposalFilesJob, export_proposals
from unseg.engine.pseudo_masks import PseudoMaskJob
from unseg.engine.self_training import (
    SelfTrainingError,
    SelfTrainingOptions,
    self_train,
)
from unseg.engine.sharded_map import WorkDir, sharded_map
from unseg.engine.stages import Stage, StageError
from unseg.engine.trainer import Trainer

__all__ = [
    "EmbeddingCounts",
    "EmbeddingJob",
    "ImageSource",
    "ProposalFilesJob",
    "PseudoMaskJob",
    "SelfTrainingError",
    "SelfTrainingOptions",
    "Stage",
    "StageError",
    "Trainer",
    "WorkDir",
    "build_exemplars",
    "build_optimizer",
    "embed_dataset",
    "export_proposals",
    "find_masks",
    "find_masks_parser",
    "images_in_folder",
    "images_of_dataset",
    "launch_job",
    "main",
    "self_train",
    "sharded_map",
]
