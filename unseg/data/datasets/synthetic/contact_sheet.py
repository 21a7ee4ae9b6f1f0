"""A sheet of scenes to look at, with the outlines of objects and parts if wanted."""

import colorsys

import cv2
import numpy as np

from unseg.data.datasets.synthetic.clips import render_clip
from unseg.data.datasets.synthetic.scene import Scene, render_scene
from unseg.data.datasets.synthetic.settings import SceneSettings

GAP = 4  # pixels between pictures


def contact_sheet(
    settings: SceneSettings,
    seed: int = 0,
    start: int = 0,
    count: int = 30,
    *,
    columns: int = 6,
    scale: int = 1,
    with_masks: bool = False,
) -> np.ndarray:
    """Scenes `start`, `start + 1`, ... side by side, (H, W, 3) uint8 RGB.

    A clip fills rows of its own with its frames. scale: each pixel becomes a square of that side.
    with_masks: outline objects in bright colours, parts thinly in white.
    """
    if count < 1 or columns < 1 or scale < 1:
        raise ValueError(
            f"count, columns and scale must be positive, got {count}, {columns}, {scale}"
        )
    rows: list[list[Scene]] = []
    if settings.frames > 1:
        for index in range(start, start + count):
            frames = render_clip(settings, seed, index)
            rows += [frames[i : i + columns] for i in range(0, len(frames), columns)]
    else:
        scenes = [render_scene(settings, seed, index) for index in range(start, start + count)]
        rows = [scenes[i : i + columns] for i in range(0, count, columns)]
    height, width = (side * scale for side in settings.size)
    columns = max(len(row) for row in rows)
    shape = (len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3)
    sheet = np.full(shape, 255, np.uint8)
    for y, row in enumerate(rows):
        for x, scene in enumerate(row):
            top, left = y * (height + GAP), x * (width + GAP)
            sheet[top : top + height, left : left + width] = _picture(scene, scale, with_masks)
    return sheet


def _picture(scene: Scene, scale: int, with_masks: bool) -> np.ndarray:
    picture = _enlarged(scene.image, scale)
    if not with_masks:
        return picture
    for mask in scene.part_masks:
        picture[_border(_enlarged(mask.view(np.uint8), scale), 1)] = 255
    for number, mask in enumerate(scene.masks):
        colour = colorsys.hsv_to_rgb(0.381966 * number % 1.0, 1.0, 1.0)
        border = _border(_enlarged(mask.view(np.uint8), scale), max(scale, 1))
        picture[border] = 255 * np.array(colour)
    return picture


def _enlarged(array: np.ndarray, scale: int) -> np.ndarray:
    return array.repeat(scale, axis=0).repeat(scale, axis=1)


def _border(mask: np.ndarray, thickness: int) -> np.ndarray:
    """The pixels of a mask (h, w) uint8 that are at most `thickness` from its outside, bool."""
    kernel = np.ones((2 * thickness + 1, 2 * thickness + 1), np.uint8)
    inner = cv2.erode(mask, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return (mask > inner).astype(bool)
