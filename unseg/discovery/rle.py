"""Reading COCO run-length encodings from files that may hold anything.

pycocotools trusts its input in places (it reads past a mask whose runs are too long), so masks from
a file are checked here first.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from unseg.layers import run_lengths
from unseg.structures import RLE

_CHECKED_AT_ONCE = 1 << 20  # characters


def covers(counts: Sequence[bytes], pixels: Sequence[int]) -> np.ndarray:
    """Which compressed strings are well formed and cover so many pixels: bool (N,).

    Some million strings a minute: as many are looked at together as make up a megabyte.
    """
    result = np.zeros(len(counts), bool)
    totals = np.asarray(pixels, dtype=np.int64)
    offsets = np.concatenate(([0], np.cumsum([len(c) for c in counts], dtype=np.int64)))
    begin = 0
    while begin < len(counts):
        limit = offsets[begin] + _CHECKED_AT_ONCE
        end = max(begin + 1, int(np.searchsorted(offsets, limit, side="right")) - 1)
        text = np.frombuffer(b"".join(counts[begin:end]), np.uint8)
        own = offsets[begin : end + 1] - offsets[begin]
        runs, starts, well_formed = run_lengths.parse(text, own)
        sums = np.concatenate(([0], np.cumsum(runs)))[starts]
        result[begin:end] = well_formed & (np.diff(sums) == totals[begin:end])
        begin = end
    return result


def parse_segmentation(segmentation: Any, height: int, width: int) -> RLE:
    """A checked, compressed encoding of a COCO segmentation.

    Args:
        segmentation: compressed encoding (counts str or bytes), uncompressed encoding (counts
            list) or a list of polygons.
        height, width: size of the image in pixels.

    Raises:
        ValueError: it is none of these, is malformed, or is not of the size of the image.
    """
    rle = read_segmentation(segmentation, height, width)
    if not covers([rle["counts"]], [height * width])[0]:
        raise malformed_counts(height, width)
    return rle


def malformed_counts(height: int, width: int) -> ValueError:
    """What is wrong with counts that :func:`covers` refuses."""
    return ValueError(
        f"segmentation.counts are malformed or do not cover the image's {height * width} pixels"
    )


def read_segmentation(segmentation: Any, height: int, width: int) -> RLE:
    """As :func:`parse_segmentation`, but compressed counts must still pass :func:`covers`.

    Raises:
        ValueError: anything else is wrong.
    """
    if isinstance(segmentation, list):
        return _from_polygons(segmentation, height, width)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError("segmentation is neither polygons nor a dict with 'size' and 'counts'")
    size, counts = segmentation["size"], segmentation["counts"]
    if size != [height, width]:
        raise ValueError(f"segmentation.size is {size}, the image is {[height, width]}")
    if isinstance(counts, str | bytes):
        return {"size": [height, width], "counts": run_lengths.to_bytes(counts)}
    if not isinstance(counts, list):
        raise ValueError(f"segmentation.counts is a {type(counts).__name__}")
    if not all(isinstance(run, int) for run in counts):
        raise ValueError("segmentation.counts holds something that is not an integer")
    if any(run < 0 for run in counts) or sum(counts) != height * width:
        raise malformed_counts(height, width)
    return mask_util.frPyObjects({"size": size, "counts": counts}, height, width)


def _from_polygons(polygons: list, height: int, width: int) -> RLE:
    for polygon in polygons:
        numbers = isinstance(polygon, list) and all(
            isinstance(x, int | float) and np.isfinite(x) for x in polygon
        )
        if not numbers or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("segmentation holds a polygon that is not x, y pairs of three points")
    if not polygons:
        raise ValueError("segmentation is an empty list of polygons")
    # Far-away points would make pycocotools allocate one entry per crossed pixel.
    limit = np.array([width, height], dtype=float)
    clipped = [
        np.clip(np.reshape(p, (-1, 2)), -limit, 2 * limit).ravel().tolist() for p in polygons
    ]
    return mask_util.merge(mask_util.frPyObjects(clipped, height, width))
