"""Foreground of a patch grid: the Fiedler vector of a cosine graph, and its clean-up.

Melas-Kyriazi et al., "Deep Spectral Methods", CVPR 2022, section 3, as the published code of "Deep
Spectral Improvement" uses it. Legend: h w patches, n = h w, C channels.
"""

import cv2
import numpy as np
from torch import Tensor

from unseg.discovery.regions import border_fractions, connected_components, fill_holes
from unseg.discovery.spectral.eigen import laplacian_eigenpairs, orient


def fiedler_vector(features: Tensor, *, solver: str = "auto") -> Tensor:
    """Second eigenvector of the graph of inner products, negative ones taken for 0.

    Args:
        features: (n, C) float, n > 1; channels of L2-normalised patches. They are not normalised
            again after channels were left out: the products are parts of cosines.

    Returns:
        (n,), with its positive entries in the minority.
    """
    weights = (features @ features.t()).clamp_(min=0)
    return orient(laplacian_eigenpairs(weights, 2, solver=solver)[1])[:, 1]


def clean_mask(
    mask: np.ndarray,
    *,
    border: int = 5,
    border_ratio: float = 0.9,
    min_area_ratio: float = 0.1,
    area: str = "pixels",
    median: int = 3,
) -> np.ndarray:
    """Foreground and background told apart by the border, fragments and holes removed.

    1. Where at least two of the four border strips are foreground almost everywhere, the mask is
       inverted. 2. Holes are filled, components much smaller than the largest are dropped. 3. A
       median filter.

    Args:
        mask: (h, w) bool.
        border: thickness of the strips, in patches.
        border_ratio: share of foreground above which a strip counts.
        min_area_ratio: components below this share of the largest are dropped.
        area: of a component, "pixels" (their number) or "polygon" (inside the outline through
            their centres, as published; 0 for one that is a patch wide. If none has an area, the
            step is left out).
        median: width of the filter, 3 or 5; 1 for none.

    Returns:
        (h, w) bool; all False if nothing is left.

    Raises:
        ValueError: an unknown `area`, or another width of the filter.
    """
    if area not in ("pixels", "polygon"):
        raise ValueError(f"area must be pixels or polygon, got {area!r}")
    if median not in (1, 3, 5):
        raise ValueError(f"median must be 1, 3 or 5, got {median}")
    if (border_fractions(mask, border) > border_ratio).sum() >= 2:
        mask = ~mask
    mask = _large_filled(mask, min_area_ratio, _pixel_areas if area == "pixels" else _polygon_areas)
    if median > 1:
        mask = cv2.medianBlur(mask.astype(np.uint8), median).astype(bool)
    return mask


def _large_filled(mask: np.ndarray, min_ratio: float, areas_of) -> np.ndarray:
    filled = fill_holes(mask)
    labels, pixels = connected_components(filled)
    areas = areas_of(labels, pixels)
    if not areas.any():
        return mask
    return np.concatenate(([False], areas >= min_ratio * areas.max()))[labels]


def _pixel_areas(labels: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    return pixels


def _polygon_areas(labels: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    areas = []
    for number in range(1, len(pixels) + 1):
        part = (labels == number).astype(np.uint8)
        (outline,), _ = cv2.findContours(part, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        areas.append(cv2.contourArea(outline))
    return np.array(areas)
