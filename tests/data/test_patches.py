"""Which patches are drawn, against the paper's rule in loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
from pycocotools import mask as mask_util

from unseg.config import get_cfg
from unseg.data.patches import (
    PatchSettings,
    canonical_object_size,
    collect_objects,
    draw_negatives,
    draw_patches,
    draw_positive,
)
from unseg.structures import CanonicalRule

RULE = CanonicalRule(92)
SETTINGS = PatchSettings(RULE)
SIZE = (480, 640)


def annotation(x, y, w, h, size=SIZE, category=0, crowd=0):
    mask = np.zeros(size, np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    return {"segmentation": mask_util.encode(mask), "category_id": category, "iscrowd": crowd}


def objects_of(*boxes, settings=SETTINGS, size=SIZE, crowds=()):
    annotations = [annotation(*box, size=size) for box in boxes]
    annotations += [annotation(*box, size=size, crowd=1) for box in crowds]
    return collect_objects(annotations, size, settings)


def distances(square, box, object_size=92, window=192):
    """Shift in pixels of the patch and octaves from an object's canonical place (XYWH)."""
    x, y, w, h = box
    factor = square.side / window
    shift = max(
        abs(square.left + square.side / 2 - (x + w / 2)) / factor,
        abs(square.top + square.side / 2 - (y + h / 2)) / factor,
    )
    return shift, abs(math.log2(factor) - math.log2(max(w, h) / object_size))


def test_sizes_of_objects():
    assert canonical_object_size(160) == 92
    assert canonical_object_size(224) == 128
    assert canonical_object_size(160, 40) == 40


def test_settings_from_the_config():
    cfg = get_cfg()
    settings = PatchSettings.from_node(cfg.MODEL.DEEPMASK)
    assert settings == SETTINGS
    assert settings.window == 192
    assert settings.rule == CanonicalRule(92, 16.0, 0.25, 32.0, 1.0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("DATA.PATCHES_PER_IMAGE", 3, "PATCHES_PER_IMAGE .* not 3"),
        ("DATA.PATCHES_PER_IMAGE", 0, "PATCHES_PER_IMAGE .* not 0"),
        ("DATA.JITTER_SHIFT", 40.0, "JITTER_SHIFT.*farther"),
        ("DATA.NEG_SCALE", 0.1, "NEG_SCALE.*farther"),
        ("GT_SIZE", 0, "GT_SIZE must be positive"),
        ("CONTEXT", -2, "CONTEXT not negative"),
        ("TEST.SCALES", (), "TEST.SCALES is empty"),
    ],
)
def test_bad_settings_name_the_key(key, value, message):
    cfg = get_cfg()
    cfg.merge_from_list([f"MODEL.DEEPMASK.{key}", value])
    with pytest.raises(ValueError, match=message):
        PatchSettings.from_node(cfg.MODEL.DEEPMASK)


def test_the_specifications_example():
    still = replace(SETTINGS, rule=CanonicalRule(92, 0, 0))
    objects = objects_of((10, 20, 92, 40), settings=still)
    np.testing.assert_array_equal(objects.boxes, [[10, 20, 102, 60]])
    square = draw_positive(objects.boxes[0], still, np.random.default_rng(0))
    assert square.concentric_box(1) == (-40, -56, 152, 136)
    assert square.concentric_box(160 / 192) == (-24, -40, 136, 120)


