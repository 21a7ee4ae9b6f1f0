"""The world's categories: what makes a category recognisable, and how often it appears.

Categories come in families of shapes (super-classes): category c belongs to family c mod 6, so each
family has frequent and rare members. A family shares its kind of outline and the neighbourhood of
its hue; a category has its own outline, colour, texture and parts. Part classes are shared between
categories. All of it is drawn once from the catalogue's seed.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from unseg.data.datasets.synthetic.looks import Look
from unseg.data.datasets.synthetic.settings import SceneSettings
from unseg.data.datasets.synthetic.shapes import FAMILIES, Harmonic
from unseg.data.datasets.synthetic.textures import NUM_TEXTURES, TEXTURE_NAMES

FAMILY_NAMES = tuple(FAMILIES)
# name, kind, size: a patch's radius, a band's width, a cap's distance, a limb's length (body units)
PART_KINDS: tuple[tuple[str, str, float], ...] = (
    ("stalk", "limb", 0.60),
    ("belt", "band", 0.42),
    ("lid", "cap", 0.42),
    ("eye", "patch", 0.30),
    ("handle", "limb", 0.50),
    ("saddle", "patch", 0.46),
    ("collar", "band", 0.30),
    ("tip", "cap", 0.58),
    ("fin", "limb", 0.42),
    ("plate", "patch", 0.40),
    ("sash", "band", 0.36),
    ("crown", "cap", 0.30),
)
PART_NAMES = tuple(name for name, _, _ in PART_KINDS)


@dataclass(frozen=True)
class PartClass:
    """A kind of part: `kind` is limb (sticks out), band, cap or patch (lie on the body)."""

    name: str
    kind: str
    size: float
    look: Look


@dataclass(frozen=True)
class PartSlot:
    """Where a category carries a part: class id, direction from the centre, distance, scale."""

    part_class: int
    angle: float
    distance: float
    scale: float


@dataclass(frozen=True)
class Category:
    """What the instances of a category share; `dome` is 0 for flat tops, 1 for round bodies."""

    name: str
    family: int
    harmonics: tuple[Harmonic, ...]
    aspect: float
    dome: float
    look: Look
    slots: tuple[PartSlot, ...]


@dataclass(frozen=True)
class Catalogue:
    categories: tuple[Category, ...]
    part_classes: tuple[PartClass, ...]

    @property
    def names(self) -> list[str]:
        return [category.name for category in self.categories]


@lru_cache(maxsize=16)
def build_catalogue(num_categories: int, seed: int) -> Catalogue:
    """The catalogue of a seed. A smaller one is the beginning of a larger one."""
    parts = tuple(_part_class(number, seed) for number in range(len(PART_KINDS)))
    return Catalogue(tuple(_category(c, seed) for c in range(num_categories)), parts)


def frequencies(num_categories: int, zipf: float, allowed: tuple[int, ...]) -> np.ndarray:
    """Probability of each category, (num_categories,) float64, 0 for those not allowed."""
    weights = np.zeros(num_categories)
    ids = np.array(allowed)
    weights[ids] = (ids + 1.0) ** -zipf
    return weights / weights.sum()


def frequency_groups(num_categories: int) -> list[str]:
    """LVIS's letters by thirds of the rank: "f"requent, "c"ommon, "r"are."""
    return ["fcr"[3 * c // num_categories] for c in range(num_categories)]


def thing_and_part_groups(settings: SceneSettings) -> list[str]:
    """Letters for the categories and then the part classes of a set of scenes, by thirds of their
    rank in how often they are expected: a part as often as the categories that carry it."""
    expected = frequencies(settings.num_categories, settings.zipf, settings.allowed_categories)
    catalogue = build_catalogue(settings.num_categories, settings.catalogue_seed)
    parts = np.zeros(len(PART_KINDS))
    for weight, category in zip(expected, catalogue.categories):
        for slot in category.slots:
            parts[slot.part_class] += weight
    both = np.concatenate([expected, parts])
    groups = np.empty(len(both), dtype="U1")
    groups[np.argsort(-both, kind="stable")] = frequency_groups(len(both))
    return groups.tolist()


def _part_class(number: int, seed: int) -> PartClass:
    rng = np.random.default_rng((seed, 1, number))
    name, kind, size = PART_KINDS[number]
    look = Look(
        hue=(0.381966 * number + 0.3) % 1.0,
        saturation=rng.uniform(0.2, 0.5),
        value=0.85 - 0.5 * (number % 2) + rng.uniform(-0.08, 0.08),
        texture=int(rng.integers(NUM_TEXTURES)),
        texture_scale=rng.uniform(0.9, 1.5),
        contrast=rng.uniform(0.1, 0.22),
        drift=rng.uniform(-0.03, 0.03),
        relief=rng.uniform(0.05, 0.25),
        gloss=rng.uniform(0.0, 0.35),
    )
    return PartClass(name, kind, size, look)


def _category(number: int, seed: int) -> Category:
    rng = np.random.default_rng((seed, 0, number))
    family = number % len(FAMILY_NAMES)
    member = number // len(FAMILY_NAMES)
    texture = (number + 7 * (number // NUM_TEXTURES)) % NUM_TEXTURES
    base, aspect = FAMILIES[FAMILY_NAMES[family]]
    harmonics = [
        (order, amplitude * rng.uniform(0.75, 1.25), phase) for order, amplitude, phase in base
    ]
    harmonics += [(k, rng.uniform(0.0, 0.16) / k, rng.uniform(0, 2 * np.pi)) for k in range(2, 8)]
    if FAMILY_NAMES[family] == "star":
        points = 5 + member % 4
        harmonics[0] = (points, harmonics[0][1], harmonics[0][2])
    name = f"{TEXTURE_NAMES[texture]}_{FAMILY_NAMES[family]}"
    return Category(
        name=name if number < NUM_TEXTURES else f"{name}_{number // NUM_TEXTURES + 1}",
        family=family,
        harmonics=tuple(harmonics),
        aspect=aspect * float(np.exp(rng.uniform(-0.15, 0.15))),
        dome=rng.uniform(0.35, 1.0),
        look=_category_look(rng, family, member, texture),
        slots=_part_slots(rng, len(PART_KINDS)),
    )


def _category_look(rng: np.random.Generator, family: int, member: int, texture: int) -> Look:
    """Families sit at six hues; their members differ in hue, saturation and lightness."""
    look = Look(
        hue=(family / len(FAMILY_NAMES) + 0.06 + 0.045 * (member % 4 - 1.5)) % 1.0,
        saturation=(0.62, 0.34, 0.5, 0.24)[(member + family) % 4] + rng.uniform(-0.06, 0.06),
        value=(0.72, 0.5, 0.36, 0.84)[(member + 2 * family) % 4] + rng.uniform(-0.05, 0.05),
        texture=texture,
        texture_scale=rng.uniform(0.9, 1.5),
        texture_angle=float(rng.choice([0.0, np.pi / 2])) + rng.uniform(-0.2, 0.2),
        contrast=rng.uniform(0.16, 0.34),
        drift=rng.uniform(-0.04, 0.04),
        relief=rng.uniform(0.1, 0.4),
        gloss=rng.uniform(0.0, 0.5) ** 2,
    )
    # Green and magenta bodies as vivid as fruit look like plastic: calm them.
    calm = 0.75 if family in (2, 4, 5) else 1.0
    return replace(look, saturation=look.saturation * calm)


def _part_slots(rng: np.random.Generator, num_classes: int) -> tuple[PartSlot, ...]:
    """One to three places for parts of different classes, spread around the centre."""
    count = int(rng.integers(1, 4))
    classes = rng.choice(num_classes, count, replace=False)
    first = rng.uniform(0, 2 * np.pi)
    return tuple(
        PartSlot(
            part_class=int(part_class),
            angle=first + 2 * np.pi * place / count + rng.uniform(-0.3, 0.3),
            distance=rng.uniform(0.15, 0.5),
            scale=rng.uniform(0.85, 1.2),
        )
        for place, part_class in enumerate(classes)
    )
