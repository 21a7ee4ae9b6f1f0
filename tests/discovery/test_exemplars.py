"""Exemplars: objects found, cut out and chosen; against images whose objects are known."""

import threading
from dataclasses import replace

import cv2
import numpy as np
import pytest
from detectron2.config import get_cfg
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_sample_image

from unseg.config import add_unseg_config
from unseg.discovery import (
    ExemplarError,
    ExemplarSettings,
    categories_in_folder,
    choose_medoids,
    choose_random,
    coarse_foreground,
    cut_out,
)

DEFAULT = ExemplarSettings()


def ellipse(height, width, cy, cx, ry, rx):
    y, x = np.mgrid[:height, :width]
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1


def scene(height, width, mask, seed=0):
    """A noisy orange object on noisy bluish ground."""
    colours = np.where(mask[..., None], (210, 120, 40), (60, 90, 140))
    noise = np.random.default_rng(seed).normal(0, 12, (height, width, 3))
    return (colours + noise).clip(0, 255).astype(np.uint8)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def no_masks(crop):
    return np.zeros((0, *crop.shape[:2]), bool), np.zeros(0, np.float32)


def returns(masks, scores):
    return lambda crop: (np.array(masks), np.array(scores, dtype=np.float32))


# --- coarse foreground ---


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((60, 80), (30, 35, 14, 20)),
        ((90, 50), (40, 25, 30, 12)),
        ((700, 1000), (300, 600, 180, 250)),  # larger than what GrabCut is given
        ((1400, 300), (600, 150, 300, 70)),
    ],
)
def test_the_object_is_found(size, shape):
    truth = ellipse(*size, *shape)
    found = coarse_foreground(scene(*size, truth), DEFAULT)
    assert found.shape == size
    assert found.dtype == bool
    assert iou(found, truth) > 0.97


def test_the_flower_of_a_photograph_is_found():
    photograph = load_sample_image("flower.jpg")[::2, ::2]  # not contiguous
    flower = ellipse(214, 320, 111, 154, 68, 69)  # measured by eye
    assert iou(coarse_foreground(photograph, DEFAULT), flower) > 0.95


def test_the_sizes_that_grabcut_sees(monkeypatch):
    seen = []
    grabcut = cv2.grabCut
    monkeypatch.setattr(cv2, "grabCut", lambda *a: seen.append(a[0].shape) or grabcut(*a))
    truth = ellipse(600, 1500, 300, 700, 150, 300)
    coarse_foreground(scene(600, 1500, truth), DEFAULT)
    coarse_foreground(scene(60, 80, ellipse(60, 80, 30, 40, 15, 20)), DEFAULT)
    # Nor fewer pixels within the border than its colour models have components.
    for size in ((2, 50), (3, 3), (4, 4), (3, 6), (3, 7)):
        coarse_foreground(np.zeros((*size, 3), np.uint8), DEFAULT)
    assert seen == [(205, 512, 3), (60, 80, 3), (3, 7, 3)]


def test_equal_images_give_equal_masks_whatever_ran_before():
    photograph = np.ascontiguousarray(load_sample_image("china.jpg")[::4, ::4])
    height, width = photograph.shape[:2]
    areas = set()
    for seed in range(4):  # OpenCV alone: it does depend on that, for this image
        labels = np.zeros((height, width), np.uint8)
        cv2.setRNGSeed(seed)
        cv2.grabCut(photograph, labels, (16, 11, 128, 85), None, None, 5, cv2.GC_INIT_WITH_RECT)
        areas.add(int((labels % 2).sum()))
    assert len(areas) > 1
    found = []

    def find():
        found.append(coarse_foreground(photograph, DEFAULT))

    threads = cv2.getNumThreads()
    try:
        for seed in range(2):
            cv2.setRNGSeed(seed)
            cv2.randu(np.zeros(seed + 1), 0, 1)
            cv2.setNumThreads(1 + 3 * seed)
            find()
    finally:
        cv2.setNumThreads(threads)
    thread = threading.Thread(target=find)  # where OpenCV has another generator
    thread.start()
    thread.join()
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_the_image_is_left_as_it_is():
    image = scene(60, 80, ellipse(60, 80, 30, 40, 15, 20))
    image.setflags(write=False)
    coarse = coarse_foreground(image, DEFAULT)
    cut_out(image, coarse, no_masks, DEFAULT)


