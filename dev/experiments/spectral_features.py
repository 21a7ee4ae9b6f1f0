"""Scenes on a patch grid, and features for them that are made from the ground truth.

The paper of NCR and DCR begins with an observation: of the channels of self-supervised features
some are noise, of high entropy, and some hardly vary, while those that tell instances apart have a
high deviation. Here channels are made to be of these three kinds, in known proportions, so that one
can see what a method gets out of them. The picture of a scene is not used.

Legend: h w patches, n = h * w, C channels, S of them signal, r rank, M objects (0: background).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import unseg  # noqa: F401 (before detectron2, whose import warns)

# isort: split
import numpy as np

from unseg.data.datasets.synthetic.scene import render_scene
from unseg.data.datasets.synthetic.settings import SceneSettings
from unseg.structures import sample_on_grid

PATCH = 4  # pixels of a scene that make a patch: its coverage is known in sixteenths
KINDS = ("signal", "flat", "noisy")
OBJECTS = (2, 5)  # least and most per scene, on the patch grid


@dataclass(frozen=True)
class FeatureRecipe:
    """What :func:`make_features` mixes; deviations are standard deviations.

    The defaults were chosen on scenes of seed 101 so that k-means with everything known (see
    spectral_ablation.py) is right in most patches and not in all, and so that noisy channels vary
    as much as signal channels do.

    Attributes:
        channels: C.
        signal, flat: shares of the channels; the rest is noisy.
        rank: dimension of the subspace of the signal channels that all vectors lie in.
        foreground: half the distance between the background and the mean object, per channel.
        instance: deviation of the objects around their mean, per channel.
        noise: deviation of a patch's own noise in the signal channels.
        flat_level: deviation of the constants that flat channels stand at.
        flat_noise: deviation of what little they vary by, in rare peaks.
        flat_signal: share of the signal that they carry.
        noisy: deviation of the noisy channels.
    """

    channels: int = 384
    signal: float = 0.2
    flat: float = 0.2
    rank: int = 8
    foreground: float = 0.6
    instance: float = 0.7
    noise: float = 0.8
    flat_level: float = 0.5
    flat_noise: float = 0.15
    flat_signal: float = 0.05
    noisy: float = 1.0

    def counts(self) -> tuple[int, int, int]:
        """Signal, flat and noisy channels."""
        signal, flat = (round(share * self.channels) for share in (self.signal, self.flat))
        return signal, flat, self.channels - signal - flat


def make_features(
    coverage: np.ndarray, recipe: FeatureRecipe, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Features of patches that are known to show so much of each object.

    * signal: background and objects have vectors in a random subspace; a patch has the mean of
      those it shows, by area, and normal noise of its own. Few values, so of low entropy.
    * flat: a constant, a trace of the signal, and noise in rare peaks (Laplace, cubed): of low
      entropy and low deviation.
    * noisy: uniform noise: of the highest entropy.

    Args:
        coverage: (M + 1, h, w) shares of each patch, the background's first; they sum to 1.
        recipe: the proportions.
        rng: makes everything.

    Returns:
        features (C, h, w) float32, in a random order of channels, and each channel's kind (C,),
        an index into KINDS.
    """
    objects, *grid = coverage.shape
    signal, flat, noisy = recipe.counts()
    shares = coverage.reshape(objects, -1)  # (M + 1, n)
    count = shares.shape[1]

    def mixed(channels: int) -> np.ndarray:
        # Unit deviation per channel for unit normal coordinates.
        basis = rng.standard_normal((channels, recipe.rank)) / np.sqrt(recipe.rank)
        return basis @ coordinates.T @ shares

    direction = rng.standard_normal(recipe.rank)
    direction *= np.sqrt(recipe.rank) / np.linalg.norm(direction)
    coordinates = recipe.instance * rng.standard_normal((objects, recipe.rank))
    coordinates += recipe.foreground * direction
    coordinates[0] = -recipe.foreground * direction
    peaks = rng.laplace(size=(flat, count)) ** 3 / np.sqrt(720)  # the sixth moment is 6!
    levels = recipe.flat_level * rng.standard_normal((flat, 1))
    parts = (
        mixed(signal) + recipe.noise * rng.standard_normal((signal, count)),
        levels + recipe.flat_signal * mixed(flat) + recipe.flat_noise * peaks,
        recipe.noisy * rng.uniform(-np.sqrt(3), np.sqrt(3), size=(noisy, count)),
    )
    kinds = np.repeat(np.arange(3), (signal, flat, noisy))
    order = rng.permutation(recipe.channels)
    features = np.concatenate(parts)[order].reshape(recipe.channels, *grid)
    return features.astype(np.float32), kinds[order]


@dataclass(frozen=True)
class PatchScene:
    """One scene.

    Attributes:
        labels: (h, w) int32, the majority of each patch: 0 for background, others for objects.
        features: (C, h, w) float32.
        kinds: (C,) index into KINDS.
    """

    labels: np.ndarray
    features: np.ndarray
    kinds: np.ndarray

    @property
    def num_objects(self) -> int:
        """On the grid."""
        return len(np.unique(self.labels[self.labels > 0]))


def scene_settings(grid: tuple[int, int]) -> SceneSettings:
    """Scenes of a few objects, a third of which have a touching neighbour."""
    height, width = grid
    return SceneSettings(
        size=(PATCH * height, PATCH * width),
        mean_objects=3.0,
        max_objects=OBJECTS[1],
        area=(0.015, 0.12),
        pairs=0.35,
        min_visible=0.5,
    )


def patch_scenes(
    grid: tuple[int, int], seed: int, count: int, recipe: FeatureRecipe
) -> Iterator[PatchScene]:
    """The first `count` scenes of a seed that have 2 to 5 objects on the grid."""
    index = 0
    while count:
        masks = render_scene(scene_settings(grid), seed, index, with_image=False).masks
        index += 1
        index_map = (masks * np.arange(1, len(masks) + 1)[:, None, None]).sum(axis=0)
        labels = sample_on_grid(index_map, grid, mode="majority")
        if OBJECTS[0] <= len(np.unique(labels[labels > 0])) <= OBJECTS[1]:
            count -= 1
            rng = np.random.default_rng((seed, index))
            features, kinds = make_features(patch_coverage(masks, grid), recipe, rng)
            yield PatchScene(labels, features, kinds)


def patch_coverage(masks: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Share of each patch that shows each object.

    Args:
        masks: (M, h * PATCH, w * PATCH) bool, disjoint.
        grid: (h, w).

    Returns:
        (M + 1, h, w), the background's first.
    """
    height, width = grid
    tiles = masks.reshape(len(masks), height, PATCH, width, PATCH)
    covered = tiles.mean(axis=(2, 4))
    return np.concatenate((1 - covered.sum(axis=0, keepdims=True), covered))
