"""Putting a scene together: which objects, where, in front of which background.

Objects are placed from the nearest to the furthest, so what is visible of one is known exactly when
it is placed and never changes afterwards.
"""

from dataclasses import dataclass, replace

import numpy as np

from unseg.data.datasets.synthetic import shapes
from unseg.data.datasets.synthetic.catalogue import Catalogue, build_catalogue, frequencies
from unseg.data.datasets.synthetic.coverage import fill_silhouette, fill_strip
from unseg.data.datasets.synthetic.looks import Look, hsv_to_rgb, rgb_to_lab
from unseg.data.datasets.synthetic.plan import (
    Background,
    ObjectPlan,
    ScenePlan,
    StripPlan,
    Surface,
)
from unseg.data.datasets.synthetic.sampling import (
    background_colours,
    background_look,
    object_colours,
    sample_light,
    sample_material,
    sample_object,
    sample_strips,
    sample_twin,
)
from unseg.data.datasets.synthetic.settings import SceneSettings

PLACEMENT_ATTEMPTS = 8
BACKGROUND_CANDIDATES = 32
TOUCH_STEPS = 8


def sample_scene(settings: SceneSettings, rng: np.random.Generator) -> ScenePlan:
    """Draw a scene; all its randomness comes from `rng`."""
    catalogue = build_catalogue(settings.num_categories, settings.catalogue_seed)
    light = sample_light(rng, settings)
    strips = sample_strips(rng, settings)
    objects = _place_objects(rng, settings, catalogue, strips)
    return ScenePlan(
        settings=settings,
        objects=objects,
        strips=strips,
        background=_sample_background(rng, settings, object_colours(objects)),
        light=light,
        noise_offset=(int(rng.integers(256)), int(rng.integers(256))),
    )


def _place_objects(
    rng: np.random.Generator,
    settings: SceneSettings,
    catalogue: Catalogue,
    strips: tuple[StripPlan, ...],
) -> tuple[ObjectPlan, ...]:
    """Objects that can be placed, nearest first; lower in the image means nearer."""
    height, width = settings.size
    probability = frequencies(settings.num_categories, settings.zipf, settings.allowed_categories)
    count = min(1 + int(rng.poisson(settings.mean_objects - 1)), settings.max_objects)
    categories = rng.choice(settings.num_categories, count, p=probability)
    rows = np.sort(rng.uniform(-1, 1, count))[::-1]
    taken = np.zeros((height, width), bool)
    for strip in strips:
        if strip.in_front:
            fill_strip(strip, taken, True)
    placed: list[ObjectPlan] = []
    for category, row in zip(categories, rows):
        wanted = sample_object(rng, settings, catalogue, int(category))
        plan = _find_place(rng, settings, wanted, float(row), taken)
        if plan is None:
            continue
        placed.append(plan)
        if len(placed) < settings.max_objects and rng.random() < settings.pairs:
            twin = sample_twin(rng, settings, catalogue, plan)
            twin = _find_touching_place(rng, settings, twin, plan, taken)
            if twin is not None:
                placed.append(twin)
    return tuple(placed)


