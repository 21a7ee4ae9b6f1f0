"""A bank of periodic textures made from filtered noise, and the way to lay one on a surface.

A texture is a (256, 256) uint8 tile whose spectrum decides its look: clouds, blobs, stripes, grain,
spots, veins, weaves. 128 is its mean and 50 levels are one standard deviation. Integers make what
is sampled from a tile independent of rounding in floating point.
"""

from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np

TILE = 256
LEVELS_PER_SIGMA = 50.0
BANK_SEED = 20_260

Field = np.ndarray  # (TILE, TILE) float64, periodic


def _frequencies() -> tuple[np.ndarray, np.ndarray]:
    """Vertical and horizontal frequencies in cycles per pixel, shaped for `np.fft.rfft2`."""
    return np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)[None, :]


def _standardised(field: Field) -> Field:
    field = field - field.mean()
    return field / field.std()


def _filtered_noise(rng: np.random.Generator, gain: np.ndarray) -> Field:
    spectrum = np.fft.rfft2(rng.standard_normal((TILE, TILE))) * gain
    spectrum[0, 0] = 0
    return _standardised(np.fft.irfft2(spectrum, s=(TILE, TILE)))


def _cloud(rng: np.random.Generator, slope: float) -> Field:
    """Power-law noise: the steeper the slope, the softer the clouds."""
    fy, fx = _frequencies()
    radius = np.hypot(fy, fx)
    return _filtered_noise(rng, (radius + 2.0 / TILE) ** -slope)


def _band(rng: np.random.Generator, wavelength: float, octaves: float = 0.3) -> Field:
    """Noise around one wavelength (pixels) in all directions: blobs."""
    fy, fx = _frequencies()
    radius = np.maximum(np.hypot(fy, fx), 1e-6)
    return _filtered_noise(rng, np.exp(-0.5 * (np.log2(radius * wavelength) / octaves) ** 2))


def _oriented(rng: np.random.Generator, wavelength: float, spread: float = 0.16) -> Field:
    """Noise around one wavelength and one direction: wavy stripes along x."""
    fy, fx = _frequencies()
    radius = np.maximum(np.hypot(fy, fx), 1e-6)
    angle = np.arctan2(fx, np.abs(fy))
    gain = np.exp(-0.5 * (np.log2(radius * wavelength) / 0.25) ** 2 - 0.5 * (angle / spread) ** 2)
    return _filtered_noise(rng, gain)


def _warped(wave: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator, cycles: int):
    """A wave of `cycles` periods over the tile whose phase wanders with smooth noise."""
    y = np.arange(TILE)[:, None] / TILE
    phase = 2 * np.pi * cycles * y + 1.3 * _cloud(rng, 2.2)
    return _standardised(wave(phase))


def _grain(rng: np.random.Generator, cycles: int) -> Field:
    """Wood: sharp-edged wandering lines over a fine oriented grain."""
    lines = _warped(lambda phase: np.abs(np.sin(phase / 2)) ** 0.6, rng, cycles)
    return _standardised(lines + 0.5 * _oriented(rng, 6.0, 0.1))


def _stripes(rng: np.random.Generator, cycles: int) -> Field:
    """Two flat tones in wandering bands."""
    return _warped(lambda phase: np.tanh(3.0 * np.sin(phase)), rng, cycles)


def _spots(rng: np.random.Generator, wavelength: float, threshold: float) -> Field:
    """Islands of one tone in another."""
    return _standardised(np.tanh(4.0 * (_band(rng, wavelength, 0.2) - threshold)))


def _veins(rng: np.random.Generator, wavelength: float, width: float) -> Field:
    """Thin lines where band noise crosses zero, on a soft cloud: marble, cracks."""
    lines = np.exp(-((_band(rng, wavelength) / width) ** 2))
    return _standardised(_standardised(lines) + 0.4 * _cloud(rng, 1.6))


