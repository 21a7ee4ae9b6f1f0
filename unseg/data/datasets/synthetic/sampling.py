"""Drawing the pieces of a scene from random numbers: objects, clutter, light, surfaces."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from unseg.data.datasets.synthetic import shapes
from unseg.data.datasets.synthetic.catalogue import Catalogue, Category, PartSlot
from unseg.data.datasets.synthetic.looks import (
    Look,
    blended,
    colour_ramp,
    hsv_to_rgb,
    jittered,
    mean_colour,
)
from unseg.data.datasets.synthetic.plan import (
    Light,
    Material,
    ObjectPlan,
    PartPlan,
    Pose,
    StripPlan,
)
from unseg.data.datasets.synthetic.settings import SceneSettings
from unseg.data.datasets.synthetic.textures import NUM_TEXTURES, TILE


def sample_material(rng: np.random.Generator, look: Look, settings: SceneSettings) -> Material:
    offset = (float(rng.uniform(0, TILE)), float(rng.uniform(0, TILE)))
    return Material(look, colour_ramp(look, settings.texture_contrast), offset)


def sample_object(
    rng: np.random.Generator, settings: SceneSettings, catalogue: Catalogue, category: int
) -> ObjectPlan:
    """An instance of a category at the image's centre, of random size, direction and look."""
    kind = catalogue.categories[category]
    look = kind.look
    if rng.random() >= settings.category_colour:
        look = replace(
            look, hue=rng.random(), saturation=rng.uniform(0.1, 0.7), value=rng.uniform(0.3, 0.9)
        )
    material = sample_material(rng, jittered(look, rng), settings)
    outline = _instance_outline(rng, kind)
    parts = tuple(
        _sample_part(rng, settings, catalogue, slot, outline, material)
        for place, slot in enumerate(kind.slots)
        if rng.random() < settings.optional_parts or place == 0
    )
    height, width = settings.size
    least, greatest = settings.area
    area = least * 1.25 * (0.85 * greatest / (least * 1.25)) ** rng.random()
    pose = Pose(
        x=0.5 * width,
        y=0.5 * height,
        scale=float(np.sqrt(area * height * width / np.pi)),
        angle=float(rng.normal(0.0, 0.45)),
        mirror=bool(rng.random() < 0.5),
    )
    return ObjectPlan(category, outline, kind.dome, material, parts, pose)


def sample_twin(
    rng: np.random.Generator, settings: SceneSettings, catalogue: Catalogue, other: ObjectPlan
) -> ObjectPlan:
    """An instance of the other's category with its colours and about its size."""
    twin = sample_object(rng, settings, catalogue, other.category)
    look = jittered(other.material.look, rng, 0.35)
    twin = replace(twin, material=sample_material(rng, look, settings))
    return twin.moved(scale=other.pose.scale * float(rng.uniform(0.85, 1.1)))


def _instance_outline(rng: np.random.Generator, kind: Category) -> np.ndarray:
    """The category's harmonics, each a little off in strength and phase, and its aspect ratio."""
    strength = np.exp(rng.normal(0.0, 0.12, len(kind.harmonics)))
    shift = rng.normal(0.0, 0.06, len(kind.harmonics))
    harmonics = [
        (order, amplitude * strength[i], phase + shift[i])
        for i, (order, amplitude, phase) in enumerate(kind.harmonics)
    ]
    return shapes.outline(harmonics, kind.aspect * float(np.exp(rng.normal(0.0, 0.08))))


def _sample_part(
    rng: np.random.Generator,
    settings: SceneSettings,
    catalogue: Catalogue,
    slot: PartSlot,
    outline: np.ndarray,
    body: Material,
) -> PartPlan:
    kind = catalogue.part_classes[slot.part_class]
    angle = slot.angle + float(rng.normal(0.0, 0.1))
    size = kind.size * slot.scale * float(np.exp(rng.normal(0.0, 0.08)))
    bend = float(rng.normal(0.0, 0.12))
    if kind.kind == "limb":
        polygon = shapes.limb(outline, angle, size, 0.42 * np.sqrt(slot.scale), 3 * bend)
    elif kind.kind == "band":
        polygon = shapes.band(angle, slot.distance - 0.25, size, bend)
    elif kind.kind == "cap":
        polygon = shapes.cap(angle, size * shapes.radius_towards(outline, angle), bend)
    else:
        wobble = [(k, float(rng.normal(0.0, 0.15)) / k, 0.7 * k) for k in (2, 3, 4)]
        polygon = shapes.outline(wobble, float(rng.uniform(0.8, 1.3))) * size
        polygon = shapes.turned(polygon + (slot.distance, 0.0), angle)
    material = sample_material(rng, jittered(kind.look, rng, 0.7), settings)
    ramp = blended(material.ramp, body.ramp, settings.part_contrast)
    return PartPlan(slot.part_class, kind.kind == "limb", polygon, replace(material, ramp=ramp))