@pytest.mark.parametrize("size", [(60, 80), (600, 150)])
def test_an_image_without_an_object_is_not_split(size):
    assert coarse_foreground(np.full((*size, 3), 130, np.uint8), DEFAULT) is None
    assert coarse_foreground(scene(*size, np.zeros(size, bool)), DEFAULT) is None


def test_an_object_that_fills_everything_within_the_border_is_not_split():
    # 80 % of the sides are within the border, and all of that is object: 64 % of the image.
    truth = np.zeros((100, 100), bool)
    truth[10:90, 10:90] = True
    image = scene(100, 100, truth)
    assert coarse_foreground(image, DEFAULT) is None
    found = coarse_foreground(image, replace(DEFAULT, max_foreground=1.0))
    assert iou(found, truth) > 0.99
    # A narrower border leaves ground within it: 80 x 80 of 90 x 90 pixels.
    assert iou(coarse_foreground(image, replace(DEFAULT, grabcut_margin=0.05)), truth) > 0.99


@pytest.mark.parametrize("margin", [0.1, 0.15])
def test_the_border_is_ground_for_sure(margin):
    truth = ellipse(100, 200, 50, 100, 42, 30)  # rows 8 to 92: a little of it is in the border
    found = coarse_foreground(scene(100, 200, truth), replace(DEFAULT, grabcut_margin=margin))
    rows = np.flatnonzero(found.any(axis=1))
    assert (rows[0], rows[-1]) == (100 * margin, 100 - 100 * margin - 1)


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 9),
    width=st.one_of(st.integers(1, 9), st.sampled_from([40, 513, 2000])),
    flip=st.booleans(),
    seed=st.integers(0, 99),
)
def test_images_of_a_few_pixels(height, width, flip, seed):
    size = (width, height) if flip else (height, width)
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = coarse_foreground(image, DEFAULT)
    if min(size) < 3:
        assert found is None
    if found is not None:
        assert found.shape == size
        assert found.any()
    made = cut_out(image, found, no_masks, replace(DEFAULT, short_side=16, max_side=32))
    assert made.image.shape[:2] == made.mask.shape
    assert made.mask.any()
    assert 1 <= min(made.mask.shape) <= 16
    assert max(made.mask.shape) <= 32


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((5, 5), np.uint8),
        np.zeros((5, 5, 4), np.uint8),
        np.zeros((5, 5, 3), np.float32),
        np.zeros((0, 5, 3), np.uint8),
    ],
)
def test_what_is_no_image(image):
    with pytest.raises(ValueError, match=r"image must be \(H, W, 3\) uint8"):
        coarse_foreground(image, DEFAULT)
    with pytest.raises(ValueError, match=r"image must be \(H, W, 3\) uint8"):
        cut_out(image, None, no_masks, DEFAULT)


# --- cutting out ---


def in_place(height, width, y0, y1, x0, x1):
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.mark.parametrize(
    ("coarse", "pad", "box"),
    [
        (in_place(40, 60, 10, 30, 20, 50), 0.0, (20, 10, 50, 30)),
        (in_place(40, 60, 10, 30, 20, 50), 0.1, (17, 8, 53, 32)),
        (in_place(40, 60, 10, 30, 20, 50), 0.5, (5, 0, 60, 40)),
        (in_place(40, 60, 39, 40, 0, 1), 0.1, (0, 39, 1, 40)),
        (in_place(40, 60, 0, 3, 0, 2) | in_place(40, 60, 30, 35, 50, 54), 0.0, (0, 0, 54, 35)),
        (None, 0.1, (0, 0, 60, 40)),
    ],
)
def test_the_crop_is_the_padded_box(coarse, pad, box):
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    seen = []

    def segment(crop):
        seen.append(crop)
        return no_masks(crop)

    made = cut_out(image, coarse, segment, replace(DEFAULT, crop_pad=pad))
    assert made.box == box
    assert all(type(side) is int for side in made.box)
    np.testing.assert_array_equal(seen[0], image[box[1] : box[3], box[0] : box[2]])


