"""What can be turned on a synthetic scene: one frozen dataclass, checked when it is made.

Lengths are fractions of the image or, where called pixels, pixels of a 160-pixel image: they grow
with the shorter side, so a 320-pixel scene shows much the same picture in more detail.
"""

from dataclasses import dataclass

REFERENCE_SIDE = 160
MIN_SIDE = 32


@dataclass(frozen=True)
class SceneSettings:
    """Everything that, with a seed and an index, determines a scene.

    Content:
        size: (height, width) of the image in pixels.
        num_categories: size of the catalogue of object categories.
        catalogue_seed: another seed gives another world of categories.
        zipf: category c has frequency proportional to 1 / (c + 1) ** zipf.
        categories: ids that may appear, None for all; their relative frequencies are kept.
        mean_objects, max_objects: 1 + Poisson(mean - 1) objects are drawn, at most the maximum.
        area: least visible and greatest silhouette area of an object, as fractions of the image.
        centre: greatest distance of an object's centre from the image's centre, as a fraction of
            the image's sides (0.4: anywhere in the middle 80 %).
        pairs: probability that an object gets a neighbour of its category and look that touches it.
        min_visible: least visible fraction of an object's silhouette; one that cannot be placed
            so is left out of the scene.
    Difficulty (greater is harder unless said otherwise):
        contrast: least CIE Lab distance between an object's colour and the background's (greater is
            easier).
        camouflage: probability of a scene whose background ignores `contrast`.
        category_colour: probability that an instance has its category's colour and not a random one
            (greater is easier for clustering; 0 makes colour say nothing about the category).
        texture_contrast: scale of the two tones inside one texture.
        part_contrast: 0 paints parts like their object, 1 gives them their own colour.
        optional_parts: probability that a part after the first is there.
        strips: mean number of thin strips of clutter; strips_in_front: share that hides objects.
        shading: 0 flat, 1 fully lit relief; shadow: darkness of cast shadows.
        lighting: strength of uneven illumination (gradient, dapples, vignette).
        noise: standard deviation of sensor noise in grey levels.
    Clips:
        frames: number of frames, 1 for a still scene.
        speed: scale of the motion; 1 moves objects by about 2 % of the image per frame.

    Raises ValueError, naming the field, for values that make no scene.
    """

    size: tuple[int, int] = (REFERENCE_SIDE, REFERENCE_SIDE)
    num_categories: int = 24
    catalogue_seed: int = 0
    zipf: float = 0.9
    categories: tuple[int, ...] | None = None
    mean_objects: float = 3.25
    max_objects: int = 8
    area: tuple[float, float] = (0.01, 0.11)
    centre: float = 0.42
    pairs: float = 0.0
    min_visible: float = 0.4
    contrast: float = 26.0
    camouflage: float = 0.12
    category_colour: float = 0.85
    texture_contrast: float = 1.0
    part_contrast: float = 0.85
    optional_parts: float = 0.85
    strips: float = 4.0
    strips_in_front: float = 0.15
    shading: float = 1.0
    shadow: float = 0.5
    lighting: float = 1.0
    noise: float = 3.0
    frames: int = 1
    speed: float = 1.0

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_categories(self.num_categories, self.categories)
        low, high = self.area
        if not 0 < low < high <= 0.8:
            raise ValueError(f"area: 0 < least < greatest <= 0.8 is needed, got {self.area}")
        for name in ("pairs", "camouflage", "category_colour", "part_contrast", "min_visible"):
            _check_range(name, getattr(self, name), 0.0, 1.0)
        for name in ("optional_parts", "strips_in_front", "shadow"):
            _check_range(name, getattr(self, name), 0.0, 1.0)
        for name in ("shading", "lighting", "texture_contrast"):
            _check_range(name, getattr(self, name), 0.0, 3.0)
        _check_range("centre", self.centre, 0.0, 0.5)
        _check_range("mean_objects", self.mean_objects, 1.0, 40.0)
        _check_range("strips", self.strips, 0.0, 100.0)
        _check_range("noise", self.noise, 0.0, 60.0)
        if self.max_objects < 1 or self.frames < 1:
            raise ValueError(
                f"max_objects and frames must be at least 1, got {self.max_objects}, {self.frames}"
            )

    @property
    def unit(self) -> float:
        """Image pixels per pixel of a 160-pixel image."""
        return min(self.size) / REFERENCE_SIDE

    @property
    def allowed_categories(self) -> tuple[int, ...]:
        return tuple(range(self.num_categories)) if self.categories is None else self.categories


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or any(int(side) != side or side < MIN_SIDE for side in size):
        raise ValueError(f"size: (height, width) of at least {MIN_SIDE} pixels, got {size}")


def _check_categories(num_categories: int, categories: tuple[int, ...] | None) -> None:
    if num_categories < 1:
        raise ValueError(f"num_categories must be at least 1, got {num_categories}")
    if categories is None:
        return
    if not isinstance(categories, tuple):
        raise ValueError(f"categories: a tuple of ids or None, got {categories!r}")
    if not categories or any(not 0 <= c < num_categories for c in categories):
        raise ValueError(f"categories: ids in 0..{num_categories - 1}, got {categories}")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low:g}..{high:g}, got {value}")
