"""Windows of an image pyramid, against loops and planted places."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unseg.modeling.proposals import grid_windows, to_output, top_windows


@pytest.mark.parametrize(
    ("size", "stride", "offset", "side"),
    [((3, 4), 16, 0, 160), ((2, 5), 8, 8.0, 168), ((0, 3), 4, 2, 60)],
)
def test_windows_are_centred_on_cells(size, stride, offset, side):
    windows = grid_windows(size, stride, offset, side)
    expected = [
        [
            offset + stride * column - side / 2,
            offset + stride * row - side / 2,
            offset + stride * column + side / 2,
            offset + stride * row + side / 2,
        ]
        for row in range(size[0])
        for column in range(size[1])
    ]
    assert windows.dtype == torch.float32
    assert windows.shape == (size[0] * size[1], 4)
    assert windows.tolist() == expected


def test_each_axis_has_its_own_factor():
    """An image of 101 x 203 as 50 x 102: borders fall on borders."""
    boxes = torch.tensor([[0.0, 0, 102, 50], [51, 25, 102, 50], [-10.2, -5, 0, 0]])
    there = to_output(boxes, (50, 102), (101, 203))
    expected = [[0, 0, 203, 101], [101.5, 50.5, 203, 101], [-20.3, -10.1, 0, 0]]
    torch.testing.assert_close(there, torch.tensor(expected))
    torch.testing.assert_close(to_output(there, (101, 203), (50, 102)), boxes)
    assert to_output(boxes[:0], (5, 5), (9, 9)).shape == (0, 4)


@given(
    values=st.lists(st.lists(st.integers(-3, 3), max_size=7), min_size=1, max_size=4),
    limit=st.integers(1, 12),
)
@settings(deadline=None)
def test_the_best_of_all_scales(values, limit):
    logits = [torch.tensor(own, dtype=torch.float16) for own in values]
    boxes = [torch.rand(len(own), 4, dtype=torch.float64) for own in values]
    best = top_windows(logits, boxes, limit)
    every = [(-v, s, p) for s, own in enumerate(values) for p, v in enumerate(own)]
    expected = sorted(every)[:limit]  # ties: by scale, then by place
    assert list(zip(best.scales.tolist(), best.places.tolist())) == [e[1:] for e in expected]
    assert best.logits.tolist() == [-e[0] for e in expected]
    assert best.logits.dtype == best.boxes.dtype == torch.float32
    for box, (_, scale, place) in zip(best.boxes, expected):
        assert torch.equal(box, boxes[scale][place].float())


def test_maps_are_read_row_by_row():
    logits = torch.tensor([[0.0, 3.0], [2.0, 1.0]])
    best = top_windows([logits], [grid_windows((2, 2), 4, 2, 4)], 2)
    assert best.places.tolist() == [1, 2]
    assert best.boxes.tolist() == [[4, 0, 8, 4], [0, 4, 4, 8]]


def test_infinite_logits_have_their_place():
    logits = torch.tensor([-math.inf, 0, math.inf])
    assert top_windows([logits], [torch.zeros(3, 4)], 3).places.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("logits", "boxes", "limit", "message"),
    [
        ([], [], 5, "not 0 and 0"),
        ([torch.zeros(2)], [], 5, "not 1 and 0"),
        ([torch.zeros(2)] * 2, [torch.zeros(2, 4), torch.zeros(3, 4)], 5, r"scale 1: .*\(2, 4\)"),
        ([torch.tensor([0, math.nan])], [torch.zeros(2, 4)], 5, "scale 0: 1 logits are NaN"),
        ([torch.zeros(2)], [torch.zeros(2, 4)], 0, "limit must be at least 1"),
    ],
)
def test_bad_input(logits, boxes, limit, message):
    with pytest.raises(ValueError, match=message):
        top_windows(logits, boxes, limit)
