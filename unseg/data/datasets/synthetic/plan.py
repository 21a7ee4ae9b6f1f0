"""What a scene holds before a pixel is drawn: objects, parts, clutter, background and light.

Sampling makes a plan from random numbers; posing, filling and painting it need none. Angles are
radians, lengths pixels unless a name says otherwise; x points right, y down.
"""

from dataclasses import dataclass, replace

import numpy as np

from unseg.data.datasets.synthetic.looks import Look
from unseg.data.datasets.synthetic.settings import SceneSettings


@dataclass(frozen=True)
class Material:
    """A look ready to paint: `ramp` (3, 256) float32; `offset` in tile pixels."""

    look: Look
    ramp: np.ndarray
    offset: tuple[float, float]


@dataclass(frozen=True)
class Pose:
    """Body to image: mirror, turn by `angle`, scale by `scale * zoom`, move to (x, y).

    `scale` is the object's own size in pixels per body unit and sets how coarse its texture is;
    `zoom` is 1 except while a clip brings the object nearer or further.
    """

    x: float
    y: float
    scale: float
    angle: float
    mirror: bool
    zoom: float = 1.0

    @property
    def to_image(self) -> np.ndarray:
        """(3, 3) float64 matrix from body to image coordinates."""
        size = self.scale * self.zoom
        c, s = size * np.cos(self.angle), size * np.sin(self.angle)
        flip = -1.0 if self.mirror else 1.0
        return np.array([[flip * c, -s, self.x], [flip * s, c, self.y], [0.0, 0.0, 1.0]])

    def apply(self, points: np.ndarray) -> np.ndarray:
        matrix = self.to_image
        return points @ matrix[:2, :2].T + matrix[:2, 2]


@dataclass(frozen=True)
class PartPlan:
    part_class: int
    sticks_out: bool
    polygon: np.ndarray
    material: Material


@dataclass(frozen=True)
class ObjectPlan:
    """One object in body coordinates and where it stands; `material` is its body's."""

    category: int
    outline: np.ndarray
    dome: float
    material: Material
    parts: tuple[PartPlan, ...]
    pose: Pose

    def moved(self, **changes: float) -> "ObjectPlan":
        return replace(self, pose=replace(self.pose, **changes))


@dataclass(frozen=True)
class StripPlan:
    """A thin strip of clutter, polygon in image coordinates; in front of the objects or behind."""

    polygon: np.ndarray
    colour: np.ndarray
    in_front: bool


@dataclass(frozen=True)
class Surface:
    """A background region: a material and the (3, 3) matrix from image to tile pixels."""

    material: Material
    to_tile: np.ndarray


@dataclass(frozen=True)
class Background:
    """Two surfaces; the second fills `region` (image coordinates). `defocus`: blur in pixels."""

    surfaces: tuple[Surface, Surface]
    region: np.ndarray
    defocus: float


@dataclass(frozen=True)
class Light:
    """`direction`: unit vector to the lamp, z towards the viewer; lamp and ambient RGB about 1.

    `gradient`: change of brightness across the image along (x, y); `dapple`: strength of soft
    shadows from outside the picture, whose tile offset is `dapple_offset`; `vignette`, `exposure`:
    brightness lost in the corners and overall gain.
    """

    direction: tuple[float, float, float]
    lamp: np.ndarray
    ambient: np.ndarray
    gradient: tuple[float, float]
    dapple: float
    dapple_offset: tuple[float, float]
    vignette: float
    exposure: float


@dataclass(frozen=True)
class ScenePlan:
    """A whole scene. `objects` run from the nearest to the furthest."""

    settings: SceneSettings
    objects: tuple[ObjectPlan, ...]
    strips: tuple[StripPlan, ...]
    background: Background
    light: Light
    noise_offset: tuple[int, int]
    camera: tuple[float, float] = (0.0, 0.0)
