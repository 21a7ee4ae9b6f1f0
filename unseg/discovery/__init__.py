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
from unseg.discovery.normalized_cut import (
    MaskCut,
    MaskCutSettings,
    TokenCut,
    TokenCutSettings,
    mask_cut,
    token_cut,
)
from unseg.discovery.registry import DISCOVERERS, Discoverer, build_discoverer
from unseg.discovery.spectral import (
    Spectral,
    SpectralSettings,
    deviation_channel_reduction,
    entropy_channel_reduction,
    spectral_masks,
)

__all__ = [
    "DISCOVERERS",
    "CutOut",
    "Discoverer",
    "ExemplarError",
    "ExemplarSettings",
    "FreeMask",
    "FreeMaskSettings",
    "MaskCut",
    "MaskCutSettings",
    "PseudoMaskError",
    "Segmenter",
    "Spectral",
    "SpectralSettings",
    "TokenCut",
    "TokenCutSettings",
    "build_discoverer",
    "categories_in_folder",
    "choose_medoids",
    "choose_random",
    "coarse_foreground",
    "cut_out",
    "deviation_channel_reduction",
    "entropy_channel_reduction",
    "free_masks",
    "load_exemplar_pool",
    "load_pseudo_masks",
    "mask_cut",
    "save_exemplar_pool",
    "spectral_masks",
    "token_cut",
    "write_pseudo_masks",
]
