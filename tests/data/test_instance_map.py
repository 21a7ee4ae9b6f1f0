"""Instance maps of dataset dicts, against masks drawn by hand."""

import numpy as np
import pytest
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from unseg.data.instance_map import instance_index_map

SIZE = (6, 8)


def drawn(y0, y1, x0, x1):
    mask = np.zeros(SIZE, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def uncompressed(mask):
    flat = np.concatenate(([0], mask.ravel(order="F"), [0])).astype(int)
    runs = np.diff(np.concatenate(([0], np.flatnonzero(np.diff(flat)), [mask.size])))
    return {"size": list(mask.shape), "counts": [int(run) for run in runs]}


def annotation(segmentation, **fields):
    return (
        {"bbox": [0, 0, 1, 1], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        | fields
        | {"segmentation": segmentation}
    )


def compressed(mask):
    return mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))


def test_every_form_of_a_mask():
    first, second, third = drawn(0, 2, 0, 3), drawn(3, 6, 1, 4), drawn(2, 5, 5, 7)
    text = compressed(third)
    text["counts"] = text["counts"].decode()
    index_map = instance_index_map(
        [
            annotation([[0, 0, 3, 0, 3, 2, 0, 2]]),
            annotation(uncompressed(second)),
            annotation(text),
        ],
        *SIZE,
    )
    assert index_map.dtype == np.int32
    np.testing.assert_array_equal(index_map, first * 1 + second * 2 + third * 3)


def test_the_later_object_wins_and_crowds_are_left_out():
    first, crowd, last = drawn(0, 4, 0, 4), drawn(0, 6, 0, 8), drawn(2, 6, 2, 6)
    annotations = [
        annotation(compressed(first)),
        annotation(compressed(crowd), iscrowd=1),
        annotation(compressed(last), iscrowd=0),
    ]
    expected = np.where(last, 3, first)
    np.testing.assert_array_equal(instance_index_map(annotations, *SIZE), expected)
    np.testing.assert_array_equal(instance_index_map(annotations[1:2], *SIZE), np.zeros(SIZE))
    np.testing.assert_array_equal(instance_index_map([], *SIZE), np.zeros(SIZE))


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "annotation 1 has no segmentation"),
        ([], "annotation 1 has no segmentation"),
        ([[1, 2, 3, 4]], "annotation 1: .*three points"),
        ({"size": [6, 7], "counts": [42]}, r"annotation 1: .*\[6, 7\].*\[6, 8\]"),
        ({"size": [6, 8], "counts": [49]}, "annotation 1: .*48 pixels"),
    ],
)
def test_bad_masks_name_their_annotation(segmentation, message):
    annotations = [annotation(compressed(drawn(0, 1, 0, 1))), annotation(segmentation)]
    with pytest.raises(ValueError, match=message):
        instance_index_map(annotations, *SIZE)
