"""From dataset dicts to the inputs of models."""

from unseg.data.mappers.augmentation import ResizeShortestEdge, build_augmentations
from unseg.data.mappers.deepmask_mapper import DeepMaskPatchMapper
from unseg.data.mappers.instance_mapper import InstanceMapper
from unseg.data.mappers.oracle_mapper import OracleMapper
from unseg.data.mappers.registry import MAPPERS, build_mapper
from unseg.data.mappers.strong_view import StrongViewSettings, strong_view
from unseg.data.mappers.two_view_mapper import TwoViewInstanceMapper

__all__ = [
    "MAPPERS",
    "DeepMaskPatchMapper",
    "InstanceMapper",
    "OracleMapper",
    "ResizeShortestEdge",
    "StrongViewSettings",
    "TwoViewInstanceMapper",
    "build_augmentations",
    "build_mapper",
    "strong_view",
]
