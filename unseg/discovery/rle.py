"""Reading COCO run-length encodings from files that may hold anything.

pycocotools trusts its input in places (it reads past a mask whose runs are too long), so masks from
a file are checked here first.
"""

from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from unseg.structures import RLE


def decode_counts(counts: bytes) -> np.ndarray:
    """Run lengths of a compressed COCO string, background first, as int64.

    The format: five bits a character (offset 48), low bits first, bit 5 says that more follow, the
    top bit of the last character is the sign; from the fourth run on, differences to the run
    two places before.

    Raises:
        ValueError: a character outside the alphabet, or an unfinished number.
    """
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    if len(codes) == 0:
        return np.zeros(0, dtype=np.int64)
    if codes.min() < 0 or codes.max() > 63:
        raise ValueError("counts hold characters that run-length encodings do not use")
    last = (codes & 32) == 0
    if not last[-1]:
        raise ValueError("counts end in the middle of a number")
    ends = np.flatnonzero(last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 8:
        raise ValueError("counts hold a number of more than 40 bits")
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    runs = np.where(codes[ends] & 16, runs - (np.int64(1) << (5 * lengths)), runs)
    # Undo the differences: the chains 2, 4, 6, ... and 1, 3, 5, ... are running sums.
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs


def parse_segmentation(segmentation: Any, height: int, width: int) -> RLE:
    """A checked, compressed encoding of a COCO segmentation.

    Args:
        segmentation: compressed encoding (counts str or bytes), uncompressed encoding (counts
            list) or a list of polygons.
        height, width: size of the image in pixels.

    Raises:
        ValueError: it is none of these, is malformed, or is not of the size of the image.
    """
    if isinstance(segmentation, list):
        return _from_polygons(segmentation, height, width)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError("segmentation is neither polygons nor a dict with 'size' and 'counts'")
    size, counts = segmentation["size"], segmentation["counts"]
    if size != [height, width]:
        raise ValueError(f"segmentation.size is {size}, the image is {[height, width]}")
    if isinstance(counts, list):
        if not all(isinstance(run, int) for run in counts):
            raise ValueError("segmentation.counts holds something that is not an integer")
        runs = np.asarray(counts, dtype=np.int64)
    elif isinstance(counts, str | bytes):
        counts = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
        runs = decode_counts(counts)
    else:
        raise ValueError(f"segmentation.counts is a {type(counts).__name__}")
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(
            f"segmentation.counts cover {int(runs.sum())} pixels, the image has {height * width}"
        )
    if isinstance(counts, list):
        return mask_util.frPyObjects({"size": size, "counts": counts}, height, width)
    return {"size": [height, width], "counts": counts}


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
    limit = np.array([width, height] * 1, dtype=float)
    clipped = [
        np.clip(np.reshape(p, (-1, 2)), -limit, 2 * limit).ravel().tolist() for p in polygons
    ]
    return mask_util.merge(mask_util.frPyObjects(clipped, height, width))