def _weave(rng: np.random.Generator, cycles: int, sharpness: float) -> Field:
    """A warped chequer: cloth, scales, bricks."""
    x, y = np.arange(TILE)[None, :] / TILE, np.arange(TILE)[:, None] / TILE
    bend_x, bend_y = 0.35 * _cloud(rng, 2.2), 0.35 * _cloud(rng, 2.2)
    cloth = np.sin(2 * np.pi * cycles * x + bend_x) * np.sin(2 * np.pi * cycles * y + bend_y)
    return _standardised(np.tanh(sharpness * cloth) + 0.15 * _band(rng, 5.0))


# name, maker, arguments; the names become part of the categories' names.
RECIPES: tuple[tuple[str, Callable[..., Field], tuple[float, ...]], ...] = (
    ("dappled", _band, (22.0,)),
    ("striped", _stripes, (13,)),
    ("marbled", _veins, (34.0, 0.28)),
    ("spotted", _spots, (20.0, 0.7)),
    ("cloudy", _cloud, (1.9,)),
    ("woven", _weave, (14, 1.6)),
    ("grained", _grain, (9,)),
    ("rough", _cloud, (1.2,)),
    ("banded", _stripes, (8,)),
    ("pebbled", _band, (10.0,)),
    ("cracked", _veins, (22.0, 0.16)),
    ("rippled", _oriented, (12.0,)),
    ("blotched", _spots, (34.0, 0.2)),
    ("scaly", _weave, (20, 0.9)),
    ("wooden", _grain, (15,)),
    ("misty", _cloud, (2.4,)),
    ("speckled", _spots, (11.0, 1.0)),
    ("ribbed", _stripes, (19,)),
    ("netted", _veins, (15.0, 0.3)),
    ("brushed", _oriented, (7.0, 0.12)),
    ("mottled", _band, (34.0,)),
    ("checked", _weave, (10, 3.0)),
    ("wavy", _oriented, (24.0,)),
    ("grainy", _cloud, (0.8,)),
)
TEXTURE_NAMES = tuple(name for name, _, _ in RECIPES)
NUM_TEXTURES = len(RECIPES)


@lru_cache(maxsize=1)
def texture_bank() -> np.ndarray:
    """All textures, (NUM_TEXTURES, 2 TILE, 2 TILE) uint8, read-only; the same in every process.

    Each tile is repeated twice along both sides, so that a window rarely crosses the array's edge,
    where sampling is slow.
    """
    tiles = []
    for number, (_, make, arguments) in enumerate(RECIPES):
        field = make(np.random.default_rng((BANK_SEED, number)), *arguments)
        tiles.append(128.0 + LEVELS_PER_SIGMA * np.clip(field, -2.5, 2.5))
    bank = np.tile(np.rint(np.stack(tiles)).astype(np.uint8), (1, 2, 2))
    bank.flags.writeable = False
    return bank


@lru_cache(maxsize=1)
def noise_tile() -> np.ndarray:
    """White normal noise of standard deviation 1, (3, 512, 512) float32, read-only."""
    tile = np.random.default_rng((BANK_SEED, NUM_TEXTURES)).standard_normal((3, 512, 512))
    tile = tile.astype(np.float32)
    tile.flags.writeable = False
    return tile


def sample_texture(texture: int, to_tile: np.ndarray, height: int, width: int) -> np.ndarray:
    """Lay a texture on a window.

    texture: number in the bank. to_tile: (2, 3) affine or (3, 3) projective matrix that takes
    window pixels (x, y, 1) to tile pixels. Returns (height, width) uint8.
    """
    warp = cv2.warpPerspective
    if len(to_tile) == 2:
        warp = cv2.warpAffine
        corner = to_tile[:, 2] + np.minimum(to_tile[:, :2] * (width, height), 0).sum(axis=1)
        to_tile = to_tile.copy()
        to_tile[:, 2] -= TILE * np.floor(corner / TILE)
    return warp(
        texture_bank()[texture],
        to_tile,
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_WRAP,
    )
