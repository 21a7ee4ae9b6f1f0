"""Statistics of pseudo-masks, and the warnings about degenerate ones."""

import json

import numpy as np
from pycocotools import mask as mask_util

from unseg.discovery.statistics import AREA_BINS, mask_statistics
from unseg.structures import ImageRecord, PseudoMask


def record(*pixels, size=(100, 100)):
    masks = []
    for y0, y1, x0, x1 in pixels:
        mask = np.zeros(size, dtype=np.uint8, order="F")
        mask[y0:y1, x0:x1] = 1
        masks.append(PseudoMask(mask_util.encode(mask), 1.0))
    return ImageRecord("a.jpg", *size, 1, masks)


def test_counts():
    statistics = mask_statistics(
        [record((10, 20, 10, 20), (0, 50, 0, 50)), record()], {"low score": 7, "empty": 0}
    )
    assert (statistics.images, statistics.masks, statistics.images_without_masks) == (2, 2, 1)
    expected = np.zeros(len(AREA_BINS), dtype=int)
    expected[AREA_BINS.index(0.01)] += 1  # 100 pixels are 1 % of the image
    expected[AREA_BINS.index(0.3)] += 1
    assert statistics.areas.tolist() == expected.tolist()
    assert statistics.warnings() == []
    assert "low score 7" in statistics.summary()
    assert "empty" not in statistics.summary().split("dropped")[1]


def test_json_has_all_counts_and_no_order():
    counts = {"low score": 7, "empty": 0, "a wide one": 2}
    records = [record((10, 20, 10, 20)), record()]
    written = [
        json.dumps(mask_statistics(records, dict(items)).to_json())
        for items in (counts.items(), reversed(counts.items()))
    ]
    assert written[0] == written[1]
    found = json.loads(written[0])
    assert (found["images"], found["masks"], sum(found["areas"])) == (2, 1, 1)
    assert found["dropped"] == {"a wide one": 2, "low score": 7}


def test_warnings_name_what_is_degenerate():
    good = record((10, 40, 10, 40))
    whole = record((0, 100, 0, 99))
    strip = record((0, 100, 0, 8), (95, 100, 5, 95))
    inner_strip = record((0, 100, 40, 48))
    assert mask_statistics([good, inner_strip]).warnings() == []
    (warning,) = mask_statistics([good, whole]).warnings()
    assert "1 of 2 masks cover nearly the whole image" in warning
    (warning,) = mask_statistics([good, strip]).warnings()
    assert "2 of 3 masks are strips" in warning
    (warning,) = mask_statistics([good, record(), record()]).warnings()
    assert "2 of 3 images have no mask" in warning
