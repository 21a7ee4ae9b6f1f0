"""Which pixels belong to what: exact filling of objects and parts, and the maps of a scene.

N objects, P parts, H W image, h w window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unseg.data.datasets.synthetic.plan import ObjectPlan, ScenePlan, StripPlan
from unseg.data.datasets.synthetic.shapes import Window, fill, window_around

PAINT_MARGIN = 4  # pixels around an object, for soft edges


@dataclass(frozen=True)
class FilledObject:
    """An object's pixels in a window, without regard to what lies in front of it.

    body: (h, w) bool, the outline. parts: one (h, w) bool per part of the plan, inside the body or,
    for a limb, anywhere (its inner end is hidden by the body). silhouette: body and limbs.
    """

    window: Window
    body: np.ndarray
    parts: tuple[np.ndarray, ...]
    silhouette: np.ndarray


def fill_object(plan: ObjectPlan, size: tuple[int, int]) -> FilledObject | None:
    """Fill an object's polygons in a (height, width) image; None if it lies outside."""
    outline = plan.pose.apply(plan.outline)
    polygons = [plan.pose.apply(part.polygon) for part in plan.parts]
    limbs = [polygons[i] for i, part in enumerate(plan.parts) if part.sticks_out]
    window = window_around([outline, *limbs], size, PAINT_MARGIN)
    if window is None:
        return None
    body = fill(outline, window).view(bool)
    silhouette = body.copy()
    parts = []
    for part, polygon in zip(plan.parts, polygons):
        mask = fill(polygon, window).view(bool)
        if part.sticks_out:
            silhouette |= mask
        else:
            mask &= body
        parts.append(mask)
    if not silhouette.any():
        return None
    return FilledObject(window, body, tuple(parts), silhouette)


def fill_silhouette(plan: ObjectPlan, size: tuple[int, int]) -> np.ndarray:
    """Body and limbs of an object in a (height, width) image, (H, W) bool."""
    window = Window(0, 0, size[1], size[0])
    mask = fill(plan.pose.apply(plan.outline), window)
    for part in plan.parts:
        if part.sticks_out:
            mask |= fill(plan.pose.apply(part.polygon), window)
    return mask.view(bool)


def fill_strip(strip: StripPlan, canvas: np.ndarray, value: int | bool) -> None:
    """Write a value into the (H, W) canvas wherever the strip lies."""
    window = window_around([strip.polygon], canvas.shape, 1)
    if window is not None:
        canvas[window.slices][fill(strip.polygon, window).view(bool)] = value


@dataclass(frozen=True)
class Maps:
    """Visible pixels: numbers of objects and of parts, (H, W) int16, -1 for none.

    Objects count in the plan's order, parts through all objects in that order.
    """

    objects: np.ndarray
    parts: np.ndarray


def visible_maps(plan: ScenePlan, filled: Sequence[FilledObject | None]) -> Maps:
    """Draw the numbers of objects and parts from the furthest to the nearest."""
    objects = np.full(plan.settings.size, -1, np.int16)
    parts = np.full(plan.settings.size, -1, np.int16)
    first_part = np.cumsum([0, *(len(entry.parts) for entry in plan.objects)])
    for number in reversed(range(len(plan.objects))):
        entry = filled[number]
        if entry is None:
            continue
        where = entry.window.slices
        objects[where][entry.silhouette] = number
        parts[where][entry.silhouette] = -1
        for local, mask in _in_painting_order(plan.objects[number], entry):
            parts[where][mask] = first_part[number] + local
    for strip in plan.strips:
        if strip.in_front:
            fill_strip(strip, objects, -1)
            fill_strip(strip, parts, -1)
    return Maps(objects, parts)


def _in_painting_order(plan: ObjectPlan, filled: FilledObject) -> list[tuple[int, np.ndarray]]:
    """Local part numbers with what the body leaves of them: limbs first, then what lies on it."""
    limbs = [(i, filled.parts[i] & ~filled.body) for i, p in enumerate(plan.parts) if p.sticks_out]
    return limbs + [(i, filled.parts[i]) for i, p in enumerate(plan.parts) if not p.sticks_out]
