"""Free Mask against a slow transcription of the method in numpy, one query at a time."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from unseg.config import get_cfg
from unseg.discovery import FreeMask, FreeMaskSettings, build_discoverer, free_masks
from unseg.discovery.free_mask import make_queries


def bilinear(plane, height, width, scale_y, scale_x):
    """Half-pixel bilinear sampling of a plane at a given scale, borders repeated."""
    h, w = plane.shape
    out = np.empty((height, width))
    for i in range(height):
        for j in range(width):
            y = max((i + 0.5) / scale_y - 0.5, 0)
            x = max((j + 0.5) / scale_x - 0.5, 0)
            y0, x0 = min(int(y), h - 1), min(int(x), w - 1)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            dy, dx = y - y0, x - x0
            top = plane[y0, x0] * (1 - dx) + plane[y0, x1] * dx
            bottom = plane[y1, x0] * (1 - dx) + plane[y1, x1] * dx
            out[i, j] = top * (1 - dy) + bottom * dy
    return out


def reference_queries(features, scales):
    channels, h, w = features.shape
    rows = []
    for scale in scales:
        hh, ww = math.floor(h * scale), math.floor(w * scale)
        planes = np.stack([bilinear(f, hh, ww, scale, scale) for f in features])
        rows += [planes[:, i, j] for i in range(hh) for j in range(ww)]
    rows = np.array(rows)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def reference_nms(masks, scores, sigma):
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    masks, scores = [masks[i] for i in order], [scores[i] for i in order]

    def iou(a, b):
        return (a & b).sum() / (a | b).sum()

    n = len(masks)
    comp = [max([iou(masks[k], masks[i]) for k in range(i)], default=0.0) for i in range(n)]
    decayed = []
    for j in range(n):
        factors = [
            math.exp(-sigma * iou(masks[i], masks[j]) ** 2) / math.exp(-sigma * comp[i] ** 2)
            for i in range(j)
        ]
        decayed.append(scores[j] * min([*factors, 1.0]))
    return order, decayed


def reference_free_masks(features, image_size, s):
    """The method as its specification reads, one candidate at a time."""
    channels, h, w = features.shape
    keys = features / np.linalg.norm(features, axis=0)
    candidates = []
    for query in reference_queries(features, s.scales):
        soft = np.tensordot(query, keys, 1)
        soft = soft - soft.min()
        soft = soft / soft.max()
        mask = soft >= s.mask_threshold
        if mask.sum() > 1:
            candidates.append((query, soft, mask, soft[mask].mean()))
    order, decayed = reference_nms(
        [c[2] for c in candidates], [c[3] for c in candidates], s.nms_sigma
    )
    best = sorted(range(len(order)), key=lambda i: -decayed[i])[: s.max_masks]
    height, width = image_size
    results = []
    for i in best:
        query, soft, _, _ = candidates[order[i]]
        mask = bilinear(soft, height, width, height / h, width / w) >= s.mask_threshold
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if (
            decayed[i] >= s.score_threshold
            and len(ys)
            and ys.mean() > s.min_center_y * height
            and len(xs) < s.max_width * width
            and s.min_area <= mask.mean() <= s.max_area
        ):
            step = len(query) // s.embedding_dim
            e = [query[step * k + (step - 1) // 2 : step * k + step // 2 + 1].mean()
                 for k in range(s.embedding_dim)]  # fmt: skip
            results.append((mask, decayed[i], np.array(e)))
    return results


def clustered_features(rng, channels, h, w):
    """Blocks of similar vectors: thresholds then are not decided by rounding."""
    field = np.zeros((h, w), dtype=int)
    for label in range(1, 5):
        y, x = rng.integers(0, h - 3), rng.integers(0, w - 3)
        field[y : y + rng.integers(2, 5), x : x + rng.integers(2, 5)] = label
    prototypes = rng.normal(size=(5, channels))
    return (prototypes[field] + 0.1 * rng.normal(size=(h, w, channels))).transpose(2, 0, 1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "settings",
    [
        FreeMaskSettings(embedding_dim=4, score_threshold=0.3),
        FreeMaskSettings(
            embedding_dim=8, score_threshold=0.1, min_center_y=0.3, max_width=0.9, max_masks=7
        ),
        FreeMaskSettings(
            embedding_dim=2, score_threshold=0.0, min_center_y=0.0, min_area=0.05, max_area=0.3
        ),
    ],
    ids=["paper-like", "filters", "areas"],
)
def test_equals_the_slow_transcription(seed, settings):
    rng = np.random.default_rng(seed)
    features = clustered_features(rng, 16, 9, 11)
    image_size = (50, 63)
    expected = reference_free_masks(features, image_size, settings)
    found = free_masks(torch.from_numpy(features), image_size, settings)
    assert len(found) == len(expected) > 0
    for mask, (pixels, score, embedding) in zip(found, expected, strict=True):
        # float32 against float64 may move a pixel whose value is 0.5 up to rounding
        assert (mask.decode() != pixels).sum() <= 2
        assert mask.score == pytest.approx(score, abs=1e-5)
        np.testing.assert_allclose(mask.embedding, embedding, atol=1e-5)


def test_query_counts_and_order_of_the_paper():
    features = torch.randn(3, 25, 42)
    assert len(make_queries(features, (1.0, 0.5, 0.25))) == 1050 + 252 + 60
    queries = make_queries(features, (1.0,))
    flat = torch.nn.functional.normalize(features.flatten(1).t(), dim=1)
    torch.testing.assert_close(queries, flat)


def test_embedding_of_2048_channels_is_the_mean_of_the_two_middle_ones_of_16():
    torch.manual_seed(0)
    features = torch.randn(2048, 6, 8)
    features[:, 1:4, 2:6] = torch.randn(2048, 1, 1) + 0.01 * torch.randn(2048, 3, 4)
    found = free_masks(features, (48, 64), FreeMaskSettings(score_threshold=0.1))
    assert found
    queries = make_queries(features, (1.0, 0.5, 0.25))
    middle = queries.view(-1, 128, 16)[:, :, 7:9].mean(2)
    for mask in found:
        distance = (middle - torch.from_numpy(mask.embedding)).abs().amax(1).min()
        assert distance < 1e-6


def test_counts_of_dropped_candidates_add_up():
    rng = np.random.default_rng(1)
    features = torch.from_numpy(clustered_features(rng, 16, 9, 11))
    dropped = Counter()
    settings = FreeMaskSettings(score_threshold=0.2, min_center_y=0.4, max_width=0.5)
    found = free_masks(features, (40, 50), settings, dropped=dropped)
    queries = len(make_queries(features, settings.scales))
    assert len(found) + sum(dropped.values()) == queries


@pytest.mark.parametrize("shape", [(8, 1, 1), (8, 1, 5), (8, 3, 2)])
def test_tiny_and_constant_grids(shape):
    settings = FreeMaskSettings(score_threshold=0.0)
    assert free_masks(torch.ones(shape), (4, 4), settings) == []
    for mask in free_masks(torch.randn(shape), (4, 4), settings):
        assert mask.decode().shape == (4, 4)


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match=r"\(C, h, w\)"):
        free_masks(torch.zeros(2, 3), (4, 4), FreeMaskSettings())
    with pytest.raises(ValueError, match="NaN"):
        free_masks(torch.full((2, 3, 3), float("nan")), (4, 4), FreeMaskSettings())


def test_settings_from_config_are_the_papers_by_default():
    cfg = get_cfg()
    assert FreeMaskSettings.from_config(cfg) == FreeMaskSettings()
    cfg.DISCOVERY.FREE_MASK.NMS_SIGMA = 3.0
    discoverer = build_discoverer(cfg)
    assert isinstance(discoverer, FreeMask)
    assert discoverer.settings == FreeMaskSettings(nms_sigma=3.0)


def test_unknown_discoverer_names_the_known_ones():
    cfg = get_cfg()
    cfg.DISCOVERY.NAME = "Nothing"
    with pytest.raises(KeyError, match="FreeMask"):
        build_discoverer(cfg)
