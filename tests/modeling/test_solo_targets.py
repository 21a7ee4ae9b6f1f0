"""Which cells learn which object, and the shrunken masks, against loops over objects and pixels."""

from fractions import Fraction

import cv2
import freesolo_oracle as oracle
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unseg.modeling.solo.targets import (
    GridSpec,
    assign_cells,
    downsample_masks,
    last_object_of_cells,
    make_pairs,
    mask_centers,
)

GRIDS = (10, 20, 3)
RANGES = ((1, 30), (20, 60), (50, 400))
SPEC = GridSpec(GRIDS, RANGES, 0.2)
RELEASED = GridSpec(
    (40, 36, 24, 16, 12), ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048)), 0.2
)


def random_masks(rng, n, height, width):
    """Pairs of rectangles; some empty, some of one pixel, some at the border."""
    masks = np.zeros((n, height, width), dtype=bool)
    for i, mask in enumerate(masks):
        if i % 7 == 3:
            continue
        for _ in range(2):
            y, x = rng.integers(height), rng.integers(width)
            size = rng.integers(1, max(height, width) // 2 + 2, 2) if i % 5 else (1, 1)
            mask[y : y + size[0], x : x + size[1]] = True
    return masks


def tight_boxes(masks):
    boxes = [oracle.tight_box(m) if m.any() else (0, 0, 0, 0) for m in masks]
    return np.array(boxes, dtype=np.float32).reshape(-1, 4)


def found_cells(boxes, centers, valid, padded, spec):
    """Per object the sorted (level, row, column) of what assign_cells gives."""
    cells = assign_cells(
        torch.as_tensor(boxes),
        torch.as_tensor(centers),
        torch.as_tensor(valid, dtype=torch.bool),
        padded,
        spec,
    )
    assert cells.dtype == torch.int64
    assert cells.shape == (len(boxes), len(spec.num_grids), 9)
    result = []
    for of_object in cells.tolist():
        own = []
        for level, of_level in enumerate(of_object):
            s = spec.num_grids[level]
            offset = sum(g * g for g in spec.num_grids[:level])
            own += [(level, *divmod(k - offset, s)) for k in of_level if k >= 0]
        assert all(0 <= y < spec.num_grids[k] and 0 <= x < spec.num_grids[k] for k, y, x in own)
        assert len(set(own)) == len(own)
        result.append(sorted(own))
    return result


def expected_cells(box, center, padded, spec):
    cells, margin = oracle.cells_of_object(
        box, center, padded, spec.num_grids, spec.scale_ranges, Fraction(1, 5)
    )
    # In float32, a decision on the border of a cell may go either way.
    return sorted(cells) if margin > 1e-4 else None


@pytest.mark.parametrize(("padded", "size"), [((160, 192), (160, 192)), ((160, 224), (131, 187))])
def test_cells_of_masks(padded, size):
    masks = random_masks(np.random.default_rng(0), 120, *size)
    boxes, valid = tight_boxes(masks), masks.any((1, 2))
    centers = mask_centers(torch.from_numpy(masks))
    found = found_cells(boxes, centers, valid, padded, SPEC)
    checked, sizes = 0, set()
    for mask, box, cells in zip(masks, boxes.tolist(), found, strict=True):
        if not mask.any():
            assert cells == []
            continue
        expected = expected_cells(box, oracle.center_of_mass(mask), padded, SPEC)
        if expected is None:
            continue
        assert cells == expected
        checked += 1
        sizes |= {sum(cell[0] == level for cell in cells) for level in range(3)}
    assert checked > 60
    assert {0, 1, 2, 4} <= sizes, "objects of many sizes on all levels"


@given(
    box=st.tuples(*[st.integers(0, 4000)] * 4),
    center=st.tuples(st.integers(0, 159), st.integers(0, 191)),
    fraction=st.sampled_from([0, 0.25, 0.5]),
)
@settings(max_examples=150)
def test_cells_of_any_box(box, center, fraction):
    """Boxes that have nothing to do with the centre, as with DATA.BOXES "xyxy_as_xywh"."""
    x0, x1 = sorted(v / 16 for v in box[:2])
    y0, y1 = sorted(v / 16 for v in box[2:])
    box, center = (x0, y0, x1, y1), (center[1] + fraction, center[0] + fraction)
    area = (x1 - x0) * (y1 - y0)
    assume(all(abs(area / end**2 - 1) > 1e-5 for r in RANGES for end in r))
    expected = expected_cells(box, center, (160, 192), SPEC)
    assume(expected is not None)
    (found,) = found_cells(
        np.array([box], dtype=np.float32),
        np.array([center], dtype=np.float32),
        [True],
        (160, 192),
        SPEC,
    )
    assert found == expected


@pytest.mark.parametrize("corner", [(0, 0), (0, 159), (127, 0), (127, 159)])
def test_objects_in_the_corners(corner):
    """Cells outside the grid are left out."""
    y, x = corner
    mask = np.zeros((1, 128, 160), dtype=bool)
    mask[0, max(0, y - 10) : y + 11, max(0, x - 10) : x + 11] = True
    center = mask_centers(torch.from_numpy(mask))
    expected = expected_cells(
        oracle.tight_box(mask[0]), oracle.center_of_mass(mask[0]), (128, 160), SPEC
    )
    assert found_cells(tight_boxes(mask), center, [True], (128, 160), SPEC) == [expected]
    # A huge box around a centre in the corner reaches out of the image.
    (found,) = found_cells(
        np.array([[0, 0, 600, 600]], dtype=np.float32),
        np.array([[x + 0.3, y + 0.4]], dtype=np.float32),
        [True],
        (128, 160),
        GridSpec((3,), ((1, 700),), 0.2),
    )
    rows, columns = ((0, 1) if v == 0 else (1, 2) for v in corner)
    assert found == [(0, i, j) for i in rows for j in columns]


def test_at_most_the_nine_cells_around_the_centre():
    (found,) = found_cells(
        np.array([[10, 0, 210, 200]], dtype=np.float32),
        np.array([[81.3, 66.2]], dtype=np.float32),
        [True],
        (128, 160),
        GridSpec((40,), ((1, 700),), 0.2),
    )
    assert found == [(0, y, x) for y in (19, 20, 21) for x in (19, 20, 21)]


def levels_of(width, height, spec=RELEASED):
    box = np.array([[100, 200, 100 + width, 200 + height]], dtype=np.float32)
    (cells,) = found_cells(box, np.array([[700.2, 500.3]], np.float32), [True], (2048, 2048), spec)
    return sorted({level for level, _, _ in cells})


def test_ranges_of_levels_overlap_and_include_their_ends():
    assert levels_of(1, 1) == [0]
    assert levels_of(0.9, 0.9) == []
    assert levels_of(48, 48) == levels_of(36, 64) == [0, 1]
    assert levels_of(47.9, 48) == [0]
    assert levels_of(96, 96) == levels_of(72, 128) == [0, 1, 2]
    assert levels_of(96.1, 96) == [1, 2]
    assert levels_of(384, 384) == [2, 3, 4]
    assert levels_of(2048, 2048) == [4]
    assert levels_of(2049, 2048) == []
    assert levels_of(0, 500) == []


def test_objects_to_leave_out_have_no_cells():
    boxes = np.array([[10, 10, 60, 60]] * 3, dtype=np.float32)
    centers = np.array([[35.2, 35.3]] * 3, dtype=np.float32)
    found = found_cells(boxes, centers, [True, False, True], (160, 192), SPEC)
    assert found[1] == []
    assert found[0] == found[2] != []


def test_lists_of_one_length():
    with pytest.raises(ValueError, match="2 NUM_GRIDS and 3 FPN_SCALE_RANGES"):
        GridSpec((4, 5), RANGES)
    assert SPEC.num_cells == 100 + 400 + 9


@given(mask=hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
@settings(max_examples=50)
def test_centers(mask):
    (found,) = mask_centers(torch.from_numpy(mask)[None]).tolist()
    assert found == pytest.approx([float(v) for v in oracle.center_of_mass(mask)], abs=1e-5)


def test_centers_of_large_masks_are_exact_to_a_thousandth():
    mask = np.zeros((1, 800, 1344), dtype=bool)
    mask[0, 13:790, 300:1343] = True
    (found,) = mask_centers(torch.from_numpy(mask)).tolist()
    assert found == pytest.approx([(300 + 1342) / 2, (13 + 789) / 2], abs=1e-3)


def slow_pairs(assigned):
    rows, first = [], 0
    for image, cells in enumerate(assigned):
        for n, of_object in enumerate(cells.tolist()):
            for level, of_level in enumerate(of_object):
                rows += [(image, level, cell, first + n) for cell in of_level if cell >= 0]
        first += len(cells)
    return rows


def random_assignment(rng, counts):
    """Cells of objects as they come from assign_cells: distinct for each object."""
    batch = []
    for n in counts:
        cells = np.full((n, 3, 9), -1)
        for of_object in cells:
            for level, first in enumerate((0, 100, 500)):
                k = rng.integers(0, 4)
                own = rng.choice(9, k, replace=False)
                of_object[level, rng.choice(9, k, replace=False)] = first + own
        batch.append(torch.from_numpy(cells))
    return batch


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0], [1], [600, 2], [0, 4]])
def test_pairs(counts):
    assigned = random_assignment(np.random.default_rng(1), counts)
    pairs = make_pairs(assigned)
    rows = slow_pairs(assigned)
    columns = (pairs.image, pairs.level, pairs.cell, pairs.target)
    assert all(x.dtype == torch.int64 for x in columns)
    assert list(zip(*(x.tolist() for x in columns), strict=True)) == rows
    assert len(pairs) == len(rows)
    assert list(pairs.counts) == [sum(r[0] == b for r in rows) for b in range(len(counts))]
    owner = torch.full((len(counts), SPEC.num_cells), -1)
    for image, _, cell, target in rows:  # later objects overwrite
        owner[image, cell] = target
    found = last_object_of_cells(pairs, len(counts), SPEC.num_cells)
    assert torch.equal(found, owner)
    if counts == [600, 2]:
        assert len(rows) > len({(r[0], r[2]) for r in rows}), "objects share cells"


