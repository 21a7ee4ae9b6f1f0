"""From dataset dicts to the inputs of models."""

from unseg.data.mappers.augmentation import ResizeShortestEdge, build_augmentations
from unseg.data.mappers.instance_mapper import InstanceMapper
from unseg.data.mappers.registry import MAPPERS, build_mapper

__all__ = [
    "MAPPERS",
    "InstanceMapper",
    "ResizeShortestEdge",
    "build_augmentations",
    "build_mapper",
]
