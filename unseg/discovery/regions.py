"""Regions of binary masks: connected components, holes, borders. Masks are numpy bool (H, W)."""

import cv2
import numpy as np


def connected_components(
    mask: np.ndarray, *, connectivity: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Components of the set pixels, numbered from 1 in the order of their first pixels by rows.

    Args:
        mask: (H, W) bool.
        connectivity: 4 or 8 neighbours.

    Returns:
        labels (H, W) int32, 0 where the mask is not set; areas (n,) int64 in pixels.
    """
    _check(mask)
    if mask.size == 0:
        return np.zeros(mask.shape, dtype=np.int32), np.zeros(0, dtype=np.int64)
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=connectivity)
    # OpenCV's algorithms number components differently; the order of first pixels is ours.
    values, first = np.unique(labels, return_index=True)
    order = values[values > 0][np.argsort(first[values > 0])]
    rank = np.zeros(count, dtype=np.int32)
    rank[order] = np.arange(1, len(order) + 1)
    labels = rank[labels]
    return labels, np.bincount(labels.ravel(), minlength=len(order) + 1)[1:]


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """The mask with every background region that does not touch the border filled.

    Background is taken 4-connected, so that an 8-connected outline closes.
    """
    _check(mask)
    labels, areas = connected_components(~mask, connectivity=4)
    border = np.concatenate((labels[:1].ravel(), labels[-1:].ravel(),
                             labels[:, :1].ravel(), labels[:, -1:].ravel()))  # fmt: skip
    outside = np.zeros(len(areas) + 1, dtype=bool)
    outside[border] = True
    outside[0] = False
    return ~outside[labels]


def remove_small(mask: np.ndarray, min_area: float) -> np.ndarray:
    """The mask without 8-connected components of fewer than `min_area` pixels."""
    labels, areas = connected_components(mask)
    return np.concatenate(([False], areas >= min_area))[labels]


def border_fractions(mask: np.ndarray, thickness: int) -> np.ndarray:
    """Share of set pixels in the top, bottom, left and right strips of that thickness, (4,) float.

    Strips of a mask that is thinner than they are cover it whole.
    """
    _check(mask)
    strips = (mask[:thickness], mask[-thickness:], mask[:, :thickness], mask[:, -thickness:])
    return np.array([strip.mean() if strip.size else 0.0 for strip in strips])


def _check(mask: np.ndarray) -> None:
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(f"mask must be bool (H, W), got {mask.dtype} {mask.shape}")