def check_small_masks(masks, stride, size):
    found = downsample_masks(torch.from_numpy(masks), stride, size)
    assert found.dtype == torch.bool
    assert found.shape == (len(masks), *size)
    for mask, small in zip(masks, found.numpy(), strict=True):
        values = oracle.small_mask_values(mask, *size, stride)
        exact = stride == 4 and not (mask.shape[0] % 4 or mask.shape[1] % 4)
        clear = np.abs(values - 0.5) > (-1 if exact else 1e-5)
        assert np.array_equal(small[clear], (values >= 0.5)[clear])
        assert clear.mean() > 0.6
    return found.numpy()


@pytest.mark.parametrize("shape", [(16, 24), (17, 23), (18, 21), (3, 5), (1, 1), (2, 33)])
def test_small_masks(shape):
    rng = np.random.default_rng(2)
    masks = np.concatenate([rng.random((3, *shape)) < 0.5, random_masks(rng, 9, *shape)])
    size = (-(-shape[0] // 32) * 8, -(-shape[1] // 32) * 8)
    found = check_small_masks(masks, 4, size)
    assert found[:3].any()
    assert not found[:, int(shape[0] / 4 + 0.5) or 1 :].any(), "the padding is empty"
    assert not found[:, :, int(shape[1] / 4 + 0.5) or 1 :].any()


def test_small_masks_at_another_stride():
    rng = np.random.default_rng(3)
    check_small_masks(rng.random((4, 32, 48)) < 0.5, 8, (4, 8))


@pytest.mark.parametrize("shape", [(32, 64), (4, 8), (100, 44)])
def test_small_masks_equal_opencv(shape):
    """Where the sides are divisible by 4, cv2's fixed-point arithmetic is exact."""
    masks = np.random.default_rng(4).random((6, *shape)) < np.linspace(0.2, 0.8, 6)[:, None, None]
    size = (shape[0] // 4, shape[1] // 4)
    found = downsample_masks(torch.from_numpy(masks), 4, size).numpy()
    for mask, small in zip(masks, found, strict=True):
        expected = cv2.resize(mask.astype(np.uint8), size[::-1], interpolation=cv2.INTER_LINEAR)
        assert np.array_equal(small, expected.astype(bool))


def test_more_masks_than_opencv_has_channels():
    rng = np.random.default_rng(5)
    masks = torch.from_numpy(rng.random((700, 16, 20)) < 0.5)
    found = downsample_masks(masks, 4, (8, 8))
    for n in (0, 511, 512, 699):
        assert torch.equal(found[n], downsample_masks(masks[n : n + 1], 4, (8, 8))[0])
    assert found.flatten(1).any(1).all()


def test_no_masks():
    found = downsample_masks(torch.zeros((0, 20, 30), dtype=torch.bool), 4, (8, 8))
    assert found.shape == (0, 8, 8)
    assert found.dtype == torch.bool
    assert mask_centers(torch.zeros((0, 20, 30), dtype=torch.bool)).shape == (0, 2)
    assert mask_centers(torch.zeros((1, 20, 30), dtype=torch.bool)).tolist() == [[0, 0]]
    assert found_cells(np.zeros((0, 4), np.float32), torch.zeros(0, 2), [], (32, 32), SPEC) == []


def test_a_pixel_keeps_its_cell_even_where_its_small_mask_is_empty():
    mask = np.zeros((1, 32, 32), dtype=bool)
    mask[0, 16, 20] = True
    assert not downsample_masks(torch.from_numpy(mask), 4, (8, 8)).any()
    center = mask_centers(torch.from_numpy(mask))
    assert center.tolist() == [[20, 16]]
    (cells,) = found_cells(
        tight_boxes(mask), center, [True], (32, 32), GridSpec((5,), ((1, 9),), 0.2)
    )
    assert cells == [(0, 2, 3)]
