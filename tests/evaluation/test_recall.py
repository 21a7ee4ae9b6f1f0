"""Matching and recall against plain loops, exact fractions and values worked out by hand."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_util

from unseg.evaluation.recall import (
    AUC_COUNTS,
    IOU_THRESHOLDS,
    NEVER,
    area_under_curve,
    average_recall,
    check_caps,
    counted_by_size,
    exact_box_iou,
    exact_mask_iou,
    match_ranks,
)
from unseg.layers import pack_masks


def loops(iou, ignored, crowd, limit):
    """COCO's rule for one threshold, with ignored objects and crowds taking part.

    Ignored objects come last; a crowd may be taken again and again.
    """
    order = [g for g in range(iou.shape[1]) if not ignored[g]]
    order += [g for g in range(iou.shape[1]) if ignored[g]]
    ranks = [NEVER] * iou.shape[1]
    taken = set()
    for rank in range(len(iou)):
        for part in (False, True):
            free = [
                g
                for g in order
                if ignored[g] == part and (g not in taken or crowd[g]) and iou[rank, g] >= limit
            ]
            if free:
                best = max(iou[rank, g] for g in free)
                chosen = [g for g in free if iou[rank, g] == best][-1]
                taken.add(chosen)
                if not part:
                    ranks[chosen] = rank
                break
    return ranks


@settings(max_examples=80)
@given(st.integers(0, 2**32 - 1))
def test_ranks_against_loops(seed):
    """Few distinct values, so that ties and values on the thresholds are common."""
    rng = np.random.default_rng(seed)
    proposals, objects = int(rng.integers(0, 30)), int(rng.integers(0, 7))
    iou = rng.choice([0.0, 0.3, 0.5, 0.6, 0.65, 0.7, 0.9, 0.95, 1.0], (proposals, objects))
    if rng.random() < 0.5:  # sparse, as it is in images
        iou *= rng.random(iou.shape) < 0.2
    crowd = rng.random(objects) < 0.2
    counted = (rng.random((4, objects)) < 0.6) & ~crowd
    ranks = match_ranks(iou, counted)
    assert ranks.shape == (4, 10, objects)
    assert ranks.dtype == np.int32
    for a in range(4):
        for t, limit in enumerate(IOU_THRESHOLDS):
            assert ranks[a, t].tolist() == loops(iou, ~counted[a], crowd, limit)


def test_a_proposal_takes_its_best_free_object():
    iou = np.array([[0.6, 0.8], [0.0, 0.9], [0.55, 0.0]])
    ranks = match_ranks(iou, np.ones((1, 2), bool), np.array([0.5, 0.58, 0.85]))[0]
    assert ranks.tolist() == [[2, 0], [NEVER, 0], [NEVER, 1]]
    # Without the second object the first proposal takes the first one.
    ranks = match_ranks(iou, np.array([[True, False]]), np.array([0.5]))[0]
    assert ranks.tolist() == [[0, NEVER]]


def test_bad_matrices():
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(1, 4\)"):
        match_ranks(np.zeros((3, 2)), np.ones((1, 4), bool))
    with pytest.raises(ValueError, match="NaN"):
        match_ranks(np.full((1, 1), np.nan), np.ones((1, 1), bool))


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12))
def test_recall_is_a_count(seed, objects):
    rng = np.random.default_rng(seed)
    ranks = rng.choice([0, 1, 2, 9, 10, 500, NEVER], (3, 10, objects)).astype(np.int32)
    counted = rng.random((3, objects)) < 0.7
    caps = (1, 2, 10, 1000)
    got = average_recall(ranks, counted, caps)
    for a in range(3):
        own = [g for g in range(objects) if counted[a, g]]
        for m, cap in enumerate(caps):
            if not own:
                assert np.isnan(got[a, m])
                continue
            shares = [
                Fraction(sum(int(ranks[a, t, g]) < cap for g in own), len(own)) for t in range(10)
            ]
            assert got[a, m] == pytest.approx(float(sum(shares) / 10), abs=1e-12)


def test_area_under_a_step():
    """One object, found by the 10th proposal: 0 up to n = 8, 1 from n = 10, a ramp between."""
    counted = np.ones((1, 1), bool)
    ranks = np.full((1, 10, 1), 9, np.int32)
    expected = (2 + (1 - np.log10(8)) / 2) / 3
    assert area_under_curve(ranks, counted)[0] == pytest.approx(expected, abs=1e-12)
    assert area_under_curve(ranks * 0, counted)[0] == pytest.approx(1, abs=1e-12)
    assert area_under_curve(np.full_like(ranks, NEVER), counted)[0] == 0
    assert np.isnan(area_under_curve(ranks[:, :, :0], counted[:, :0])[0])


def test_grid():
    assert len(AUC_COUNTS) == 28
    assert AUC_COUNTS[:8] == (1, 2, 3, 4, 5, 6, 8, 10)
    assert AUC_COUNTS[-1] == 1000


def test_sizes_share_their_borders():
    counted = counted_by_size([1023.5, 1024, 1025, 9216, 9217, 0])
    assert counted.astype(int).tolist() == [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0, 1],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
    ]


@pytest.mark.parametrize("hundredths", range(50, 100, 5))
def test_quotients_on_a_threshold(hundredths):
    """An object of 100 pixels and a part of it: the quotient is the threshold, and counts."""
    objects = torch.zeros((1, 10, 10), dtype=torch.bool)
    objects[:] = True
    part = torch.zeros((2, 100), dtype=torch.bool)
    part[0, :hundredths] = True
    part[1, : hundredths - 1] = True
    iou = exact_mask_iou(pack_masks(part.view(2, 10, 10)), pack_masks(objects))
    assert iou[0, 0] == hundredths / 100
    ranks = match_ranks(iou, np.ones((1, 1), bool))[0, :, 0]
    at = (hundredths - 50) // 5
    assert (ranks[: at + 1] == 0).all()
    assert (ranks[at + 1 :] == NEVER).all()


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_mask_quotients(seed):
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(1, 20, 2).tolist())
    a, b = (rng.random((n, *size)) < rng.random((n, 1, 1)) for n in rng.integers(0, 5, 2))
    if len(a) and len(b):
        a[0] = b[0] = False
    got = exact_mask_iou(pack_masks(torch.from_numpy(a)), pack_masks(torch.from_numpy(b)))
    assert got.dtype == np.float64
    assert got.shape == (len(a), len(b))
    for n, m in np.ndindex(got.shape):
        union = int((a[n] | b[m]).sum())
        assert got[n, m] == (float(Fraction(int((a[n] & b[m]).sum()), union)) if union else 0)


def test_box_quotients():
    boxes = np.array([[0, 0, 4, 4], [10, 10, 0, 5], [2, 0, 4, 4.0]])
    objects = np.array([[0, 0, 4, 2], [2, 0, 4, 4.0]])
    expected = [[0.5, 8 / 24], [0, 0], [4 / 20, 1]]
    assert exact_box_iou(boxes, objects).tolist() == expected
    assert exact_box_iou(boxes[:0], objects).shape == (0, 2)
    assert exact_box_iou(boxes, objects[:0]).shape == (3, 0)
    # Not contiguous, and lists as pycocotools takes them.
    crosswise = np.asfortranarray(boxes)
    assert exact_box_iou(crosswise, objects).tolist() == expected
    assert mask_util.iou(boxes.tolist(), objects.tolist(), [0, 0]).tolist() == expected


@pytest.mark.parametrize("caps", [(), (0,), (1.5,), (True,), (-1, 10)])
def test_bad_caps(caps):
    with pytest.raises(ValueError, match="caps must be positive integers"):
        check_caps(caps)


def test_caps_rise():
    assert check_caps([100, 1, 100, 10.0]) == (1, 10, 100)
