"""Colour and surface: how a look becomes the colours of a texture's levels.

A look says what a category, a part class or a background has in common; an instance jitters it.
Colours are RGB in 0..255 as float32.
"""

from dataclasses import dataclass, replace
from math import exp

import numpy as np

from unseg.data.datasets.synthetic.textures import LEVELS_PER_SIGMA


@dataclass(frozen=True)
class Look:
    """A surface: colour in HSV (each 0..1), texture and material.

    texture: number in the bank. texture_scale: tile pixels per pixel of a 160-pixel image.
    texture_angle: radians against the body. contrast: distance of the two tones. drift: change of
    hue from the dark to the light tone. relief: height of the texture in pixels per standard
    deviation. gloss: strength of highlights.
    """

    hue: float
    saturation: float
    value: float
    texture: int
    texture_scale: float = 1.0
    texture_angle: float = 0.0
    contrast: float = 0.3
    drift: float = 0.0
    relief: float = 0.2
    gloss: float = 0.1

    @property
    def rgb(self) -> np.ndarray:
        return hsv_to_rgb(self.hue, self.saturation, self.value)


_RGB_TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)
_WHITE = np.array([0.9505, 1.0, 1.089])
_CHANNEL_SHIFT = np.array([5.0, 3.0, 1.0])


def hsv_to_rgb(
    hue: float | np.ndarray, saturation: float | np.ndarray, value: float | np.ndarray
) -> np.ndarray:
    """(..., 3) float32 in 0..255; the hue wraps, saturation and value are clipped to 0..1."""
    hsv = np.empty((*np.broadcast(hue, saturation, value).shape, 3))
    hsv[..., 0], hsv[..., 1], hsv[..., 2] = hue, saturation, value
    saturation_value = np.minimum(np.maximum(hsv[..., 1:], 0), 1)
    value = saturation_value[..., 1:]
    k = (_CHANNEL_SHIFT + 6.0 * hsv[..., :1]) % 6.0
    tooth = np.minimum(np.maximum(np.minimum(k, 4.0 - k), 0), 1)
    rgb = value - value * saturation_value[..., :1] * tooth
    return (255.0 * rgb).astype(np.float32)


def rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """CIE Lab (D65) of (..., 3) sRGB colours, float64."""
    share = np.asarray(rgb, np.float64) / 255.0
    linear = np.where(share > 0.04045, ((share + 0.055) / 1.055) ** 2.4, share / 12.92)
    xyz = linear @ (_RGB_TO_XYZ.T / _WHITE)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16.0 / 116.0)
    return np.stack(
        [116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1
    )


def jittered(look: Look, rng: np.random.Generator, amount: float = 1.0) -> Look:
    """The look of one instance: a little off in colour, scale, direction and contrast."""
    hue, saturation, value, scale, angle, contrast = rng.normal(0.0, amount, 6).tolist()
    return replace(
        look,
        hue=look.hue + 0.018 * hue,
        saturation=min(max(look.saturation + 0.07 * saturation, 0.05), 0.9),
        value=min(max(look.value + 0.07 * value, 0.15), 0.95),
        texture_scale=look.texture_scale * exp(0.1 * scale),
        texture_angle=look.texture_angle + 0.12 * angle,
        contrast=look.contrast * exp(0.15 * contrast),
    )


_LEVELS = (np.arange(256, dtype=np.float64) - 128.0) / LEVELS_PER_SIGMA
_MIX = (0.5 + 0.5 * np.tanh(0.9 * _LEVELS)).astype(np.float32)
_DARK_LIGHT = np.array([-1.0, 1.0])
_SATURATION_GAIN = np.array([0.2, -0.5])


def colour_ramp(look: Look, contrast_scale: float = 1.0) -> np.ndarray:
    """The colour of each texture level, (3, 256) float32: from a dark to a light tone."""
    contrast = min(look.contrast * contrast_scale, 1.2)
    lighter = look.value + (1.0 - look.value) * 0.75 * contrast + 0.1 * contrast
    dark, light = hsv_to_rgb(
        look.hue + look.drift * _DARK_LIGHT,
        look.saturation * (1 + contrast * _SATURATION_GAIN),
        np.array([look.value * (1 - contrast), lighter]),
    )
    return dark[:, None] + (light - dark)[:, None] * _MIX


def blended(ramp: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """A ramp whose mean colour moves from `other`'s (share 0) to its own (share 1)."""
    offset = (mean_colour(other) - mean_colour(ramp)) * np.float32(1.0 - share)
    return np.minimum(np.maximum(ramp + offset[:, None], 4.0), 251.0)


def mean_colour(ramp: np.ndarray) -> np.ndarray:
    """The colour halfway between the two tones of a ramp, (3,) float32."""
    return ramp[:, 128]