# In a 20 x 20 image, of which nothing is cropped and nothing resized.
ALL = replace(DEFAULT, crop_pad=1.0, short_side=20, max_side=20, background=(1, 2, 3))
COARSE = in_place(20, 20, 5, 15, 5, 15)
HALF = in_place(20, 20, 5, 15, 5, 10)  # IoU 0.5 with COARSE
MOST = in_place(20, 20, 5, 15, 5, 13)  # 0.8
AWAY = in_place(20, 20, 0, 4, 0, 20)  # 0
NONE = np.zeros((20, 20), bool)


@pytest.mark.parametrize(
    ("coarse", "masks", "scores", "expected", "mask_from"),
    [
        (COARSE, [HALF, MOST], [0.5, 0.5], MOST, "refined"),
        (COARSE, [HALF, MOST, AWAY], [0.9, 0.5, 1.0], HALF, "refined"),  # 0.45 > 0.40 > 0
        (COARSE, [HALF, MOST], [0.75, 0.5], MOST, "refined"),  # 0.375 < 0.40
        (COARSE, [AWAY, NONE], [0.9, 0.9], COARSE, "coarse"),
        (COARSE, [HALF], [0.0], COARSE, "coarse"),
        (COARSE, [HALF], [-1.0], COARSE, "coarse"),
        (COARSE, np.zeros((0, 20, 20), bool), [], COARSE, "coarse"),
        (None, [HALF, AWAY, MOST], [0.5, 0.8, 0.7], AWAY, "refined"),
        (None, [HALF, NONE], [0.1, 0.9], HALF, "refined"),
        (None, [NONE, HALF, MOST], [0.9, 0.5, 0.6], MOST, "refined"),
        (None, [NONE], [0.9], ~NONE, "whole"),
        (None, np.zeros((0, 20, 20), bool), [], ~NONE, "whole"),
    ],
)
def test_the_mask_that_is_chosen(coarse, masks, scores, expected, mask_from):
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    made = cut_out(image, coarse, returns(masks, scores), ALL)
    assert made.mask_from == mask_from
    np.testing.assert_array_equal(made.mask, expected)
    np.testing.assert_array_equal(made.image[expected], image[expected])
    assert (made.image[~expected] == (1, 2, 3)).all()


@pytest.mark.parametrize(
    ("min_iou", "expected", "mask_from"),
    [
        (0.5, HALF, "refined"),
        (0.51, MOST, "refined"),
        (0.8, MOST, "refined"),
        (0.81, COARSE, "coarse"),
    ],
)
def test_the_least_overlap_with_the_coarse_mask(min_iou, expected, mask_from):
    image = np.zeros((20, 20, 3), np.uint8)
    found = returns([AWAY, HALF, MOST], [1.0, 0.9, 0.5])
    made = cut_out(image, COARSE, found, replace(ALL, min_iou=min_iou))
    assert made.mask_from == mask_from
    np.testing.assert_array_equal(made.mask, expected)


def test_the_coarse_mask_is_compared_within_the_crop():
    image = np.zeros((40, 40, 3), np.uint8)
    coarse = in_place(40, 40, 10, 20, 20, 30)
    settings_ = replace(DEFAULT, crop_pad=0.2, short_side=14, max_side=14)
    left, right = in_place(14, 14, 0, 14, 0, 5), in_place(14, 14, 2, 12, 2, 11)
    made = cut_out(image, coarse, returns([left, right], [0.9, 0.9]), settings_)
    assert made.box == (18, 8, 32, 22)
    np.testing.assert_array_equal(made.mask, right)


@pytest.mark.parametrize(
    ("crop", "short", "longest", "size"),
    [
        ((30, 60), 90, 180, (90, 180)),
        ((30, 60), 90, 100, (50, 100)),
        ((60, 30), 15, 180, (30, 15)),
        ((3, 500), 64, 128, (1, 128)),
        ((500, 1), 64, 128, (128, 1)),
        ((1, 1), 64, 128, (64, 64)),
    ],
)
def test_the_size(crop, short, longest, size):
    image = np.full((*crop, 3), 50, np.uint8)
    made = cut_out(image, None, no_masks, replace(DEFAULT, short_side=short, max_side=longest))
    assert made.image.shape == (*size, 3)
    assert made.mask.shape == size
    assert (made.image == 50).all()
    assert made.mask.all()


