"""Square crops against slices of a padded image and float64 loops."""

import math

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_util

from unseg.data.square_crop import Square, crop_mask, crop_square, mask_at


def encode(mask):
    return mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))


def blobs(rng, height, width):
    """A random mask with straight edges and holes."""
    coarse = rng.random((height // 4 + 1, width // 4 + 1)) < 0.5
    return np.kron(coarse, np.ones((4, 4), bool))[:height, :width]


def triangle_weights(count, size):
    """Antialiased bilinear resampling as a matrix, by the definition."""
    scale = count / size
    support = max(scale, 1.0)
    centers = (np.arange(size) + 0.5) * scale
    distance = np.abs(np.arange(count) + 0.5 - centers[:, None])
    weights = np.maximum(0, 1 - distance / support)
    return weights / weights.sum(axis=1, keepdims=True)


def slow_crop(image, left, top, side, size):
    """Of an image (C, H, W), in float64."""
    reach = side + max(abs(left), abs(top)) + max(image.shape)
    padded = np.pad(
        image.astype(np.float64), ((0, 0), (reach, reach), (reach, reach)), constant_values=127.5
    )
    part = padded[:, top + reach : top + reach + side, left + reach : left + reach + side]
    matrix = triangle_weights(side, size)
    return np.einsum("ai,cij,bj->cab", matrix, part, matrix)


def slow_mask(mask, box, size):
    """Means of bilinear samples, pixel by pixel, zero outside of the image; (size, size) float."""
    height, width = mask.shape
    result = np.zeros((size, size))
    steps = [(box[2] - box[0]) / size, (box[3] - box[1]) / size]
    counts = [max(math.ceil(step), 1) for step in steps]

    def pixel(y, x):
        return float(mask[y, x]) if 0 <= y < height and 0 <= x < width else 0.0

    for row in range(size):
        for column in range(size):
            total = 0.0
            for n in range(counts[1]):
                for m in range(counts[0]):
                    x = box[0] + (column + (m + 0.5) / counts[0]) * steps[0] - 0.5
                    y = box[1] + (row + (n + 0.5) / counts[1]) * steps[1] - 0.5
                    x0, y0 = math.floor(x), math.floor(y)
                    for dy, wy in ((0, 1 - (y - y0)), (1, y - y0)):
                        for dx, wx in ((0, 1 - (x - x0)), (1, x - x0)):
                            total += wy * wx * pixel(y0 + dy, x0 + dx)
            result[row, column] = total / (counts[0] * counts[1])
    return result


def test_the_specifications_example():
    """XYWH (10, 20, 92, 40) at the canonical size: 192 pixels of input, 160 of target."""
    square = Square.around(10 + 92 / 2, 20 + 40 / 2, 192)
    assert square.concentric_box(1) == (-40, -56, 152, 136)
    assert square.concentric_box(160 / 192) == (-24, -40, 136, 120)


@given(
    st.floats(-300, 300), st.floats(-300, 300), st.floats(0.01, 500), st.sampled_from([1, 0.8, 5])
)
def test_whole_squares_are_next_to_what_was_asked_for(x, y, side, ratio):
    square = Square.around(x, y, side)
    assert square.side >= 1
    assert abs(square.side - side) <= 0.5 or square.side == 1
    assert max(abs(square.center[0] - x), abs(square.center[1] - y)) <= 0.5
    box = square.concentric_box(ratio)
    assert box[2] - box[0] == pytest.approx(square.side * ratio)
    assert ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) == pytest.approx(square.center)


@pytest.mark.parametrize(
    ("left", "top", "side", "size"),
    [
        (3, 5, 12, 12),
        (3, 5, 12, 7),
        (2, 1, 8, 19),
        (-6, -3, 30, 16),
        (18, 10, 20, 24),
        (-9, 4, 70, 9),
    ],
)
def test_crops_of_images(left, top, side, size):
    image = np.random.default_rng(0).integers(0, 256, (3, 21, 33), dtype=np.uint8)
    crop = crop_square(torch.from_numpy(image), Square(left, top, side), size)
    assert crop.dtype == torch.float32
    assert crop.shape == (3, size, size)
    np.testing.assert_allclose(crop.numpy(), slow_crop(image, left, top, side, size), atol=1e-3)


@pytest.mark.parametrize(("left", "top"), [(-5, 0), (0, -5), (33, 0), (0, 21), (400, -90)])
def test_beside_the_image_all_is_grey(left, top):
    image = torch.zeros((3, 21, 33), dtype=torch.uint8)
    assert (crop_square(image, Square(left, top, 5), 8) == 127.5).all()
    assert not crop_mask(encode(np.ones((21, 33))), (left, top, left + 5, top + 5), 8).any()


def test_crops_have_memory_of_their_own():
    image = torch.zeros((3, 8, 8))
    crop_square(image, Square(0, 0, 8), 8).fill_(1)
    assert not image.any()


BOXES = [
    (4.0, 3.0, 16.0, 15.0),
    (4.3, 3.9, 16.1, 15.7),
    (-7.4, -2.2, 14.2, 19.4),
    (9.6, 5.5, 41.1, 37.0),
    (-20.0, -22.5, 60.0, 57.5),
    (10.2, 8.1, 12.9, 10.8),
]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("size", [7, 12])
@pytest.mark.parametrize("kind", ["blobs", "noise", "full"])
def test_crops_of_masks(box, size, kind):
    rng = np.random.default_rng(1)
    shape = (21, 33)
    noise = rng.random(shape) < 0.5
    mask = {"blobs": blobs(rng, *shape), "noise": noise, "full": np.ones(shape, bool)}[kind]
    expected = slow_mask(mask, box, size)
    clear = np.abs(expected - 0.5) > 1e-4
    assert clear.mean() > 0.5
    result = crop_mask(encode(mask), box, size)
    assert result.dtype == torch.bool
    assert result.shape == (size, size)
    np.testing.assert_array_equal(result.numpy()[clear], (expected > 0.5)[clear])


def test_inside_of_the_image_as_detectron2():
    rng = np.random.default_rng(2)
    mask = blobs(rng, 60, 80)
    differences = 0
    for _ in range(50):
        x, y, side = rng.uniform(5, 30), rng.uniform(5, 20), rng.uniform(5, 35)
        box = (x, y, x + side, y + side)
        stock = BitMasks(torch.from_numpy(mask)[None]).crop_and_resize(torch.tensor([box]), 28)[0]
        differences += int((crop_mask(encode(mask), box, 28) != stock).sum())
    assert differences <= 2  # of 39200; float32 at one half


def test_one_half_does_not_count():
    mask = np.zeros((4, 4), bool)
    mask[:, 2:] = True
    # The middle one of three pixels lies half on the mask.
    assert crop_mask(encode(mask), (0.5, 0.5, 3.5, 3.5), 3).tolist() == [[False, False, True]] * 3


def test_whole_pixels_are_copied():
    mask = blobs(np.random.default_rng(3), 20, 30)
    crop = crop_mask(encode(mask), (7, 4, 19, 16), 12)
    np.testing.assert_array_equal(crop.numpy(), mask[4:16, 7:19])


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1), st.sampled_from([0, 0.4, 1])
)
@settings(max_examples=50)
def test_pixels_of_masks(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    rows, columns = np.indices(mask.shape).reshape(2, -1)
    np.testing.assert_array_equal(mask_at(encode(mask), columns, rows), mask[rows, columns])


@pytest.mark.parametrize("seed", range(8))
def test_image_and_mask_agree(seed):
    """The object in the crop is where its mask is: to a quarter of a pixel, not half a stride."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((200, 260), bool)
    y, x, h, w = 40, 70, *rng.integers(30, 90, 2)
    mask[y : y + h, x : x + w] = True
    image = torch.from_numpy(np.where(mask, 255, 0).astype(np.uint8))[None]
    square = Square.around(*(rng.uniform(-9, 9, 2) + (x + w / 2, y + h / 2)), rng.uniform(90, 300))
    seen = crop_square(image, square, 192)[0, 16:-16, 16:-16] > 127.5
    target = crop_mask(encode(mask), square.concentric_box(160 / 192), 160)
    inside = crop_square(torch.ones((1, 200, 260)), square, 192)[0, 16:-16, 16:-16] < 2
    assert ((seen != target) & inside).sum() <= 0.02 * target.sum()
    gap = [a.nonzero().double().mean(0) for a in (seen & inside, target & inside)]
    assert (gap[0] - gap[1]).abs().max() < 0.25
