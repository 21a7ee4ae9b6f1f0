"""Masks and boxes drawn on images, by Detectron2's Visualizer, with stable colours."""

from collections.abc import Sequence

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.utils.visualizer import Visualizer

_GAP = 4  # white pixels between pictures


def _colors(count: int) -> list[tuple[float, float, float]]:
    """Distinct colours, the same for the same count: hues a golden ratio apart."""
    hues = (0.09 + 0.618034 * np.arange(count)) % 1.0
    channels = np.abs((6 * hues[:, None] + np.array([0, 4, 2])) % 6 - 3) - 1
    return [tuple(c) for c in 0.15 + 0.85 * channels.clip(0, 1)]


def draw_instances(
    image: np.ndarray,
    masks: np.ndarray | None,
    labels: Sequence[str] | None = None,
    *,
    boxes: np.ndarray | None = None,
    alpha: float = 0.45,
) -> np.ndarray:
    """Overlay masks with outlines, or boxes; the largest are drawn first, so that all can be seen.

    Args:
        image: (H, W, 3) uint8 RGB.
        masks: (N, H, W) bool, or None to draw boxes alone.
        labels: N texts, or None.
        boxes: (N, 4) XYXY in pixels, or None.
        alpha: opacity of the fill.

    Returns:
        (H, W, 3) uint8.
    """
    count = max(len(drawn) for drawn in (masks, boxes) if drawn is not None)
    if count == 0:
        return image.copy()
    visualizer = Visualizer(image, MetadataCatalog.get("__unseg_drawing"))
    drawn = visualizer.overlay_instances(
        masks=None if masks is None else list(masks),
        boxes=boxes,
        labels=labels,
        assigned_colors=_colors(count),
        alpha=alpha,
    )
    picture = drawn.get_image()
    # The canvas of odd sizes can come out a pixel short.
    return picture[: image.shape[0], : image.shape[1]]


def side_by_side(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures (H, W, 3) uint8 in one row on white; lower ones are filled up at the bottom."""
    height = max(p.shape[0] for p in pictures)
    width = sum(p.shape[1] for p in pictures) + _GAP * (len(pictures) - 1)
    row = np.full((height, width, 3), 255, dtype=np.uint8)
    x = 0
    for picture in pictures:
        row[: picture.shape[0], x : x + picture.shape[1]] = picture
        x += picture.shape[1] + _GAP
    return row
