"""From a plan and its filled objects to a picture: textured, lit, shadowed, photographed.

The canvas is (3, H, W) float32 RGB in 0..255, painted from back to front. H W image, h w window.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from unseg.data.datasets.synthetic.coverage import FilledObject
from unseg.data.datasets.synthetic.lighting import illuminated, illumination, photograph
from unseg.data.datasets.synthetic.plan import (
    Material,
    ObjectPlan,
    Pose,
    ScenePlan,
    StripPlan,
    Surface,
)
from unseg.data.datasets.synthetic.shapes import Window, fill, window_around
from unseg.data.datasets.synthetic.textures import LEVELS_PER_SIGMA, sample_texture

USUAL_RADIUS = 20.0  # pixels at 160; such a body shows texture_scale tile pixels per pixel
_SHADOW_TINT = np.array([1.0, 0.97, 0.92], np.float32)  # shadows keep the sky's blue
_WARP = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP


def paint_scene(plan: ScenePlan, filled: Sequence[FilledObject | None]) -> np.ndarray:
    """The scene's picture, (H, W, 3) uint8 RGB."""
    canvas = _paint_background(plan)
    for strip in plan.strips:
        if not strip.in_front:
            _paint_strip(canvas, strip, plan)
    for entry, mask in zip(reversed(plan.objects), reversed(filled)):
        if mask is not None:
            _paint_shadow(canvas, mask, entry.pose, plan)
            _paint_object(canvas, entry, mask, plan)
    for strip in plan.strips:
        if strip.in_front:
            _paint_strip(canvas, strip, plan)
    canvas *= illumination(plan)
    return photograph(canvas, plan)


def _paint_background(plan: ScenePlan) -> np.ndarray:
    background = plan.background
    height, width = plan.settings.size
    window = Window(0, 0, width, height)
    camera = np.array([[1.0, 0, -plan.camera[0]], [0, 1.0, -plan.camera[1]], [0, 0, 1.0]])
    albedo, relief = _sampled_surface(background.surfaces[0], camera, window)
    ground, ground_relief = _sampled_surface(background.surfaces[1], camera, window)
    inside = _soft(fill(background.region + plan.camera, window), 0.8 * plan.settings.unit)
    _composite(albedo, ground, inside)
    relief += (ground_relief - relief) * inside
    canvas = illuminated(albedo, relief * np.float32(plan.settings.unit), None, plan)
    if background.defocus > 0:
        for channel in canvas:
            cv2.GaussianBlur(channel, (0, 0), background.defocus, dst=channel)
    return canvas


def _sampled_surface(
    surface: Surface, camera: np.ndarray, window: Window
) -> tuple[np.ndarray, np.ndarray]:
    """Albedo (3, h, w) and relief (h, w) of a background surface."""
    to_tile = surface.to_tile @ camera @ window.shift()
    affine = not to_tile[2, :2].any()
    levels = sample_texture(
        surface.material.look.texture, to_tile[:2] if affine else to_tile, *window.shape
    )
    return _coloured(surface.material, levels), _relief(surface.material, levels)


def _coloured(material: Material, levels: np.ndarray) -> np.ndarray:
    return np.take(material.ramp, levels, axis=1)


def _relief(material: Material, levels: np.ndarray) -> np.ndarray:
    step = np.float32(material.look.relief / LEVELS_PER_SIGMA)
    return (levels.astype(np.float32) - np.float32(128)) * step


def _paint_object(
    canvas: np.ndarray, entry: ObjectPlan, filled: FilledObject, plan: ScenePlan
) -> None:
    """Limbs first, then the body with all that lies on it."""
    target = canvas[:, *filled.window.slices]
    unit = np.float32(plan.settings.unit)
    for part, mask in zip(entry.parts, filled.parts):
        if part.sticks_out and mask.any():
            levels = _levels_on_body(part.material, entry.pose, filled.window, unit)
            height = _dome(mask, 0.8, unit) + unit * _relief(part.material, levels)
            gloss = np.float32(part.material.look.gloss)
            colour = illuminated(_coloured(part.material, levels), height, gloss, plan)
            _composite(target, colour, _soft(mask.view(np.uint8), 0.5))
    if filled.body.any():
        colour = illuminated(*_body_surface(entry, filled, unit), plan)
        _composite(target, colour, _soft(filled.body.view(np.uint8), 0.5))