@dataclass(frozen=True)
class _Stamp:
    """An object's whole silhouette, (2 r, 2 r) bool around its centre at (r, r)."""

    silhouette: np.ndarray
    pixels: int

    def overlap(self, x: int, y: int, canvas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What meets of the stamp and of the (H, W) canvas with the stamp's centre at (x, y)."""
        reach = len(self.silhouette) // 2
        height, width = canvas.shape
        left, top = x - reach, y - reach
        stamp = self.silhouette[max(-top, 0) : height - top, max(-left, 0) : width - left]
        return stamp, canvas[max(top, 0) : y + reach, max(left, 0) : x + reach]


def _stamp(plan: ObjectPlan, settings: SceneSettings) -> tuple[ObjectPlan, _Stamp]:
    """The object, shrunk if its silhouette exceeds the greatest area, and its stamp."""
    limit = settings.area[1] * settings.size[0] * settings.size[1]
    while True:
        reach = int(4 * plan.pose.scale) + 4
        centred = plan.moved(x=float(reach), y=float(reach))
        silhouette = fill_silhouette(centred, (2 * reach, 2 * reach))
        pixels = int(np.count_nonzero(silhouette))
        if pixels <= limit:
            return plan, _Stamp(silhouette, pixels)
        plan = plan.moved(scale=plan.pose.scale * 0.98 * float(np.sqrt(limit / pixels)))


def _find_place(
    rng: np.random.Generator,
    settings: SceneSettings,
    plan: ObjectPlan,
    row: float,
    taken: np.ndarray,
) -> ObjectPlan | None:
    """The object where enough of it is visible, marked in `taken`; None if no attempt succeeds.

    row: wanted height in the image, -1 (top) to 1 (bottom) of where centres may lie.
    """
    height, width = settings.size
    plan, stamp = _stamp(plan, settings)
    for attempt in range(PLACEMENT_ATTEMPTS):
        vertical = min(max(row + 0.25 * attempt * rng.normal(), -1.0), 1.0)
        x = round((0.5 + settings.centre * rng.uniform(-1, 1)) * width - 0.5)
        y = round((0.5 + settings.centre * vertical) * height - 0.5)
        if _claim(stamp, x, y, settings, taken):
            return plan.moved(x=float(x), y=float(y))
    return None


def _claim(stamp: _Stamp, x: int, y: int, settings: SceneSettings, taken: np.ndarray) -> bool:
    """Mark the pixels of an object centred at (x, y) as taken if enough of it is visible."""
    silhouette, covered = stamp.overlap(x, y, taken)
    visible = int(np.count_nonzero(silhouette & ~covered))
    if visible < max(settings.area[0] * taken.size, settings.min_visible * stamp.pixels):
        return False
    covered |= silhouette
    return True


def _find_touching_place(
    rng: np.random.Generator,
    settings: SceneSettings,
    twin: ObjectPlan,
    first: ObjectPlan,
    taken: np.ndarray,
) -> ObjectPlan | None:
    """Slide the twin towards the first object until their silhouettes meet; it lies behind.

    The distance is bisected between overlapping and apart and ends on the overlapping side, so the
    twin's visible part borders on the first object.
    """
    twin, stamp = _stamp(twin, settings)
    target = fill_silhouette(first, settings.size)
    height, width = settings.size
    for _ in range(PLACEMENT_ATTEMPTS):
        angle = float(rng.uniform(0, 2 * np.pi))
        near, far = 0.0, 2.5 * (first.pose.scale + twin.pose.scale)
        for _ in range(TOUCH_STEPS):
            middle = 0.5 * (near + far)
            silhouette, covered = stamp.overlap(*_beside(first, angle, middle), target)
            if (silhouette & covered).any():
                near = middle
            else:
                far = middle
        x, y = _beside(first, angle, near)
        if 0 <= x < width and 0 <= y < height and _claim(stamp, x, y, settings, taken):
            return twin.moved(x=float(x), y=float(y))
    return None


def _beside(first: ObjectPlan, angle: float, distance: float) -> tuple[int, int]:
    """The pixel at a distance from the first object's centre."""
    x = first.pose.x + distance * np.cos(angle)
    y = first.pose.y + distance * np.sin(angle)
    return round(float(x)), round(float(y))


def _sample_background(
    rng: np.random.Generator, settings: SceneSettings, colours: np.ndarray
) -> Background:
    """Two regions whose colours stand apart from the objects', unless the scene is camouflaged.

    colours: (N, 3) RGB of the objects. The first of a few candidate pairs that keeps the distance
    `settings.contrast` in Lab is taken, or the one that comes nearest to it.
    """
    hsv = background_colours(rng, 2 * BACKGROUND_CANDIDATES).reshape(-1, 2, 3)
    chosen = 0
    if rng.random() >= settings.camouflage and len(colours):
        candidates = rgb_to_lab(hsv_to_rgb(hsv[..., 0], hsv[..., 1], hsv[..., 2]))
        gaps = candidates[:, :, None] - rgb_to_lab(colours)
        gaps = np.sqrt((gaps * gaps).sum(axis=-1)).min(axis=(1, 2))
        passing = np.flatnonzero(gaps >= settings.contrast)
        chosen = int(passing[0]) if len(passing) else int(gaps.argmax())
    back, front = (
        sample_material(rng, background_look(rng, colour), settings) for colour in hsv[chosen]
    )
    has_ground = rng.random() < 0.55
    region, horizon = _sample_region(rng, settings, has_ground)
    wall = Surface(back, _frontal(back.look, back.offset, settings))
    if has_ground:
        ground = Surface(front, _receding(front.look, front.offset, settings, horizon))
    else:
        ground = Surface(front, _frontal(front.look, front.offset, settings))
    defocus = settings.unit * float(rng.uniform(0.5, 1.3)) * float(rng.random() < 0.4)
    return Background((wall, ground), region, defocus)


def _sample_region(
    rng: np.random.Generator, settings: SceneSettings, has_ground: bool
) -> tuple[np.ndarray, float]:
    """Polygon of the second region, below a wavy edge, and the edge's height in pixels."""
    height, width = settings.size
    diagonal = float(np.hypot(height, width))
    t = 2 * shapes.steps(24) - 1
    amplitude = (0.03 if has_ground else 0.1) * rng.random() * min(height, width)
    edge = amplitude * np.sin(t * rng.uniform(2, 7) + rng.uniform(0, 6))
    edge += 0.4 * amplitude * np.sin(t * rng.uniform(7, 16) + rng.uniform(0, 6))
    polygon = np.stack([t * diagonal, edge], axis=1)
    polygon = np.concatenate([polygon, [[diagonal, 2 * diagonal], [-diagonal, 2 * diagonal]]])
    angle = float(rng.normal(0.0, 0.05) if has_ground else rng.uniform(-np.pi, np.pi))
    level = float(rng.uniform(0.15, 0.5) if has_ground else rng.uniform(0.35, 0.65))
    return shapes.turned(polygon, angle, (0.5 * width, level * height)), level * height


def _frontal(look: Look, offset: tuple[float, float], settings: SceneSettings) -> np.ndarray:
    """Image to tile for a surface that faces the camera."""
    scale = look.texture_scale / settings.unit
    c, s = scale * np.cos(look.texture_angle), scale * np.sin(look.texture_angle)
    return np.array([[c, -s, offset[0]], [s, c, offset[1]], [0.0, 0.0, 1.0]])


def _receding(
    look: Look, offset: tuple[float, float], settings: SceneSettings, horizon: float
) -> np.ndarray:
    """Image to tile for a floor seen at a slant: finer towards the horizon."""
    height, width = settings.size
    depth = 2.2 * (height - horizon)  # from the bottom up to where the floor would vanish
    vanish = height - depth
    squeeze = np.array(
        [[depth, 0.0, -0.5 * width * depth], [0.0, 0.0, depth * depth], [0.0, 1.0, -vanish]]
    )
    flat = _frontal(replace(look, texture_angle=0.0), offset, settings)
    flat[:2, :2] *= 0.75
    return flat @ squeeze