def sample_strips(rng: np.random.Generator, settings: SceneSettings) -> tuple[StripPlan, ...]:
    """Twigs, wires, cracks: Poisson many, thin, slightly bent."""
    height, width = settings.size
    unit = settings.unit
    strips = []
    for _ in range(int(rng.poisson(settings.strips))):
        length = float(rng.uniform(0.25, 0.8)) * min(height, width)
        line = shapes.curved_line(length, float(rng.normal(0.0, 0.15)) * length, 12)
        thickness = 1.0 - float(rng.uniform(0.0, 0.6)) * shapes.steps(12)
        polygon = shapes.ribbon(line, thickness * float(rng.uniform(1.6, 3.6)) * unit)
        start = (rng.uniform(-0.1, 0.9) * width, rng.uniform(0.0, 1.0) * height)
        strips.append(
            StripPlan(
                polygon=shapes.turned(polygon, float(rng.uniform(-np.pi, np.pi)), start),
                colour=hsv_to_rgb(
                    float(rng.normal(0.1, 0.09)), rng.uniform(0.1, 0.6), rng.uniform(0.2, 0.75)
                ),
                in_front=bool(rng.random() < settings.strips_in_front),
            )
        )
    return tuple(strips)


def sample_light(rng: np.random.Generator, settings: SceneSettings) -> Light:
    """A lamp above the scene, warmer or colder than the sky."""
    azimuth = -np.pi / 2 + float(rng.uniform(-1.2, 1.2))
    height = float(rng.uniform(0.75, 1.5))
    direction = np.array([np.cos(azimuth), np.sin(azimuth), height]) / np.hypot(1.0, height)
    warmth = float(rng.normal(0.03, 0.05))
    strength = settings.lighting
    tilt, amount = rng.uniform(0, 2 * np.pi), strength * rng.uniform(0.05, 0.35)
    return Light(
        direction=(float(direction[0]), float(direction[1]), float(direction[2])),
        lamp=np.array([1 + warmth, 1.0, 1 - warmth], np.float32),
        ambient=np.array([1 - warmth, 1.0, 1 + 1.5 * warmth], np.float32),
        gradient=(float(amount * np.cos(tilt)), float(amount * np.sin(tilt))),
        dapple=strength * float(rng.uniform(0.2, 0.5)) * float(rng.random() < 0.35),
        dapple_offset=(float(rng.uniform(0, TILE)), float(rng.uniform(0, TILE))),
        vignette=strength * float(rng.uniform(0.0, 0.3)),
        exposure=float(np.exp(strength * rng.normal(0.0, 0.1))),
    )


def background_colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """HSV of natural surfaces, (count, 3): earths, greens and a few others, rarely vivid."""
    kind = rng.integers(0, 8, count)
    hue = np.where(kind < 4, rng.normal(0.09, 0.035, count), rng.normal(0.27, 0.06, count))
    hue = np.where(kind == 7, rng.random(count), hue)
    saturation = rng.beta(1.7, 3.0, count) * 0.55
    return np.stack([hue, saturation, rng.uniform(0.25, 0.88, count)], axis=1)


def background_look(rng: np.random.Generator, hsv: np.ndarray) -> Look:
    """The surface of a background colour, (3,) HSV."""
    return Look(
        hue=float(hsv[0]),
        saturation=float(hsv[1]),
        value=float(hsv[2]),
        texture=int(rng.integers(NUM_TEXTURES)),
        texture_scale=float(rng.uniform(0.6, 1.1)),
        texture_angle=float(rng.uniform(0, np.pi)),
        contrast=float(rng.uniform(0.08, 0.26)),
        drift=float(rng.normal(0.0, 0.02)),
        relief=float(rng.uniform(0.05, 0.35)),
        gloss=0.0,
    )


def object_colours(objects: Sequence[ObjectPlan]) -> np.ndarray:
    """Mean body colour of each object, (N, 3) float32 RGB."""
    if not objects:
        return np.zeros((0, 3), np.float32)
    return np.stack([mean_colour(plan.material.ramp) for plan in objects])
