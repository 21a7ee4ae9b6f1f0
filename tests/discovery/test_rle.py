"""Run-length encodings from files: valid ones are read exactly, malformed ones refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as mask_util

from unseg.discovery import rle
from unseg.discovery.rle import covers, parse_segmentation
from unseg.layers import run_lengths

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


def parse(strings):
    offsets = np.cumsum([0, *map(len, strings)])
    runs, starts, well_formed = run_lengths.parse(
        np.frombuffer(b"".join(strings), np.uint8), offsets
    )
    return [runs[a:b].tolist() for a, b in zip(starts[:-1], starts[1:])], well_formed.tolist()


@given(st.lists(masks, max_size=4))
def test_runs_equal_counting(several):
    strings = [mask_util.encode(np.asfortranarray(mask))["counts"] for mask in several]
    assert parse(strings) == ([slow_runs(mask) for mask in several], [True] * len(several))


def test_long_runs():
    mask = np.zeros((3000, 4000), dtype=np.uint8)
    mask[100:2000, 300:3900] = 1
    counts = mask_util.encode(np.asfortranarray(mask))["counts"]
    assert parse([counts]) == ([slow_runs(mask)], [True])


@given(st.lists(st.one_of(masks, st.binary(max_size=12)), max_size=8), st.integers(1, 300))
def test_many_strings_are_judged_as_single_ones(several, at_once):
    """Neighbours and the size of the pieces change nothing; what is accepted decodes to itself."""
    strings, pixels = [], []
    for item in several:
        whole = isinstance(item, np.ndarray)
        strings.append(mask_util.encode(np.asfortranarray(item))["counts"] if whole else item)
        pixels.append(item.size if whole else 4)
    before, rle._CHECKED_AT_ONCE = rle._CHECKED_AT_ONCE, at_once
    try:
        found = covers(strings, pixels)
    finally:
        rle._CHECKED_AT_ONCE = before
    single = [bool(covers([s], [p])[0]) for s, p in zip(strings, pixels, strict=True)]
    assert found.tolist() == single
    for item, good, string in zip(several, single, strings, strict=True):
        if isinstance(item, np.ndarray):
            assert good
        elif good:
            decoded = mask_util.decode({"size": [2, 2], "counts": string})
            runs = parse([string])[0][0]
            values = np.repeat(np.arange(len(runs)) % 2, runs)
            assert decoded.T.ravel().tolist() == values.tolist()


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
        ({"size": [4, 4], "counts": [15]}, "do not cover the image's 16 pixels"),
        ({"size": [4, 4], "counts": [20, -4]}, "cover"),
        ({"size": [4, 4], "counts": ["x"]}, "not an integer"),
        ({"size": [4, 4], "counts": 7}, "is a int"),
        ({"size": [4, 4], "counts": "\x00"}, "malformed"),
        ({"size": [4, 4], "counts": "PPPPPPPPPPPP0"}, "malformed"),
        ({"size": [4, 4], "counts": "P"}, "malformed"),
        ({"size": [4, 4], "counts": "é0"}, "malformed"),
        ([], "empty list"),
        ([[1, 2, 3, 4]], "polygon"),
        ([[1, 2, 3, 4, 5, float("nan")]], "polygon"),
    ],
)
def test_malformed_segmentations_are_refused(segmentation, message):
    with pytest.raises(ValueError, match=message):
        parse_segmentation(segmentation, 4, 4)
