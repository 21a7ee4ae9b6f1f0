"""Masks without labels."""

from unseg.discovery.exemplar_pool import (
    ExemplarError,
    load_exemplar_pool,
    save_exemplar_pool,
)
from unseg.discovery.exemplars import (
    CutOut,
    ExemplarSettings,
    Segmenter,
    categories_in_folder,
    choose_medoids,
    choose_random,
    coarse_foreground,
    cut_out,
)
from unseg.discovery.free_mask import FreeMask, FreeMaskSettings, free_masks
from unseg.discovery.io import PseudoMaskError, load_pseudo_masks, write_pseudo_masks
from unseg.discovery.registry import DISCOVERERS, Discoverer, build_discoverer

__all__ = [
    "DISCOVERERS",
    "CutOut",
    "Discoverer",
    "ExemplarError",
    "ExemplarSettings",
    "FreeMask",
    "FreeMaskSettings",
    "PseudoMaskError",
    "Segmenter",
    "build_discoverer",
    "categories_in_folder",
    "choose_medoids",
    "choose_random",
    "coarse_foreground",
    "cut_out",
    "free_masks",
    "load_exemplar_pool",
    "load_pseudo_masks",
    "save_exemplar_pool",
    "write_pseudo_masks",
]
