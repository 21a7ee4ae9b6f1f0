"""What the tests of unseg.discovery.spectral share."""

import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from unseg.discovery.spectral import Segments
from unseg.discovery.spectral.settings import (
    ClusterSettings,
    ForegroundSettings,
    NCRSettings,
    SpectralSettings,
)

_FOLDER = str(Path(__file__).resolve().parents[2] / "dev/benchmarks")
sys.path.insert(0, _FOLDER)
try:
    import spectral_published as published
finally:
    sys.path.remove(_FOLDER)

__all__ = [
    "ORACLE",
    "check",
    "mean_iou",
    "published",
    "reference_settings",
    "same_partition",
    "structured",
    "with_features",
]

ORACLE = ClusterSettings(mode="oracle")


def reference_settings(background: str = "reference", **others) -> SpectralSettings:
    """The steps that the transcription in dev/benchmarks/spectral_published.py takes."""
    settings = {
        "ncr": NCRSettings(mode_foreground="reference_fg"),
        "foreground": ForegroundSettings(area="polygon"),
        "clusters": ORACLE,
        "background": background,
        "solver": "dense",
        "split_components": False,
        "min_area": 0.0,
    }
    return SpectralSettings(**(settings | others))


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two label maps are equal up to the names of labels other than 0."""
    pairs = set(zip(np.ravel(a).tolist(), np.ravel(b).tolist(), strict=True))
    names = [{x for x, _ in pairs}, {y for _, y in pairs}]
    return len(pairs) == len(names[0]) == len(names[1]) and all(
        (x == 0) == (y == 0) for x, y in pairs
    )


def mean_iou(labels: np.ndarray, truth: np.ndarray) -> float:
    """Sum of the IoUs of the best one-to-one matching, per instance of the truth."""
    iou = np.array(
        [
            [
                np.sum((labels == a) & (truth == b)) / np.sum((labels == a) | (truth == b))
                for a in range(1, labels.max() + 1)
            ]
            for b in range(1, truth.max() + 1)
        ]
    )
    return iou[linear_sum_assignment(iou, maximize=True)].sum() / truth.max() if iou.size else 0.0


def with_features(instances: np.ndarray, channels: int = 24, seed: int = 0) -> np.ndarray:
    """Clean features (C, h, w) of an instance map: a level per instance, little noise."""
    rng = np.random.default_rng(seed)
    levels = rng.normal(size=(channels, instances.max() + 1))
    levels[:, 1:] += 2 * rng.normal(size=(channels, 1))  # what instances have in common
    levels += rng.normal(size=(channels, 1))
    noise = 0.1 * rng.normal(size=(channels, *instances.shape))
    return (levels[:, instances] + noise).astype(np.float32)


@cache
def structured(
    height: int, width: int, objects: int, seed: int, channels: int = 384
) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """A structured map, as an array and as a tensor, and its instances."""
    features, instances = published.structured_map(height, width, objects, channels, seed)
    return features, torch.from_numpy(features), instances


def check(segments: Segments, grid: tuple[int, int]) -> Segments:
    """What holds for all results."""
    labels, scores = segments.labels, segments.scores
    assert labels.shape == grid
    assert labels.dtype == torch.int64
    assert sorted(set(labels.unique().tolist()) - {0}) == list(range(1, len(scores) + 1))
    assert torch.equal(scores, scores.sort(descending=True).values)
    assert bool(((scores > 0) & (scores <= 1)).all())
    assert len(segments.embeddings) == len(scores)
    assert bool(segments.reason) == (len(scores) == 0)
    return segments