def _body_surface(
    entry: ObjectPlan, filled: FilledObject, unit: np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Albedo (3, h, w), height (h, w) and gloss (h, w) of a body with its inner parts."""
    levels = _levels_on_body(entry.material, entry.pose, filled.window, unit)
    albedo = _coloured(entry.material, levels)
    height = unit * _relief(entry.material, levels)
    gloss = np.full(levels.shape, entry.material.look.gloss, np.float32)
    for part, mask in zip(entry.parts, filled.parts):
        if part.sticks_out or not mask.any():
            continue
        levels = _levels_on_body(part.material, entry.pose, filled.window, unit)
        inside = _soft(mask.view(np.uint8), 0.5)
        _composite(albedo, _coloured(part.material, levels), inside)
        raised = unit * (np.float32(0.9) + _relief(part.material, levels))
        height += (raised - height) * inside
        gloss += (np.float32(part.material.look.gloss) - gloss) * inside
    return albedo, height + _dome(filled.body, entry.dome, unit), gloss


def _levels_on_body(material: Material, pose: Pose, window: Window, unit: np.float32) -> np.ndarray:
    """The texture as it lies on the body: it turns, grows and moves with it. (h, w) uint8.

    Larger objects show more of a texture and show it coarser, by the same factor.
    """
    look = material.look
    size = max(pose.scale / float(unit), 1.0) / USUAL_RADIUS
    density = USUAL_RADIUS * look.texture_scale * np.sqrt(size)  # tile pixels per body unit
    c, s = density * np.cos(look.texture_angle), density * np.sin(look.texture_angle)
    lay = np.array([[c, -s, material.offset[0]], [s, c, material.offset[1]]])
    return sample_texture(
        look.texture, lay @ np.linalg.inv(pose.to_image) @ window.shift(), *window.shape
    )


def _dome(mask: np.ndarray, roundness: float, unit: np.float32) -> np.ndarray:
    """Height in pixels of a body blown up from its mask: 0 at the edge, rounded towards the middle.

    Roundness near 0 gives a flat top with a bevelled edge, 1 a ball. (h, w) float32.
    """
    distance = cv2.distanceTransform(mask.view(np.uint8), cv2.DIST_L2, 5)
    thickness = float(distance.max())
    rim = max(roundness * thickness, 1.0)
    depth = np.minimum(distance * np.float32(1 / rim), 1)
    height = np.sqrt(depth * (2 - depth)) * np.float32(0.8 * rim)
    return cv2.GaussianBlur(height, (0, 0), max(0.14 * thickness, 0.7 * float(unit)))


def _soft(mask: np.ndarray, sigma: float) -> np.ndarray:
    """A mask of 0 and 1 as (h, w) float32 with edges blurred by `sigma` pixels."""
    return cv2.GaussianBlur(mask.astype(np.float32), (0, 0), sigma)


def _composite(target: np.ndarray, colour: np.ndarray, alpha: np.ndarray) -> None:
    """Paint `colour` (3, h, w) over `target` (3, h, w), in place, with opacity (h, w)."""
    target += (colour - target) * alpha


def _paint_shadow(canvas: np.ndarray, filled: FilledObject, pose: Pose, plan: ScenePlan) -> None:
    """Darken what lies behind an object, away from the lamp and softly."""
    if plan.settings.shadow <= 0:
        return
    size = pose.scale * pose.zoom
    x, y, z = plan.light.direction
    shift = (-x / z * 0.22 * size, -y / z * 0.22 * size)
    sigma = 0.12 * size + 0.5 * plan.settings.unit
    grow = int(np.ceil(max(abs(shift[0]), abs(shift[1])) + 2.5 * sigma))
    window, (height, width) = filled.window, plan.settings.size
    around = Window(
        max(window.x0 - grow, 0),
        max(window.y0 - grow, 0),
        min(window.x1 + grow, width),
        min(window.y1 + grow, height),
    )
    to_source = np.array(
        [[1, 0, around.x0 - window.x0 - shift[0]], [0, 1, around.y0 - window.y0 - shift[1]]]
    )
    moved = cv2.warpAffine(
        filled.silhouette.astype(np.float32), to_source, around.shape[::-1], flags=_WARP
    )
    dark = cv2.GaussianBlur(moved, (0, 0), sigma) * np.float32(plan.settings.shadow)
    canvas[:, *around.slices] *= 1 - dark * _SHADOW_TINT[:, None, None]


def _paint_strip(canvas: np.ndarray, strip: StripPlan, plan: ScenePlan) -> None:
    """A thin round thing with a small shadow."""
    polygon = strip.polygon + plan.camera
    window = window_around([polygon], plan.settings.size, 4)
    if window is None:
        return
    mask = fill(polygon, window)
    target = canvas[:, *window.slices]
    x, y, z = plan.light.direction
    unit = plan.settings.unit
    shift = np.array([[1, 0, 1.5 * unit * x / z], [0, 1, 1.5 * unit * y / z]])
    shadow = cv2.warpAffine(mask.astype(np.float32), shift, window.shape[::-1], flags=_WARP)
    dark = cv2.GaussianBlur(shadow, (0, 0), unit) * np.float32(0.6 * plan.settings.shadow)
    target *= 1 - dark
    height = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.8 * unit)
    colour = illuminated(strip.colour[:, None, None], height * np.float32(2 * unit), None, plan)
    _composite(target, colour, _soft(mask, 0.5))
