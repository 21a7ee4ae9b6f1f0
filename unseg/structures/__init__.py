"""Small containers."""

from unseg.layers import PackedMasks
from unseg.structures.canonical import CanonicalRule, canonical_places, label_windows
from unseg.structures.clusters import Clusters
from unseg.structures.exemplar_pool import Exemplar, ExemplarPool
from unseg.structures.grid import GRID_MODES, GridLabels, sample_on_grid
from unseg.structures.pseudo_mask import (
    RLE,
    ImageRecord,
    PseudoMask,
    encode_masks,
    make_pseudo_masks,
    pad_pseudo_masks,
    stack_masks,
)
from unseg.structures.window_masks import WindowMasks

__all__ = [
    "Clusters",
    "GRID_MODES",
    "RLE",
    "CanonicalRule",
    "Exemplar",
    "ExemplarPool",
    "GridLabels",
    "ImageRecord",
    "PackedMasks",
    "PseudoMask",
    "WindowMasks",
    "canonical_places",
    "encode_masks",
    "label_windows",
    "make_pseudo_masks",
    "pad_pseudo_masks",
    "sample_on_grid",
    "stack_masks",
]
