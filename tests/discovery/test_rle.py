"""Run-length encodings from files: valid ones are read exactly, malformed ones refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as mask_util

from unseg.discovery.rle import decode_counts, parse_segmentation

masks = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 70), st.integers(1, 70)), elements=st.integers(0, 1)
)


def slow_runs(mask):
    """Run lengths in column-major order, starting with background."""
    runs, value, length = [], 0, 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(length)
            value, length = pixel, 0
        length += 1
    return [*runs, length]


@given(masks)
def test_decode_counts_equals_counting(mask):
    counts = mask_util.encode(np.asfortranarray(mask))["counts"]
    assert decode_counts(counts).tolist() == slow_runs(mask)


def test_long_runs():
    mask = np.zeros((3000, 4000), dtype=np.uint8)
    mask[100:2000, 300:3900] = 1
    counts = mask_util.encode(np.asfortranarray(mask))["counts"]
    assert decode_counts(counts).tolist() == slow_runs(mask)


@given(masks)
def test_all_encodings_of_a_mask_agree(mask):
    height, width = mask.shape
    compressed = mask_util.encode(np.asfortranarray(mask))
    as_text = {"size": [height, width], "counts": compressed["counts"].decode()}
    as_list = {"size": [height, width], "counts": slow_runs(mask)}
    for segmentation in (compressed, as_text, as_list):
        rle = parse_segmentation(segmentation, height, width)
        assert np.array_equal(mask_util.decode(rle), mask)


def test_polygons():
    rle = parse_segmentation([[1, 1, 5, 1, 5, 4, 1, 4]], 6, 8)
    expected = np.zeros((6, 8), dtype=np.uint8)
    expected[1:4, 1:5] = 1
    assert np.array_equal(mask_util.decode(rle), expected)


@given(st.binary(max_size=30))
def test_random_counts_are_read_or_refused(counts):
    try:
        rle = parse_segmentation({"size": [7, 9], "counts": counts}, 7, 9)
    except ValueError:
        return
    assert mask_util.decode(rle).shape == (7, 9)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ("abc", "neither polygons nor"),
        ({"size": [4, 4]}, "neither polygons nor"),
        ({"size": [4, 5], "counts": [16]}, "size is"),
        ({"size": [4, 4], "counts": [15]}, "15 pixels, the image has 16"),
        ({"size": [4, 4], "counts": [20, -4]}, "cover"),
        ({"size": [4, 4], "counts": ["x"]}, "not an integer"),
        ({"size": [4, 4], "counts": 7}, "is a int"),
        ({"size": [4, 4], "counts": "\x00"}, "characters"),
        ({"size": [4, 4], "counts": "PPPPPPPPPPPP0"}, "more than 40 bits"),
        ({"size": [4, 4], "counts": "P"}, "middle of a number"),
        ([], "empty list"),
        ([[1, 2, 3, 4]], "polygon"),
        ([[1, 2, 3, 4, 5, float("nan")]], "polygon"),
    ],
)
def test_malformed_segmentations_are_refused(segmentation, message):
    with pytest.raises(ValueError, match=message):
        parse_segmentation(segmentation, 4, 4)
