"""Segmentation by the eigenvectors of patch graphs."""

from unseg.discovery.spectral.channels import (
    channel_entropy,
    deviation_channel_reduction,
    entropy_channel_reduction,
)
from unseg.discovery.spectral.clustering import kmeans
from unseg.discovery.spectral.eigen import EigenError, laplacian_eigenpairs
from unseg.discovery.spectral.foreground import clean_mask, fiedler_vector
from unseg.discovery.spectral.graphs import ForegroundGraph, affinity, foreground_graph
from unseg.discovery.spectral.masks import (
    Spectral,
    labels_to_masks,
    segments_to_masks,
    spectral_masks,
)
from unseg.discovery.spectral.segmentation import Segments, segment
from unseg.discovery.spectral.settings import SpectralSettings

__all__ = [
    "EigenError",
    "ForegroundGraph",
    "Segments",
    "Spectral",
    "SpectralSettings",
    "affinity",
    "channel_entropy",
    "clean_mask",
    "deviation_channel_reduction",
    "entropy_channel_reduction",
    "fiedler_vector",
    "foreground_graph",
    "kmeans",
    "labels_to_masks",
    "laplacian_eigenpairs",
    "segment",
    "segments_to_masks",
    "spectral_masks",
]
