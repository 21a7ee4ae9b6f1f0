"""From segments on the patch grid to masks of the image, and the discoverer."""

import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from spectral_cases import ORACLE, with_features

from unseg.config import load_config
from unseg.discovery import build_discoverer, spectral_masks
from unseg.discovery.spectral import (
    Spectral,
    SpectralSettings,
    labels_to_masks,
    segment,
    segments_to_masks,
)


def interpolated(indicator, size):
    """Bilinear, pixel centres aligned, edges repeated; by definition, in float64."""
    (h, w), (H, W) = indicator.shape, size
    out = np.zeros(size)
    for i in range(H):
        for j in range(W):
            y = max((i + 0.5) * h / H - 0.5, 0)
            x = max((j + 0.5) * w / W - 0.5, 0)
            top, left = min(int(y), h - 1), min(int(x), w - 1)
            below, right = min(top + 1, h - 1), min(left + 1, w - 1)
            dy, dx = y - top, x - left
            out[i, j] = (1 - dy) * (
                (1 - dx) * indicator[top, left] + dx * indicator[top, right]
            ) + dy * ((1 - dx) * indicator[below, left] + dx * indicator[below, right])
    return out


@pytest.mark.parametrize(
    ("grid", "size"),
    [((1, 1), (3, 5)), ((4, 5), (4, 5)), ((4, 5), (33, 40)), ((7, 3), (20, 21)), ((6, 1), (11, 2))],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 4])
def test_bilinear_masks(grid, size, count):
    rng = np.random.default_rng(count)
    labels = rng.integers(0, count + 1, grid)
    labels.flat[0] = count
    masks = labels_to_masks(torch.from_numpy(labels), size, mode="bilinear")
    assert masks.shape == (count, *size)
    assert masks.dtype == torch.bool
    assert masks.sum(dim=0).max() <= 1
    values = np.stack([interpolated(labels == k, size) for k in range(count + 1)])
    ordered = np.sort(values, axis=0)
    clear = ordered[-1] - ordered[-2] > 1e-5  # where two are equal either may win
    assert clear.mean() > 0.5
    winner = values.argmax(axis=0)
    for k in range(1, count + 1):
        np.testing.assert_array_equal(masks[k - 1].numpy()[clear], (winner == k)[clear])


@pytest.mark.parametrize("size", [(8, 10), (33, 47), (3, 2)], ids=str)
def test_nearest_masks(size):
    labels = np.random.default_rng(0).integers(0, 4, (4, 5))
    masks = labels_to_masks(torch.from_numpy(labels), size, mode="nearest").numpy()
    for i in range(size[0]):
        for j in range(size[1]):
            # The patch that holds the pixel's centre.
            label = labels[int((i + 0.5) * 4 / size[0]), int((j + 0.5) * 5 / size[1])]
            assert masks[:, i, j].tolist() == [k == label for k in range(1, labels.max() + 1)]


def test_no_labels():
    for mode in ("nearest", "bilinear"):
        masks = labels_to_masks(torch.zeros(4, 5, dtype=torch.int64), (8, 10), mode=mode)
        assert masks.shape == (0, 8, 10)


# --- the discoverer


def toy(channels=96):
    instances = np.zeros((20, 30), dtype=np.int64)
    instances[5:14, 4:11] = 1
    instances[6:15, 17:25] = 2
    return torch.from_numpy(with_features(instances, channels)), instances


def iou(a, b):
    return np.sum(a & b) / np.sum(a | b)


@pytest.mark.parametrize("upsample", ["bilinear", "nearest"])
def test_masks_of_the_image(upsample):
    features, instances = toy()
    found = spectral_masks(features, (80, 120), SpectralSettings(upsample=upsample))
    assert len(found) == 2
    assert found[0].score >= found[1].score > 0
    masks = np.stack([m.decode() for m in found])
    assert masks.shape == (2, 80, 120)
    assert not masks.all(axis=0).any()
    large = instances.repeat(4, axis=0).repeat(4, axis=1)
    for k in (1, 2):
        assert max(iou(m, large == k) for m in masks) > 0.75  # medians cut the corners


def test_upsampling_matters():
    features, _ = toy()
    a, b = (
        spectral_masks(features, (80, 120), SpectralSettings(upsample=u))
        for u in ("bilinear", "nearest")
    )
    assert not np.array_equal(a[0].decode(), b[0].decode())


@pytest.mark.parametrize("dim", [7, 96, 200])
def test_embeddings_are_resized_along_channels(dim):
    features, _ = toy()
    settings = SpectralSettings(embedding_dim=dim)
    segments = segment(features, settings)
    found = segments_to_masks(segments, (20, 30), settings)
    for mask, row in zip(found, segments.embeddings.double().numpy(), strict=True):
        expected = interpolated(row[None], (1, dim))[0]
        np.testing.assert_allclose(mask.embedding, expected, atol=1e-5)


def test_why_there_are_none(caplog):
    dropped = Counter()
    with caplog.at_level(logging.INFO, logger="unseg"):
        found = spectral_masks(torch.ones(6, 8, 8), (32, 32), SpectralSettings(), dropped=dropped)
    assert found == []
    assert dropped == {"images: all patches look alike": 1}
    assert "no instances: all patches look alike" in caplog.text
    # Nor is there an error without a counter.
    assert spectral_masks(torch.ones(6, 8, 8), (32, 32), SpectralSettings()) == []


def test_discoverer():
    cfg = load_config(opts=["DISCOVERY.NAME", "Spectral", "MODEL.DEEP_SPECTRAL.AFFINITY", "l2"])
    discoverer = build_discoverer(cfg)
    assert isinstance(discoverer, Spectral)
    assert discoverer.settings == replace(SpectralSettings(), affinity="l2")
    features, _ = toy()
    dropped = Counter()
    found = discoverer(features, (40, 60), dropped=dropped)
    expected = spectral_masks(features, (40, 60), discoverer.settings)
    assert [m.rle for m in found] == [m.rle for m in expected]
    assert not dropped
    settings = SpectralSettings(clusters=ORACLE, split_components=False)
    assert len(spectral_masks(features, (40, 60), settings, 3)) == 3
    oracle = Spectral(settings)
    with pytest.raises(ValueError, match="oracle"):
        oracle(features, (40, 60), dropped=dropped)
