"""Small containers."""

from unseg.layers import PackedMasks
from unseg.structures.exemplar_pool import Exemplar, ExemplarPool
from unseg.structures.pseudo_mask import (
    RLE,
    ImageRecord,
    PseudoMask,
    encode_masks,
    make_pseudo_masks,
    stack_masks,
)

__all__ = [
    "RLE",
    "Exemplar",
    "ExemplarPool",
    "ImageRecord",
    "PackedMasks",
    "PseudoMask",
    "encode_masks",
    "make_pseudo_masks",
    "stack_masks",
]
