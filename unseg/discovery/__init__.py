"""Masks without labels."""

from unseg.discovery.free_mask import FreeMask, FreeMaskSettings, free_masks
from unseg.discovery.io import PseudoMaskError, load_pseudo_masks, write_pseudo_masks
from unseg.discovery.registry import DISCOVERERS, Discoverer, build_discoverer

__all__ = [
    "DISCOVERERS",
    "Discoverer",
    "FreeMask",
    "FreeMaskSettings",
    "PseudoMaskError",
    "build_discoverer",
    "free_masks",
    "load_pseudo_masks",
    "write_pseudo_masks",
]