@pytest.mark.parametrize("box", [(50, 40, 400, 300), (100, 30, 150, 420), (0, 0, 640, 480)])
def test_jitter_has_its_range_and_reaches_it(box):
    x, y, w, h = box
    rng = np.random.default_rng(0)
    corners = np.array([x, y, x + w, y + h], float)
    squares = [draw_positive(corners, SETTINGS, rng) for _ in range(2000)]
    factors = np.array([s.side / 192 for s in squares])
    centers = np.array([(s.left + s.side / 2, s.top + s.side / 2) for s in squares])
    shifts = (centers - [x + w / 2, y + h / 2]) / factors[:, None]
    octaves = np.log2(factors * 92 / max(w, h))
    # Squares are of whole pixels of the image: half a pixel is less than 0.2 of these patches.
    for values, limit, slack in [
        (shifts[:, 0], 16, 0.2),
        (shifts[:, 1], 16, 0.2),
        (octaves, 0.25, 0.002),
    ]:
        assert np.abs(values).max() <= limit + slack
        assert values.min() < -0.99 * limit
        assert values.max() > 0.99 * limit
        assert abs(values.mean()) < 0.06 * limit
        assert values.std() == pytest.approx(limit / 3**0.5, rel=0.05)  # uniform
    assert abs(np.corrcoef(shifts.T)[0, 1]) < 0.1
    assert abs(np.corrcoef(shifts[:, 0], octaves)[0, 1]) < 0.1


def test_positives_of_small_objects_stay_positive():
    """Rounding to pixels of the image moves them, by less than what separates negatives."""
    rng = np.random.default_rng(1)
    for box in [(100, 100, 10, 10), (7, 30, 25, 5), (300, 200, 11, 31)]:
        corners = np.array([box[0], box[1], box[0] + box[2], box[1] + box[3]], float)
        for _ in range(300):
            shift, octaves = distances(draw_positive(corners, SETTINGS, rng), box)
            assert shift <= 16 + 0.5 * 92 * 2**0.25 / max(box[2:]) * 1.1 < 32
            assert octaves < 0.35


def random_boxes(rng, count):
    size = np.exp2(rng.uniform(0, 8.5, (count, 2))).astype(int)
    start = rng.integers(0, [600, 440], (count, 2))
    size = np.minimum(size, np.array([640, 480]) - start).clip(1)
    return [tuple(int(v) for v in row) for row in np.hstack([start, size])]


@pytest.mark.parametrize("seed", range(6))
def test_negatives_are_far_from_all_objects(seed):
    rng = np.random.default_rng(seed)
    boxes = random_boxes(rng, 30)
    objects = objects_of(*boxes)
    squares = draw_negatives(objects, SETTINGS, rng, 40)
    assert len(squares) == 40
    for square in squares:
        for box in boxes:
            shift, octaves = distances(square, box)
            assert shift >= 32 or octaves >= 1


def test_windows_near_small_objects_are_no_negatives():
    """An object that is too small to be a positive still is an object."""
    size = (60, 60)
    settings = replace(SETTINGS, scales=(-4.6, -4.4))
    boxes = [(x, y, 4, 4) for x in range(0, 60, 6) for y in range(0, 60, 6)]
    objects = objects_of(*boxes, settings=settings, size=size)
    assert len(objects.boxes) == 100
    assert not objects.usable.any()
    squares = draw_negatives(objects, settings, np.random.default_rng(0), 100)
    assert squares
    for square in squares:
        assert all(max(distances(square, box)) >= 32 for box in boxes)
    everywhere = draw_negatives(objects_of(size=size), settings, np.random.default_rng(0), 300)
    near = [s for s in everywhere if min(distances(s, box)[0] for box in boxes) < 32]
    assert len(near) > 20


def test_negatives_come_from_the_places_of_test_time():
    squares = draw_negatives(objects_of(), SETTINGS, np.random.default_rng(0), 3000)
    scales = np.log2([s.side / 192 for s in squares])
    centers = np.array([(s.left + s.side / 2, s.top + s.side / 2) for s in squares])
    for values, low, high in [
        (scales, -0.5, 2.5),
        (centers[:, 0], 0, 640),
        (centers[:, 1], 0, 480),
    ]:
        reach = high - low
        assert low - 0.51 * (reach > 9) - 0.01 <= values.min() < low + 0.01 * reach
        assert high - 0.01 * reach < values.max() <= high + 0.51 * (reach > 9) + 0.01
        counts, _ = np.histogram(values, 6, (low - 1e-9, high + 1e-9))
        assert counts.min() > 400
        assert counts.max() < 600


