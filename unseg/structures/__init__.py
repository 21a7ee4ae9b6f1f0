"""Small containers."""

from unseg.layers import PackedMasks
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
    "ImageRecord",
    "PackedMasks",
    "PseudoMask",
    "encode_masks",
    "make_pseudo_masks",
    "stack_masks",
]