def test_enlarged_and_shrunk_objects_stay_in_place():
    object_ = ellipse(120, 160, 60, 70, 40, 50)
    image = np.where(object_[..., None], np.uint8([200, 30, 30]), np.uint8(0))
    for factor in (0.25, 0.5, 2, 3):
        side = round(120 * factor)
        sized = replace(DEFAULT, short_side=side, max_side=1000, background=(0, 0, 250))
        made = cut_out(image, None, returns([object_], [1.0]), sized)
        # Centres of pixels: x of the large image is (x + 0.5) * factor - 0.5 of the small one.
        at = [(c + 0.5) * factor - 0.5 for c in (60, 70)]
        truth = ellipse(side, round(160 * factor), *at, 40 * factor, 50 * factor)
        assert iou(made.mask, truth) > 0.96
        blur = 2 * max(1, factor)  # colours mix at the edge
        inside = ellipse(*truth.shape, *at, 40 * factor - blur, 50 * factor - blur)
        outside = ~ellipse(*truth.shape, *at, 40 * factor + blur, 50 * factor + blur)
        assert (made.image[inside] == (200, 30, 30)).all()
        assert (made.image[outside] == (0, 0, 250)).all()


def test_enlarging_interpolates():
    image = np.repeat(np.uint8([[[0], [100]]]), 3, axis=2)
    made = cut_out(image, None, no_masks, replace(DEFAULT, short_side=4, max_side=8))
    # Centres of the 8 pixels in units of the 2: -0.375, -0.125, 0.125, ..., 1.375.
    assert made.image[0, :, 0].tolist() == pytest.approx([0, 0, 13, 38, 63, 88, 100, 100], abs=1)


def test_shrinking_averages():
    # A mask of 3 x 3 blocks with 4, 5 and 9 of 9 pixels: at least half is object.
    mask = np.zeros((3, 9), bool)
    mask.reshape(3, 3, 3)[:, 2] = True
    mask[0, 0:3] = mask[1, 0] = True
    mask[0, 3:6] = mask[1, 3:5] = True
    image = np.zeros((3, 9, 3), np.uint8)
    image[:, 6:] = np.arange(9, dtype=np.uint8).reshape(3, 3, 1)  # mean 4
    made = cut_out(image, None, returns([mask], [1.0]), replace(DEFAULT, short_side=1, max_side=3))
    assert made.mask.tolist() == [[False, True, True]]
    assert made.image[0, 2].tolist() == [4, 4, 4]


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    short=st.integers(1, 40),
    data=st.data(),
)
def test_a_mask_of_one_pixel_is_not_lost(height, width, short, data):
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    mask = in_place(height, width, y, y + 1, x, x + 1)
    small = replace(DEFAULT, short_side=short, max_side=40)
    made = cut_out(np.zeros((height, width, 3), np.uint8), None, returns([mask], [0.5]), small)
    assert made.mask_from == "refined"
    ys, xs = np.nonzero(made.mask)
    assert len(ys)
    # It lies where the pixel lay, within a pixel of the coarser grid.
    for found, at, new, old in (
        (ys, y, made.mask.shape[0], height),
        (xs, x, *made.mask.shape[1:], width),
    ):
        factor = new / old
        assert (np.abs((found + 0.5) / factor - (at + 0.5)) <= 1.01 * max(1, 1 / factor)).all()


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (returns(np.zeros((2, 20, 20), np.uint8), [1, 1]), "bool"),
        (returns(np.zeros((2, 20, 19), bool), [1, 1]), r"\(2, 20, 20\)"),
        (returns(np.zeros((2, 20, 20), bool), [1]), r"\(1, 20, 20\)"),
        (returns(np.ones((1, 20, 20), bool), [np.nan]), "finite"),
        (returns(np.ones((1, 20, 20), bool), [[1]]), "finite"),
    ],
)
def test_a_segmenter_that_returns_something_else(segment, message):
    with pytest.raises(ValueError, match=f"segment must return .*{message}"):
        cut_out(np.zeros((20, 20, 3), np.uint8), None, segment, ALL)


@pytest.mark.parametrize("coarse", [NONE, COARSE.astype(np.uint8), COARSE[:10]])
def test_what_is_no_coarse_mask(coarse):
    with pytest.raises(ValueError, match="coarse must be a mask"):
        cut_out(np.zeros((20, 20, 3), np.uint8), coarse, no_masks, ALL)


