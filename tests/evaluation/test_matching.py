"""Matching and label-map scores, against permutations and loops over pixels."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from unseg.evaluation.matching import (
    confusion_of_labels,
    foreground_f_score,
    frame_miou,
    hungarian,
    pairwise_iou_of_labels,
)


def random_map(rng, labels, size=(9, 11)):
    """Labels out of `labels`, not all of them in use, and seldom contiguous."""
    choice = np.append(0, rng.choice(np.arange(1, 12), labels, replace=False))
    return rng.choice(choice, size).astype(np.int32)


def best_sum(scores):
    """By all permutations."""
    n, m = scores.shape
    if n > m:
        return best_sum(scores.T)
    return max(
        math.fsum(scores[i, j] for i, j in enumerate(columns))
        for columns in itertools.permutations(range(m), n)
    )


def iou_by_loops(pred, gt):
    """IoU in pixels, one at a time, for the labels that are in the maps."""
    rows = sorted({int(x) for x in pred.flat} - {0})
    columns = sorted({int(x) for x in gt.flat} - {0})
    result = np.zeros((len(rows), len(columns)))
    for i, a in enumerate(rows):
        for j, b in enumerate(columns):
            inter = union = 0
            for p, g in zip(pred.flat, gt.flat):
                inter += p == a and g == b
                union += p == a or g == b
            result[i, j] = inter / union
    return result


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_hungarian_by_permutations(seed, n, m, tied):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-2, 3, (n, m)) / 2 if tied else rng.normal(size=(n, m))
    pairs = hungarian(scores)
    rows, columns = zip(*pairs)
    assert len(pairs) == min(n, m) == len(set(rows)) == len(set(columns))
    assert list(rows) == sorted(rows)
    assert math.fsum(scores[pair] for pair in pairs) == pytest.approx(best_sum(scores), abs=1e-12)


def test_hungarian_is_not_greedy():
    assert hungarian([[0.9, 0.8], [0.8, 0.1]]) == [(0, 1), (1, 0)]


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_hungarian_of_nothing(shape):
    assert hungarian(np.zeros(shape)) == []


@pytest.mark.parametrize("scores", [[1, 2], [[1, float("nan")]], [[float("inf")]]])
def test_hungarian_refuses(scores):
    with pytest.raises(ValueError, match="scores must be finite and of shape"):
        hungarian(scores)


@given(st.integers(0, 10_000), st.integers(0, 5), st.integers(0, 5))
def test_iou_and_miou_by_loops(seed, k, m):
    rng = np.random.default_rng(seed)
    pred, gt = random_map(rng, k), random_map(rng, m)
    expected = iou_by_loops(pred, gt)
    iou = pairwise_iou_of_labels(pred, gt)
    assert iou.dtype == np.float64
    np.testing.assert_array_equal(iou, expected)
    miou = frame_miou(pred, gt)
    if not expected.shape[1]:
        assert math.isnan(miou)
    elif not expected.shape[0]:
        assert miou == 0
    else:
        assert miou == pytest.approx(best_sum(expected) / expected.shape[1], abs=1e-12)


@given(st.integers(0, 10_000))
def test_f_score_by_sklearn(seed):
    rng = np.random.default_rng(seed)
    pred, gt = random_map(rng, 2), random_map(rng, 3)
    expected = f1_score(gt.ravel() > 0, pred.ravel() > 0, zero_division=0)
    assert foreground_f_score(pred, gt) == pytest.approx(expected, abs=1e-12)


def test_confusion():
    pred = np.array([[0, 7, 7], [3, 3, 7]])
    gt = np.array([[1, 1, 0], [0, 4, 4]])
    expected = [[0, 1, 0], [1, 0, 1], [1, 1, 1]]  # rows: 0, 3, 7; columns: 0, 1, 4
    assert confusion_of_labels(pred, gt).tolist() == expected
    ones = np.ones((2, 2), np.int64)
    assert confusion_of_labels(ones, ones).tolist() == [[0, 0], [0, 4]]


def halves():
    gt = np.zeros((4, 8), np.int64)
    gt[1:3, :4], gt[1:3, 4:] = 1, 2
    return gt


def test_facts():
    """Of specs/deep_spectral.md, and what follows from the definitions."""
    gt = halves()
    assert frame_miou(gt, gt) == foreground_f_score(gt, gt) == 1
    assert frame_miou(np.where(gt, 3 - gt, 0), gt) == 1  # numbers do not matter
    blob = (gt > 0).astype(int)
    assert frame_miou(blob, gt) == 0.25  # IoU 1/2 with one half, nothing for the other
    assert foreground_f_score(blob, gt) == 1
    first = np.where(gt == 1, 1, 0)
    assert frame_miou(first, gt) == 0.5
    assert foreground_f_score(first, gt) == pytest.approx(2 / 3)
    many = gt.copy()
    many[0], many[3] = 5, 6  # predictions too many
    assert frame_miou(many, gt) == 1
    assert foreground_f_score(many, gt) == pytest.approx(2 / 3)
    nothing = np.zeros_like(gt)
    assert frame_miou(nothing, gt) == foreground_f_score(nothing, gt) == 0
    assert math.isnan(frame_miou(gt, nothing))
    assert math.isnan(foreground_f_score(gt, nothing))


def test_bad_maps():
    gt = halves()
    for function in (frame_miou, foreground_f_score, confusion_of_labels):
        with pytest.raises(ValueError, match=r"pred \(4, 7\) and gt \(4, 8\)"):
            function(gt[:, 1:], gt)
    with pytest.raises(ValueError, match="gt must hold integers of 0 or more, got float64"):
        pairwise_iou_of_labels(gt, gt * 1.0)
    with pytest.raises(ValueError, match="pred must hold integers of 0 or more"):
        pairwise_iou_of_labels(-gt, gt)
