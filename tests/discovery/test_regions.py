"""Regions of masks against scipy.ndimage and pixel-by-pixel loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from unseg.discovery.regions import (
    border_fractions,
    connected_components,
    fill_holes,
    remove_small,
)

NEIGHBOURS = {4: ndimage.generate_binary_structure(2, 1), 8: np.ones((3, 3))}

masks = hnp.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))
empty_shapes = pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])


def by_first_pixel(labels):
    """The same components, numbered in the order in which a scan by rows meets them."""
    names = {0: 0}
    return np.array([names.setdefault(x, len(names)) for x in labels.ravel()]).reshape(labels.shape)


@pytest.mark.parametrize("connectivity", [4, 8])
@settings(deadline=None)
@given(mask=masks)
def test_components_are_scipys_in_the_order_of_first_pixels(connectivity, mask):
    before = mask.copy()
    labels, areas = connected_components(mask, connectivity=connectivity)
    expected, count = ndimage.label(mask, structure=NEIGHBOURS[connectivity])
    np.testing.assert_array_equal(labels, by_first_pixel(expected))
    assert areas.tolist() == [(labels == n).sum() for n in range(1, count + 1)]
    assert (labels.dtype, areas.dtype) == (np.int32, np.int64)
    np.testing.assert_array_equal(mask, before)


@pytest.mark.parametrize("connectivity", [4, 8])
def test_components_of_a_large_noisy_mask(connectivity):
    # Large enough for OpenCV's parallel algorithm, whose numbering is its own.
    mask = np.random.default_rng(0).random((400, 600)) < 0.45
    labels, areas = connected_components(mask, connectivity=connectivity)
    expected, count = ndimage.label(mask, structure=NEIGHBOURS[connectivity])
    np.testing.assert_array_equal(labels, by_first_pixel(expected))
    assert len(areas) == count > 1000
    assert areas.sum() == mask.sum()


def test_diagonal_neighbours_are_8_connected_only():
    mask = np.eye(3, dtype=bool)
    assert connected_components(mask)[1].tolist() == [3]
    assert connected_components(mask, connectivity=4)[1].tolist() == [1, 1, 1]


def test_a_view_that_is_not_contiguous():
    mask = np.random.default_rng(0).random((20, 30)) < 0.4
    labels, areas = connected_components(mask.T[::2])
    expected, expected_areas = connected_components(mask.T[::2].copy())
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(areas, expected_areas)


@settings(deadline=None)
@given(mask=masks)
def test_holes_are_scipys(mask):
    # scipy's default background is 4-connected too.
    np.testing.assert_array_equal(fill_holes(mask), ndimage.binary_fill_holes(mask))


def test_an_8_connected_outline_closes_and_a_gap_opens_it():
    diamond = np.zeros((5, 5), dtype=bool)
    diamond[[0, 1, 1, 2, 2, 3, 3, 4], [2, 1, 3, 0, 4, 1, 3, 2]] = True
    assert fill_holes(diamond).sum() == 8 + 5
    diamond[1, 1] = False
    np.testing.assert_array_equal(fill_holes(diamond), diamond)


@settings(deadline=None)
@given(mask=masks, min_area=st.floats(0, 12))
def test_small_parts_are_removed(mask, min_area):
    labels, count = ndimage.label(mask, structure=NEIGHBOURS[8])
    expected = np.zeros_like(mask)
    for n in range(1, count + 1):
        if (labels == n).sum() >= min_area:
            expected |= labels == n
    np.testing.assert_array_equal(remove_small(mask, min_area), expected)


@settings(deadline=None)
@given(mask=masks, thickness=st.integers(1, 6))
def test_border_fractions_count_pixels(mask, thickness):
    height, width = mask.shape
    inside = [
        [(y, x) for y in range(height) for x in range(width) if chosen(y, x)]
        for chosen in (
            lambda y, x: y < thickness,
            lambda y, x: y >= height - thickness,
            lambda y, x: x < thickness,
            lambda y, x: x >= width - thickness,
        )
    ]
    expected = [sum(mask[p] for p in strip) / len(strip) for strip in inside]
    np.testing.assert_allclose(border_fractions(mask, thickness), expected, rtol=1e-12)


@empty_shapes
def test_masks_without_pixels(shape):
    mask = np.zeros(shape, dtype=bool)
    labels, areas = connected_components(mask)
    assert labels.shape == shape
    assert areas.shape == (0,)
    assert fill_holes(mask).shape == shape
    assert remove_small(mask, 1).shape == shape
    assert border_fractions(mask, 2).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (4, 6)])
def test_masks_of_one_value(shape, value):
    mask = np.full(shape, value)
    areas = [mask.size] if value else []
    assert connected_components(mask)[1].tolist() == areas
    np.testing.assert_array_equal(fill_holes(mask), mask)
    np.testing.assert_array_equal(remove_small(mask, 1), mask)
    assert border_fractions(mask, 1).tolist() == [float(value)] * 4


@pytest.mark.parametrize(
    "function",
    [
        connected_components,
        fill_holes,
        lambda mask: remove_small(mask, 1),
        lambda mask: border_fractions(mask, 1),
    ],
)
@pytest.mark.parametrize(
    "mask", [np.zeros((3, 3), np.uint8), np.zeros((3, 3)), np.zeros((1, 3, 3), bool)]
)
def test_what_is_no_mask_is_refused(function, mask):
    with pytest.raises(ValueError, match=r"mask must be bool \(H, W\), got"):
        function(mask)