# --- settings ---


def config(*options):
    cfg = get_cfg()
    add_unseg_config(cfg)
    cfg.merge_from_list(list(options))
    return cfg


def test_the_config_has_the_defaults():
    assert ExemplarSettings.from_config(config()) == DEFAULT  # Detectron2's means, in BGR


def test_settings_come_from_the_config():
    cfg = config(
        "INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [1.6, 2.4, 30.0],
        "MODEL.EXEMPLAR.BUILD.GRABCUT_ITERATIONS", 2, "MODEL.EXEMPLAR.BUILD.GRABCUT_MARGIN", 0.2,
        "MODEL.EXEMPLAR.BUILD.MAX_FOREGROUND", 0.5, "MODEL.EXEMPLAR.BUILD.CROP_PAD", 0.3,
        "MODEL.EXEMPLAR.BUILD.SHORT_SIDE", 64, "MODEL.EXEMPLAR.BUILD.MAX_SIDE", 100,
        "MODEL.EXEMPLAR.BUILD.MIN_IOU", 0.4,
    )  # fmt: skip
    expected = ExemplarSettings(2, 0.2, 0.5, 0.3, 0.4, 64, 100, (2, 2, 30))
    assert ExemplarSettings.from_config(cfg) == expected
    cfg.INPUT.FORMAT = "BGR"
    assert ExemplarSettings.from_config(cfg).background == (30, 2, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.EXEMPLAR.BUILD.GRABCUT_ITERATIONS", 0),
        ("MODEL.EXEMPLAR.BUILD.GRABCUT_MARGIN", 0.0),
        ("MODEL.EXEMPLAR.BUILD.GRABCUT_MARGIN", 0.5),
        ("MODEL.EXEMPLAR.BUILD.MAX_FOREGROUND", 0.0),
        ("MODEL.EXEMPLAR.BUILD.MAX_FOREGROUND", 1.1),
        ("MODEL.EXEMPLAR.BUILD.CROP_PAD", -0.1),
        ("MODEL.EXEMPLAR.BUILD.CROP_PAD", float("nan")),
        ("MODEL.EXEMPLAR.BUILD.MIN_IOU", -0.1),
        ("MODEL.EXEMPLAR.BUILD.MIN_IOU", 1.1),
        ("MODEL.EXEMPLAR.BUILD.SHORT_SIDE", 0),
        ("MODEL.EXEMPLAR.BUILD.MAX_SIDE", 255),
        ("MODEL.PIXEL_MEAN", [1.0]),
        ("MODEL.PIXEL_MEAN", [1.0, 2.0, 256.0]),
        ("INPUT.FORMAT", "L"),
    ],
)
def test_settings_that_make_no_sense(key, value):
    with pytest.raises(ValueError, match=f"{key} must be"):
        ExemplarSettings.from_config(config(key, value))


# --- choosing images ---


def make_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_categories_are_folders(tmp_path):
    make_files(
        tmp_path,
        "newt/b.JPG", "newt/a 1.png", "newt/notes.txt", "newt/.hidden.png", "newt/sub/c.png",
        "cat/10.jpg", "cat/9.jpg",
        "README.md", ".cache/x.png",
    )  # fmt: skip
    (tmp_path / "newt" / "folder.png").mkdir()
    found = categories_in_folder(tmp_path, (".jpg", ".PNG"))
    assert found == {"cat": ["cat/10.jpg", "cat/9.jpg"], "newt": ["newt/a 1.png", "newt/b.JPG"]}
    assert list(found) == ["cat", "newt"]
    assert categories_in_folder(str(tmp_path), [".txt"] + [".jpg"])["newt"][1] == "newt/notes.txt"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["README.md"], "no class folders"),
        (["cat/1.jpg", "2.jpg", "3.jpg"], "2 do not, such as 2.jpg"),
        (["2.jpg"], "images must lie in class folders"),
        (["cat/1.jpg", "dog/x.txt"], "dog: no images"),
    ],
)
def test_folders_that_are_not_of_class_folders(tmp_path, names, message):
    make_files(tmp_path, *names)
    with pytest.raises(ExemplarError, match=message) as caught:
        categories_in_folder(tmp_path, (".jpg",))
    assert str(tmp_path) in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(ExemplarError, match=f"{tmp_path / 'x'}: no such folder"):
        categories_in_folder(tmp_path / "x", (".jpg",))