def test_no_negative_is_centred_in_a_crowd():
    crowds = [(0, 0, 300, 480), (500, 100, 140, 100)]
    squares = draw_negatives(objects_of(crowds=crowds), SETTINGS, np.random.default_rng(0), 500)
    assert len(squares) == 500
    for square in squares:
        x = min(max(math.floor(square.left + square.side / 2), 0), 639)
        y = min(max(math.floor(square.top + square.side / 2), 0), 479)
        assert not any(a <= x < a + w and b <= y < b + h for a, b, w, h in crowds)


@pytest.mark.parametrize("count", [2, 4, 10])
def test_as_many_positives_as_negatives(count):
    settings = replace(SETTINGS, patches_per_image=count)
    objects = objects_of((10, 10, 90, 60), (300, 200, 150, 200), (5, 300, 4, 4), settings=settings)
    rng = np.random.default_rng(0)
    turns = []
    for _ in range(50):
        patches = draw_patches(objects, settings, rng)
        targets = [patch.target for patch in patches]
        assert len(targets) == count
        assert targets.count(-1) == count // 2
        assert set(targets) <= {-1, 0, 1}
        # Both objects come before one comes again.
        assert abs(targets.count(0) - targets.count(1)) <= (count // 2) % 2
        turns += targets
    assert 0.35 < turns.count(0) / (turns.count(0) + turns.count(1)) < 0.65
    assert {p.target for p in draw_patches(objects, settings, rng, target=1)} == {1, -1}


def test_squares_belong_to_their_objects():
    boxes = [(10, 10, 90, 60), (300, 200, 150, 200)]
    objects = objects_of(*boxes)
    rng = np.random.default_rng(3)
    for _ in range(100):
        for patch in draw_patches(objects, SETTINGS, rng):
            if patch.target >= 0:
                shift, octaves = distances(patch.square, boxes[patch.target])
                assert shift <= 17
                assert octaves < 0.26
            else:
                assert all(
                    shift >= 32 or octaves >= 1
                    for shift, octaves in (distances(patch.square, box) for box in boxes)
                )


def test_half_of_the_patches_are_flipped():
    objects = objects_of((10, 10, 90, 60))
    rng = np.random.default_rng(0)
    patches = [p for _ in range(500) for p in draw_patches(objects, SETTINGS, rng)]
    for positive in (True, False):
        flips = [p.flip for p in patches if (p.target >= 0) == positive]
        assert abs(np.mean(flips) - 0.5) < 0.06  # 1000 draws: 0.016


@pytest.mark.parametrize(
    "objects",
    [
        objects_of(),
        objects_of(crowds=[(0, 0, 200, 200)]),
        objects_of((3, 3, 4, 30), (50, 60, 9, 9), (100, 100, 1, 1)),
    ],
    ids=["nothing", "crowds", "small"],
)
def test_without_usable_objects_all_are_negative(objects):
    patches = draw_patches(objects, SETTINGS, np.random.default_rng(0))
    assert [patch.target for patch in patches] == [-1] * 4
    assert all(patch.square.left < 640 for patch in patches)


def test_without_room_for_negatives():
    """Positives, or plain grey; never a window whose label is in doubt."""
    settings = replace(SETTINGS, rule=CanonicalRule(92, neg_shift=1e6, neg_scale=99))
    patches = draw_patches(objects_of((10, 10, 90, 60)), settings, np.random.default_rng(0))
    assert [patch.target for patch in patches] == [0] * 4
    for objects in (objects_of((10, 10, 4, 4)), objects_of(crowds=[(0, 0, 640, 480)])):
        patches = draw_patches(objects, settings, np.random.default_rng(0))
        assert [patch.target for patch in patches] == [-1] * 4
        assert all(p.square.left >= 640 or p.square.top >= 480 for p in patches)


@pytest.mark.parametrize("neg_shift", [58.0, 68.0, 70.0])
def test_little_room_for_negatives(neg_shift):
    """What lacks is made up by positives. No window is farther away than 15 * 192 / 42 = 68.6."""
    box = (5, 5, 20, 20)
    crowds = [(0, 0, 30, 29)] if neg_shift == 68 else []  # leaves the last row
    objects = objects_of(box, size=(30, 30), crowds=crowds)
    settings = replace(
        SETTINGS,
        patches_per_image=40,
        rule=CanonicalRule(92, neg_shift=neg_shift),
        scales=(-2.21, -2.19),
    )
    rng = np.random.default_rng(0)
    for _ in range(10):
        patches = draw_patches(objects, settings, rng)
        assert len(patches) == 40
        for patch in patches:
            shift, _ = distances(patch.square, box)
            assert shift >= neg_shift if patch.target < 0 else shift < 30
        negatives = sum(patch.target < 0 for patch in patches)
        assert {58.0: negatives == 20, 68.0: 0 < negatives < 20, 70.0: negatives == 0}[neg_shift]


def test_equal_generators_draw_equal_patches():
    objects = objects_of((10, 10, 90, 60), (300, 200, 150, 200))
    draws = [draw_patches(objects, SETTINGS, np.random.default_rng(seed)) for seed in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]


def test_what_is_a_usable_object():
    square = [100, 100, 120, 100, 120, 120, 100, 120]
    outside = [[700, 10, 740, 10, 740, 60, 700, 60]]
    annotations = [
        annotation(0, 0, 0, 0),  # empty
        annotation(0, 0, 10, 10),
        annotation(20, 0, 11, 9),  # 99 pixels
        annotation(40, 0, 4, 90),  # narrow
        annotation(60, 0, 5, 20),
        annotation(0, 60, 100, 100, crowd=1),
        {"segmentation": [square], "category_id": 7, "bbox": [0, 0, 1, 1]},
        {"segmentation": outside, "category_id": 7},
        annotation(200, 200, 440, 280),  # to the border
        annotation(0, 0, 640, 480),
    ]
    objects = collect_objects(annotations, SIZE, SETTINGS)
    assert objects.numbers.tolist() == [1, 2, 3, 4, 6, 8, 9]
    assert objects.usable.tolist() == [True, False, False, True, True, True, True]
    expected = [
        (0, 0, 10, 10),
        (20, 0, 31, 9),
        (40, 0, 44, 90),
        (60, 0, 65, 20),
        (100, 100, 120, 120),
        (200, 200, 640, 480),
        (0, 0, 640, 480),
    ]
    np.testing.assert_allclose(objects.boxes, expected, atol=0)
    assert mask_util.area(objects.crowd) == 10000
    assert len(objects.masks) == 7


def test_other_categories_do_not_exist():
    annotations = [
        annotation(0, 0, 50, 50, category=3),
        annotation(100, 0, 50, 50, category=4),
        annotation(0, 100, 50, 50, category=4, crowd=1),
    ]
    objects = collect_objects(annotations, SIZE, SETTINGS, frozenset({3}))
    assert objects.numbers.tolist() == [0]
    assert objects.crowd is None
    objects = collect_objects(annotations, SIZE, SETTINGS, frozenset({4}))
    assert objects.numbers.tolist() == [1]
    assert objects.crowd is not None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"category_id": 0, "bbox": [0, 0, 9, 9]}, "annotation 1 has no segmentation"),
        ({"segmentation": []}, "annotation 1 has no segmentation"),
        ({"segmentation": [[0, 0, 5, 5]]}, "annotation 1: .*three points"),
        ({"segmentation": {"size": [480, 640], "counts": b"11"}}, "annotation 1: .*malformed"),
        ({"segmentation": {"size": [8, 8], "counts": [64]}}, "annotation 1: .*size"),
    ],
)
def test_malformed_annotations(bad, message):
    with pytest.raises(ValueError, match=message):
        collect_objects([annotation(0, 0, 9, 9), bad], SIZE, SETTINGS)
