"""A rendered scene: the picture, and exactly which pixel belongs to which object and part."""

from dataclasses import dataclass

import numpy as np

from unseg.data.datasets.synthetic.coverage import Maps, fill_object, visible_maps
from unseg.data.datasets.synthetic.layout import sample_scene
from unseg.data.datasets.synthetic.paint import paint_scene
from unseg.data.datasets.synthetic.plan import ScenePlan
from unseg.data.datasets.synthetic.settings import SceneSettings

MIN_PART_PIXELS = 8  # at 160 pixels; smaller remains of a part are not listed


@dataclass(frozen=True)
class Scene:
    """A picture and its truth. N objects, P parts, H W image.

    image: (H, W, 3) uint8 RGB, None if only masks were asked for.
    masks: (N, H, W) bool, the visible pixels of each object, parts included; disjoint.
    categories: (N,) int64.
    order: (N,) int64, place from the nearest (0) to the furthest object.
    part_masks: (P, H, W) bool, visible pixels of each part, disjoint, inside the parent's mask.
    part_categories: (P,) int64, part classes. part_parents: (P,) int64, rows of `masks`.
    """

    image: np.ndarray | None
    masks: np.ndarray
    categories: np.ndarray
    order: np.ndarray
    part_masks: np.ndarray
    part_categories: np.ndarray
    part_parents: np.ndarray


def scene_rng(seed: int, index: int, *more: int) -> np.random.Generator:
    """The generator of a scene (or of one frame): independent for every (seed, index, ...)."""
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got {seed} and {index}")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index, *more))))


def render_scene(
    settings: SceneSettings, seed: int, index: int, *, with_image: bool = True
) -> Scene:
    """Render the scene of (settings, seed, index); the same bits for the same arguments.

    Neither the global random state nor the number of threads nor any earlier call has an influence.
    (On another kind of processor, floating-point rounding may move a pixel by a grey level.)
    with_image: False leaves the picture out, which is a few times faster.
    """
    return render_plan(sample_scene(settings, scene_rng(seed, index)), with_image=with_image)


def render_plan(plan: ScenePlan, *, with_image: bool = True, keep_empty: bool = False) -> Scene:
    """Render a planned scene. keep_empty: one row of `masks` per planned object, visible or not."""
    filled = [fill_object(entry, plan.settings.size) for entry in plan.objects]
    maps = visible_maps(plan, filled)
    image = paint_scene(plan, filled) if with_image else None
    return _scene(plan, maps, image, keep_empty)


def _scene(plan: ScenePlan, maps: Maps, image: np.ndarray | None, keep_empty: bool) -> Scene:
    order = np.arange(len(plan.objects))
    masks = maps.objects == order[:, None, None]
    if not keep_empty:
        seen = masks.any(axis=(1, 2))
        order, masks = order[seen], masks[seen]
    categories = np.array([plan.objects[i].category for i in order], np.int64)
    parents, classes = [], []
    for number, entry in enumerate(plan.objects):
        parents += [number] * len(entry.parts)
        classes += [part.part_class for part in entry.parts]
    counts = np.bincount(maps.parts.ravel() + 1, minlength=len(parents) + 1)[1:]
    listed = np.flatnonzero(counts >= MIN_PART_PIXELS * plan.settings.unit**2)
    return Scene(
        image=image,
        masks=masks,
        categories=categories,
        order=order.astype(np.int64),
        part_masks=maps.parts == listed[:, None, None],
        part_categories=np.array(classes, np.int64)[listed],
        part_parents=np.searchsorted(order, np.array(parents, np.int64)[listed]),
    )
