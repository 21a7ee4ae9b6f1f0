"""Instance maps on a patch grid: against OpenCV, torch and loops over pixels."""

from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from unseg.structures import GRID_MODES, GridLabels, sample_on_grid


def random_map(seed, height, width, labels=5):
    return np.random.default_rng(seed).integers(0, labels, (height, width), dtype=np.int32)


def by_loop(index_map, grid_size, extent, mode):
    """One cell after the other, in exact integers: extents are (numerator, denominator) pairs."""
    (height, width), (h, w) = index_map.shape, grid_size
    (ny, dy), (nx, dx) = extent
    result = np.zeros(grid_size, np.int64)
    twice = 0 if mode == "corner" else 1  # the point, in half cells
    for i in range(h):
        for j in range(w):
            y = (2 * i + twice) * height * ny // (2 * h * dy)
            x = (2 * j + twice) * width * nx // (2 * w * dx)
            result[i, j] = index_map[min(y, height - 1), min(x, width - 1)]
            if mode != "majority":
                continue
            counts = Counter(
                index_map[y, x]
                for y in range(height)
                for x in range(width)
                if (2 * y + 1) * h * dy // (2 * height * ny) == i
                and (2 * x + 1) * w * dx // (2 * width * nx) == j
            )
            if counts:
                most = max(counts.values())
                result[i, j] = min(label for label, count in counts.items() if count == most)
    return result


@pytest.mark.parametrize("mode", GRID_MODES)
@pytest.mark.parametrize(
    ("size", "grid"), [((32, 48), (4, 6)), ((33, 50), (4, 7)), ((3, 5), (6, 7)), ((1, 40), (1, 3))]
)
def test_whole_image_by_loop(size, grid, mode):
    index_map = random_map(0, *size)
    result = sample_on_grid(index_map, grid, mode=mode)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, by_loop(index_map, grid, ((1, 1), (1, 1)), mode))


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 1000),
    st.sampled_from(GRID_MODES),
)
def test_patches_of_a_cropped_image_by_loop(height, width, patch, seed, mode):
    """The grid of whole patches, whatever the size of the image."""
    patch = min(patch, height, width)
    h, w = height // patch, width // patch
    index_map = random_map(seed, height, width)
    extent = ((h * patch, height), (w * patch, width))
    result = sample_on_grid(index_map, (h, w), (h * patch / height, w * patch / width), mode)
    np.testing.assert_array_equal(result, by_loop(index_map, (h, w), extent, mode))
    cropped = index_map[: h * patch, : w * patch].reshape(h, patch, w, patch)
    if mode != "majority":
        offset = 0 if mode == "corner" else patch // 2
        np.testing.assert_array_equal(result, cropped[:, offset, :, offset])


@pytest.mark.parametrize(
    ("size", "grid"), [((48, 80), (3, 5)), ((240, 416), (15, 26)), ((7, 9), (5, 4))]
)
def test_nearest_of_opencv_and_torch(size, grid):
    index_map = random_map(1, *size, labels=200)
    corner = sample_on_grid(index_map, grid, mode="corner")
    resized = cv2.resize(index_map, grid[::-1], interpolation=cv2.INTER_NEAREST)
    np.testing.assert_array_equal(corner, resized)
    tensor = torch.from_numpy(index_map)[None, None].double()
    nearest = F.interpolate(tensor, grid, mode="nearest")[0, 0]
    np.testing.assert_array_equal(corner, nearest.numpy())
    exact = F.interpolate(tensor, grid, mode="nearest-exact")[0, 0]
    np.testing.assert_array_equal(sample_on_grid(index_map, grid), exact.numpy())


@pytest.mark.parametrize("mode", GRID_MODES)
def test_an_extent_that_is_not_exact(mode):
    """126 / 138 * 138 is not 126 in floating point: patches of 14 must not lose a pixel."""
    index_map = np.repeat(np.arange(138, dtype=np.int32)[:, None], 2, axis=1)
    result = sample_on_grid(index_map, (9, 1), (126 / 138, 1.0), mode)[:, 0]
    offset = 7 if mode == "center" else 0  # all counts are 1 here: the smallest label wins
    np.testing.assert_array_equal(result, np.arange(9) * 14 + offset)


def test_a_resized_image_has_the_grid_of_its_file():
    """The extent is in fractions: a model that sees the image at double size changes nothing."""
    index_map = random_map(2, 37, 50)
    large = index_map.repeat(2, 0).repeat(2, 1)
    extent = (32 / 37, 48 / 50)
    for mode in GRID_MODES:
        np.testing.assert_array_equal(
            sample_on_grid(large, (4, 6), extent, mode),
            sample_on_grid(index_map, (4, 6), extent, mode),
        )


def test_majority():
    index_map = np.array([[3, 3, 0, 1], [1, 1, 7, 7], [0, 0, 2, 2], [0, 5, 2, 65535]])
    assert sample_on_grid(index_map, (2, 2), mode="majority").tolist() == [[1, 7], [0, 2]]
    assert sample_on_grid(index_map, (2, 2), mode="corner").tolist() == [[3, 0], [0, 2]]
    assert sample_on_grid(index_map, (2, 2)).tolist() == [[1, 7], [5, 65535]]


def test_tensors_are_taken_too():
    index_map = torch.arange(64, dtype=torch.int32).view(8, 8)
    assert sample_on_grid(index_map, (2, 2)).tolist() == [[18, 22], [50, 54]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((4, 4), int), (2, 2), (1, 1), "nearest"), "mode must be one of"),
        ((np.zeros((4, 4)), (2, 2)), r"index_map must be integers \(H, W\), got float64"),
        ((np.zeros((4, 4, 1), int), (2, 2)), "index_map must be integers"),
        ((np.zeros((0, 4), int), (2, 2)), "index_map must be integers"),
        ((np.full((4, 4), -1), (2, 2)), "below 0, got -1"),
        ((np.zeros((4, 4), int), (0, 2)), "grid_size"),
        ((np.zeros((4, 4), int), (2, 2, 2)), "grid_size"),
        ((np.zeros((4, 4), int), (2, 2), (0, 1)), "extent"),
        ((np.zeros((4, 4), int), (2, 2), (1, 1.1)), "extent"),
        ((np.zeros((4, 4), int), (2, 2), (1, float("nan"))), "extent"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_on_grid(*arguments)


def test_grid_labels():
    labels = torch.zeros((2, 3), dtype=torch.int64)
    assert GridLabels(labels).extent == (1.0, 1.0)
    with pytest.raises(ValueError, match=r"int64 tensor .*torch\.int32"):
        GridLabels(labels.int())
    with pytest.raises(ValueError, match=r"\(1, 2, 3\)"):
        GridLabels(labels[None])
    with pytest.raises(ValueError, match="int64 tensor"):
        GridLabels(labels.tolist())
    with pytest.raises(ValueError, match="extent"):
        GridLabels(labels, (1.0, 0.0))
