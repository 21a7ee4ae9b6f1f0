"""Weights on disk: safe loading, whole files, conversion of released checkpoints."""

from unseg.checkpoint.checkpointer import SafeCheckpointer
from unseg.checkpoint.clusters import load_clusters, save_clusters
from unseg.checkpoint.convert import convert, save_converted
from unseg.checkpoint.files import atomic_write
from unseg.checkpoint.hashes import file_hash, weights_hash
from unseg.checkpoint.safe import CheckpointError, load_weights_file

__all__ = [
    "CheckpointError",
    "SafeCheckpointer",
    "atomic_write",
    "convert",
    "file_hash",
    "load_clusters",
    "load_weights_file",
    "save_clusters",
    "save_converted",
    "weights_hash",
]
