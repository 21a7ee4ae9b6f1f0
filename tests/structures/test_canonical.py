"""Labels of windows against the rule written as a loop, and at its limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unseg.structures import CanonicalRule, canonical_places, label_windows

RULE = CanonicalRule(
    object_size=128.0, pos_shift=16.0, pos_scale=0.25, neg_shift=32.0, neg_scale=1.0
)
TIE = 1e-3  # closer to a limit than this, float32 may decide otherwise


def slow_labels(centers, scales, boxes, rule):
    """Labels, objects, and whether a window is too near a limit for float32, in float64."""
    results = []
    for (x, y), scale in zip(centers, scales):
        label, matched, nearest, near_limit = 0, -1, math.inf, False
        for n, (x0, y0, x1, y1) in enumerate(boxes):
            dx = (x - (x0 + x1) / 2) / 2**scale
            dy = (y - (y0 + y1) / 2) / 2**scale
            shift = max(abs(dx), abs(dy))
            octaves = abs(scale - math.log2(max(x1 - x0, y1 - y0) / rule.object_size))
            for value, limits in (
                (shift, (rule.pos_shift, rule.neg_shift)),
                (octaves, (rule.pos_scale, rule.neg_scale)),
            ):
                near_limit |= any(abs(value - limit) < TIE for limit in limits)
            if shift <= rule.pos_shift and octaves <= rule.pos_scale:
                label = 1
                distance = math.hypot(dx, dy)
                near_limit |= abs(distance - nearest) < TIE
                if distance < nearest:
                    nearest, matched = distance, n
            elif not (shift >= rule.neg_shift or octaves >= rule.neg_scale) and label == 0:
                label = -1
        results.append((label, matched, near_limit))
    return results


@given(seed=st.integers(0, 10**6), objects=st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_against_a_loop(seed, objects):
    generator = torch.Generator().manual_seed(seed)
    sides = 128 * 2 ** (torch.rand(objects, 2, generator=generator) * 3 - 1.5)
    corners = torch.rand(objects, 2, generator=generator) * 120
    boxes = torch.cat([corners, corners + sides], dim=1)
    # Windows around the objects, so that all labels occur.
    chosen = torch.randint(objects, (80,), generator=generator)
    centers = ((boxes[:, :2] + boxes[:, 2:]) / 2)[chosen]
    centers = centers + torch.randn(80, 2, generator=generator) * 20
    scales = (sides.amax(1) / 128).log2()[chosen] + torch.randn(80, generator=generator) * 0.5
    labels, matched = label_windows(centers, scales, boxes, RULE)
    assert (labels.dtype, matched.dtype) == (torch.int8, torch.int64)
    expected = slow_labels(centers.tolist(), scales.tolist(), boxes.tolist(), RULE)
    for label, index, (true_label, true_index, near_limit) in zip(
        labels.tolist(), matched.tolist(), expected
    ):
        assert near_limit or (label, index) == (true_label, true_index)
    assert sum(near for *_, near in expected) < 20


def test_all_labels_occur():
    """The test above would say nothing if windows of one kind were missing."""
    box = torch.tensor([[0.0, 0, 128, 100]])
    centers = torch.tensor([[64.0, 50], [64, 70], [64, 90]])
    labels, matched = label_windows(centers, 0.0, box, RULE)
    assert labels.tolist() == [1, -1, 0]
    assert matched.tolist() == [0, -1, -1]


BOX = torch.tensor([[100.0, 200, 164, 328]])  # centre (132, 264), longest side 128: scale 0


@pytest.mark.parametrize(
    ("dx", "dy", "scale", "label"),
    [
        # Exactly at a limit: still positive, already negative.
        (16, -16, 0.0, 1),
        (-16.25, 0, 0.0, -1),
        (0, 16.25, 0.0, -1),
        (0, 0, 0.25, 1),
        (0, 0, -0.25, 1),
        (16, 0, -0.25, -1),  # 16 pixels of the image are 19 of the enlarged one
        (0, 0, 0.2578125, -1),
        (32, 0, 0.0, 0),
        (0, -32, 0.0, 0),
        (31.75, 31.75, 0.0, -1),
        (0, 0, 1.0, 0),
        (0, 0, -1.0, 0),
        (0, 0, 0.9921875, -1),
        (0, 0, -0.9921875, -1),
        # Far in one respect is enough.
        (500, 0, 0.0, 0),
        (0, 0, 5.0, 0),
    ],
)
def test_limits(dx, dy, scale, label):
    centers = torch.tensor([[132.0 + dx, 264 + dy]])
    labels, matched = label_windows(centers, torch.tensor([scale]), BOX, RULE)
    assert labels.tolist() == [label]
    assert matched.tolist() == [0 if label == 1 else -1]


def test_shifts_are_of_the_resized_image():
    """Seen at half the size, an object of 256 is in its place, and 32 pixels are 16."""
    box = torch.tensor([[0.0, 0, 256, 80]])
    centers = torch.tensor([[128.0 + 32, 40], [128 + 33, 40], [128 + 64, 40], [128 + 63, 40]])
    assert label_windows(centers, 1.0, box, RULE)[0].tolist() == [1, -1, 0, -1]
    assert label_windows(centers / 2, 0.0, box / 2, RULE)[0].tolist() == [1, -1, 0, -1]


def test_the_nearest_of_those_that_fit():
    boxes = torch.tensor(
        [
            [0.0, 0, 128, 128],  # centre (64, 64), fits
            [8, 0, 136, 128],  # centre (72, 64), fits
            [40, 40, 90, 88],  # centre (65, 64), too small
            [8, 0, 136, 128],  # as the second
        ]
    )
    centers = torch.tensor([[65.0, 64], [70, 64], [68, 64], [90, 64]])
    labels, matched = label_windows(centers, 0.0, boxes, RULE)
    assert labels.tolist() == [1, 1, 1, -1]
    assert matched.tolist()[:2] == [0, 1]
    assert matched.tolist()[2:] == [0, -1]  # equally near: the first


def test_euclidean_distance_decides():
    """(10, 10) is farther than (13, 0), though not in its largest coordinate."""
    boxes = torch.tensor([[10.0, 10, 138, 138], [13, 0, 141, 128]])
    assert label_windows(torch.tensor([[64.0, 64]]), 0.0, boxes, RULE)[1].tolist() == [1]


def test_negative_only_if_far_from_all():
    boxes = torch.tensor([[0.0, 0, 128, 128], [1000, 0, 1128, 128]])
    labels, _ = label_windows(torch.tensor([[64.0 + 20, 64], [500, 64]]), 0.0, boxes, RULE)
    assert labels.tolist() == [-1, 0]


def test_no_objects_and_no_windows():
    labels, matched = label_windows(torch.rand(3, 2), 0.5, torch.zeros(0, 4), RULE)
    assert labels.tolist() == [0, 0, 0]
    assert matched.tolist() == [-1, -1, -1]
    for boxes in (BOX, torch.zeros(0, 4)):
        labels, matched = label_windows(torch.zeros(0, 2), torch.zeros(0), boxes, RULE)
        assert labels.shape == matched.shape == (0,)
        assert (labels.dtype, matched.dtype) == (torch.int8, torch.int64)


def test_places():
    boxes = torch.tensor([[10.0, 20, 102, 60], [0, 0, 46, 184]])
    centers, scales = canonical_places(boxes, 92)
    assert centers.tolist() == [[56, 40], [23, 92]]
    assert scales.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"object_size": 0}, "must be positive"),
        ({"object_size": math.nan}, "must be positive"),
        ({"pos_shift": -1}, "not negative"),
        ({"pos_scale": -0.1}, "not negative"),
        ({"pos_shift": 32}, "farther away"),
        ({"pos_scale": 1.0}, "farther away"),
    ],
)
def test_bad_rules(values, message):
    with pytest.raises(ValueError, match=message):
        CanonicalRule(**({"object_size": 128} | values))
