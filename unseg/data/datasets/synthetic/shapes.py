"""Outlines made of harmonics, the pieces that sit on them, and exact filling of polygons.

Polygons are (K, 2) float64 arrays of (x, y). *Body* coordinates are those of an outline of area pi
around the origin (its mean radius is about 1); *image* coordinates are pixels, with pixel centres
at integers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor

import cv2
import numpy as np

OUTLINE_POINTS = 72
_ANGLES = np.linspace(0, 2 * np.pi, OUTLINE_POINTS, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
_FIXED_POINT_BITS = 4

Harmonic = tuple[int, float, float]  # order, amplitude, phase in radians

# Families of shapes: harmonics of the radius, and width over height.
FAMILIES: dict[str, tuple[tuple[Harmonic, ...], float]] = {
    "gourd": (((2, 0.10, 0.0), (3, 0.05, 1.0)), 1.1),
    "box": (((4, 0.15, np.pi / 4), (8, 0.03, 0.0)), 1.45),
    "pod": (((1, 0.16, 0.0), (2, 0.08, np.pi / 2), (3, 0.05, 0.5)), 2.1),
    "star": (((5, 0.27, 0.3), (10, 0.04, 0.0)), 1.0),
    "wedge": (((3, 0.22, np.pi / 2), (6, 0.05, 0.0)), 1.15),
    "bean": (((2, 0.30, 0.0), (1, 0.14, np.pi / 2), (3, 0.12, np.pi / 2)), 1.25),
}


def outline(harmonics: Sequence[Harmonic], aspect: float) -> np.ndarray:
    """Closed outline in body coordinates, (OUTLINE_POINTS, 2), of area pi.

    The radius at angle t is 1 + sum of amplitude * cos(order * (t - phase)), kept above 0.25, then
    stretched by sqrt(aspect) along x and shrunk as much along y.
    """
    order, amplitude, phase = np.array(harmonics, np.float64).T
    radius = 1.0 + amplitude @ np.cos(order[:, None] * (_ANGLES - phase[:, None]))
    points = np.maximum(radius, 0.25)[:, None] * _CIRCLE
    points *= (aspect**0.5, aspect**-0.5)
    return points * (np.pi / polygon_area(points)) ** 0.5


def polygon_area(points: np.ndarray) -> float:
    x, y = points[:, 0], points[:, 1]
    twice = x[:-1] @ y[1:] - y[:-1] @ x[1:] + x[-1] * y[0] - y[-1] * x[0]
    return 0.5 * abs(float(twice))


def radius_towards(points: np.ndarray, angle: float) -> float:
    """Distance from the origin to the outline in direction `angle`, to the nearest vertex."""
    along = points @ (np.cos(angle), np.sin(angle))
    radius = np.sqrt((points * points).sum(axis=1))
    return float(radius[np.argmax(along / radius)])


def turned(points: np.ndarray, angle: float, centre: Sequence[float] = (0.0, 0.0)) -> np.ndarray:
    """Points rotated about the origin by `angle` radians and then moved by `centre`."""
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]]) + np.asarray(centre)


def ribbon(centre_line: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The polygon of the given widths (K,) around an open line (K, 2)."""
    tangent = np.empty_like(centre_line)
    tangent[1:-1] = centre_line[2:] - centre_line[:-2]
    tangent[0] = centre_line[1] - centre_line[0]
    tangent[-1] = centre_line[-1] - centre_line[-2]
    length = np.sqrt((tangent * tangent).sum(axis=1))
    normal = tangent[:, ::-1] * (-0.5, 0.5) * (widths / np.maximum(length, 1e-9))[:, None]
    return np.concatenate([centre_line + normal, (centre_line - normal)[::-1]])


@lru_cache(maxsize=32)
def steps(number: int) -> np.ndarray:
    """Equal steps from 0 to 1, (number,), read-only."""
    values = np.linspace(0, 1, number)
    values.flags.writeable = False
    return values


def curved_line(length: float, bend: float, num_points: int) -> np.ndarray:
    """A line along +x from the origin that leaves the axis by `bend` at its end (a parabola)."""
    t = steps(num_points)
    return np.stack([length * t, bend * t * t], axis=1)


def limb(body: np.ndarray, angle: float, length: float, width: float, bend: float) -> np.ndarray:
    """A tapering stalk that starts inside the body and leaves it in direction `angle`."""
    reach = radius_towards(body, angle)
    line = curved_line(0.55 * reach + length, bend, 10)
    line[:, 0] += 0.45 * reach
    taper = 1.25 - 0.5 * steps(10)
    taper[-1] = 0.45
    return turned(ribbon(line, width * taper), angle)


def band(angle: float, offset: float, width: float, bend: float) -> np.ndarray:
    """A belt right across the body, at right angles to `angle`, `offset` from its centre."""
    t = 2 * steps(9) - 1
    line = np.stack([offset + bend * t * t, 2.5 * t], axis=1)
    return turned(ribbon(line, np.full(9, width)), angle)


def cap(angle: float, offset: float, bend: float) -> np.ndarray:
    """Everything further than about `offset` from the centre in direction `angle`."""
    t = 2 * steps(9) - 1
    edge = np.stack([offset + bend * (t * t - 0.3), 2.5 * t], axis=1)
    return turned(np.concatenate([edge, [[4.0, 2.5], [4.0, -2.5]]]), angle)


@dataclass(frozen=True)
class Window:
    """A rectangle of the image: columns x0..x1 - 1, rows y0..y1 - 1."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    @property
    def shape(self) -> tuple[int, int]:
        return self.y1 - self.y0, self.x1 - self.x0

    def shift(self) -> np.ndarray:
        """(3, 3) matrix from window pixels to image pixels."""
        return np.array([[1.0, 0, self.x0], [0, 1.0, self.y0], [0, 0, 1.0]])


def window_around(
    polygons: Sequence[np.ndarray], size: tuple[int, int], margin: int
) -> Window | None:
    """The part of a (height, width) image that holds the polygons, or None if it holds nothing."""
    points = polygons[0] if len(polygons) == 1 else np.concatenate(polygons)
    left, top = points.min(axis=0).tolist()
    right, bottom = points.max(axis=0).tolist()
    height, width = size
    if left > width - 1 or top > height - 1 or right < 0 or bottom < 0:
        return None
    return Window(
        max(floor(left) - margin, 0),
        max(floor(top) - margin, 0),
        min(ceil(right) + margin + 1, width),
        min(ceil(bottom) + margin + 1, height),
    )


def fill(points: np.ndarray, window: Window) -> np.ndarray:
    """The polygon's pixels in a window, (h, w) uint8 of 0 and 1.

    Vertices are rounded to sixteenths of a pixel and filled with integer arithmetic.
    """
    mask = np.zeros(window.shape, np.uint8)
    fixed = np.rint((points - (window.x0, window.y0)) * (1 << _FIXED_POINT_BITS))
    cv2.fillPoly(mask, [fixed.astype(np.int32)], 1, lineType=cv2.LINE_8, shift=_FIXED_POINT_BITS)
    return mask
