"""Light and lens: how a relief is lit, how light varies over the picture, what the camera adds."""

import cv2
import numpy as np

from unseg.data.datasets.synthetic.plan import ScenePlan
from unseg.data.datasets.synthetic.textures import noise_tile, sample_texture

AMBIENT = 0.42  # share of the light that has no direction
GLOSS_EXPONENT = 20
HIGHLIGHT = 190.0  # grey levels that a perfect gloss adds
DAPPLE_TEXTURE = 4
SHOULDER = 200.0  # grey level above which film saturates


def illuminated(
    albedo: np.ndarray, height: np.ndarray, gloss: np.ndarray | np.float32 | None, plan: ScenePlan
) -> np.ndarray:
    """The colour (3, h, w) of a surface under the scene's lamp and sky.

    albedo: (3, h, w) or (3, 1, 1) in 0..255. height: its relief in pixels, (h, w) float32.
    gloss: strength of highlights, (h, w), one number, or None for a matt surface.
    """
    light = plan.light
    diffuse, slope = _diffuse(height, light.direction, plan.settings.shading)
    lamp = (np.float32(1 - AMBIENT) * light.lamp)[:, None, None]
    sky = (np.float32(AMBIENT) * light.ambient)[:, None, None]
    colour = diffuse * lamp
    colour += sky
    colour *= albedo
    if gloss is None:
        return colour
    return colour + _highlight(slope, light.direction[2]) * gloss


def _diffuse(
    height: np.ndarray, direction: tuple[float, float, float], shading: float
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Lambert's law, 1 on flat ground, (h, w); and the slope towards the lamp, normal's length."""
    x, y, z = (np.float32(v) for v in direction)
    scale = 0.125 * shading
    dx = cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3, scale=scale)
    dy = cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3, scale=scale)
    length = np.sqrt(dx * dx + dy * dy + np.float32(1))
    slope = dx * x + dy * y
    return np.maximum((z - slope) / (length * z), 0), (slope, length)


def _highlight(slope: tuple[np.ndarray, np.ndarray], z: float) -> np.ndarray:
    """Blinn's highlight beyond what flat ground shows, in grey levels, (h, w)."""
    towards, length = slope
    facing = (np.float32(1 + z) - towards) / (length * np.float32(np.sqrt(2 + 2 * z)))
    flat = np.float32(((1 + z) / 2) ** (0.5 * GLOSS_EXPONENT))
    shine = cv2.pow(np.maximum(facing, 0), GLOSS_EXPONENT)
    return np.maximum(shine - flat, 0) * np.float32(HIGHLIGHT)


def illumination(plan: ScenePlan) -> np.ndarray:
    """Brightness over the image, (H, W) float32 around 1: gradient, vignette, dapples."""
    light, (height, width) = plan.light, plan.settings.size
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    corner = np.float32(0.5 * light.vignette)
    gain = np.float32(light.gradient[0]) * x - corner * x * x
    gain = gain + (1 + np.float32(light.gradient[1]) * y - corner * y * y)
    if light.dapple > 0:
        scale = 0.35 / plan.settings.unit
        offset = np.array(light.dapple_offset) - scale * np.array(plan.camera)
        to_tile = np.array([[scale, 0, offset[0]], [0, scale, offset[1]]])
        cloud = sample_texture(DAPPLE_TEXTURE, to_tile, height, width).astype(np.float32)
        shade = np.clip((cloud - 128) * np.float32(1 / 25), -1, 1)
        gain *= 1 + np.float32(0.5 * light.dapple) * (shade - np.float32(0.4))
    return np.maximum(gain, 0.15) * np.float32(light.exposure)


def photograph(canvas: np.ndarray, plan: ScenePlan) -> np.ndarray:
    """The lens's blur, the sensor's noise and the film's shoulder: (H, W, 3) uint8.

    canvas: (3, H, W) float32, overwritten.
    """
    settings = plan.settings
    for channel in canvas:
        cv2.GaussianBlur(channel, (0, 0), 0.45 * settings.unit, dst=channel)
    if settings.noise > 0:
        canvas += _noise(plan) * np.float32(settings.noise)
    over = np.maximum(canvas - np.float32(SHOULDER), 0)
    canvas -= over
    canvas += over / (1 + over * np.float32(1 / 80))
    np.clip(canvas, 0, 255, out=canvas)
    return cv2.merge(list(np.rint(canvas).astype(np.uint8)))


def _noise(plan: ScenePlan) -> np.ndarray:
    """White noise of standard deviation 1, (3, H, W): the tile from an offset, repeated."""
    height, width = plan.settings.size
    top, left = plan.noise_offset
    tile = noise_tile()
    rows, columns = -(-(top + height) // tile.shape[1]), -(-(left + width) // tile.shape[2])
    if rows * columns > 1:
        tile = np.tile(tile, (1, rows, columns))
    return tile[:, top : top + height, left : left + width]
