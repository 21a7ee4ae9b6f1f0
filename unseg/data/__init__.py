"""Data sets, mappers and loaders. Importing registers the data sets and mappers."""

from unseg.data import datasets as _datasets  # noqa: F401 (registers)
from unseg.data.build import build_test_loader, build_train_loader
from unseg.data.datasets.pseudo import (
    image_root_of,
    register_datasets_in_config,
    register_if_file,
    register_pseudo_masks,
)
from unseg.data.datasets.video_frames import register_video_frames
from unseg.data.embeddings import (
    EmbeddingRows,
    EmbeddingStore,
    EmbeddingStoreError,
    EmbeddingWriter,
    open_embeddings,
)
from unseg.data.instance_map import instance_index_map
from unseg.data.mappers import MAPPERS, build_mapper

__all__ = [
    "MAPPERS",
    "EmbeddingRows",
    "EmbeddingStore",
    "EmbeddingStoreError",
    "EmbeddingWriter",
    "build_mapper",
    "build_test_loader",
    "build_train_loader",
    "image_root_of",
    "instance_index_map",
    "open_embeddings",
    "register_datasets_in_config",
    "register_if_file",
    "register_pseudo_masks",
    "register_video_frames",
]