@settings(deadline=None)
@given(total=st.integers(1, 200), seed=st.integers(0, 2**32), data=st.data())
def test_random_images(total, seed, data):
    count = data.draw(st.integers(1, total))
    chosen = choose_random(total, count, seed)
    assert len(set(chosen)) == count
    assert chosen == sorted(chosen)
    assert set(chosen) <= set(range(total))
    assert all(type(index) is int for index in chosen)
    assert choose_random(total, count, seed) == chosen
    assert set(choose_random(total, data.draw(st.integers(1, count)), seed)) <= set(chosen)


def test_random_images_are_even():
    counts = np.bincount(np.concatenate([choose_random(10, 3, s) for s in range(1000)]))
    assert len(counts) == 10
    assert (np.abs(counts - 300) < 75).all()  # five standard deviations


def test_more_random_images_than_there_are():
    with pytest.raises(ExemplarError, match="8 .* 7 "):
        choose_random(7, 8, 0)
    with pytest.raises(ExemplarError, match="0 "):
        choose_random(7, 0, 0)


def blobs(seed, sizes, spread=0.05):
    """Points around distant centres, shuffled; and the centre that each belongs to."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = 10 * np.eye(len(sizes), 6)
    return (centres[labels] + rng.normal(0, spread, (len(labels), 6))).astype(np.float32), labels


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("per_cluster", [1, 3, 9])
def test_medoids_of_separate_clusters(seed, per_cluster):
    features, labels = blobs(seed, (5, 20, 11, 2))
    expected = []
    for cluster, label in enumerate((1, 2, 0, 3)):  # by falling size
        rows = np.flatnonzero(labels == label)
        mean = features[rows].astype(np.float64).mean(axis=0)
        rows = sorted(rows, key=lambda row: np.linalg.norm(features[row] - mean))
        if label != 3:  # in a pair both are equally far from their mean
            expected += [(cluster, int(row)) for row in rows[:per_cluster]]
    found = choose_medoids(features, 4, per_cluster, seed)
    assert [pair for pair in found if pair[0] < 3] == expected
    pair = [row for cluster, row in found if cluster == 3]
    assert len(pair) == min(per_cluster, 2)
    assert set(pair) <= set(np.flatnonzero(labels == 3).tolist())
    assert all(type(number) is int for pair in found for number in pair)
    # The same clusters from another start: the same order.
    assert [p for p in choose_medoids(features, 4, per_cluster, seed + 100) if p[0] < 3] == expected


def test_clusters_of_equal_size_count_by_their_first_image():
    features, labels = blobs(0, (4, 4, 4))
    first = [int(np.flatnonzero(labels == label)[0]) for label in range(3)]
    for seed in range(5):
        found = [labels[row] for _, row in choose_medoids(features, 3, 1, seed)]
        assert found == sorted(range(3), key=lambda label: first[label])


def test_equal_seeds_give_equal_medoids():
    features = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    assert choose_medoids(features, 7, 3, 5) == choose_medoids(features.copy(), 7, 3, 5)
    found = choose_medoids(features, 7, 3, 5)
    assert len({row for _, row in found}) == len(found) == 21


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_equal_images():
    features = np.repeat(np.eye(2, dtype=np.float32), (3, 4), axis=0)
    assert choose_medoids(features, 5, 2, 0) == [(0, 3), (0, 4), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("features", "clusters", "per_cluster", "message"),
    [
        (np.zeros((3, 2)), 4, 1, "4 clusters .* 3 images"),
        (np.zeros((3, 2)), 0, 1, "0 clusters"),
        (np.zeros((3, 2)), 2, 0, "0 images each"),
        (np.zeros(3), 1, 1, r"\(images, C\)"),
        (np.full((3, 2), np.nan), 1, 1, "finite"),
    ],
)
def test_medoids_of_nothing(features, clusters, per_cluster, message):
    with pytest.raises(ExemplarError, match=message):
        choose_medoids(features, clusters, per_cluster, 0)
