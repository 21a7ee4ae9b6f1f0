"""Relations of masks against sets of cells, and what is drawn against the rules, by loops."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from relation_cases import SmallBatch, random_batch, relations_by_sets

from unseg.modeling.losses import (
    MaskRelations,
    hierarchy_pairs,
    mask_relations,
    object_pairs,
    sample_mask_triplets,
    sample_negatives,
    sample_object_triplets,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def interpolate(soft, x, y):
    """Bilinear value between cell centres (whole numbers); 0 beyond the outermost cells."""
    left, top = math.floor(x), math.floor(y)
    value = 0.0
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < len(soft) and 0 <= column < len(soft):
                value += (1 - abs(x - column)) * (1 - abs(y - row)) * soft[row, column]
    return value


def paste_by_loops(soft, box, size, stride):
    grid = np.zeros((math.ceil(size[0] / stride), math.ceil(size[1] / stride)), dtype=bool)
    m, (x0, y0, x1, y1) = len(soft), box
    for row in range(grid.shape[0]):
        for column in range(grid.shape[1]):
            x = ((column + 0.5) * stride - x0) / (x1 - x0) * m - 0.5
            y = ((row + 0.5) * stride - y0) / (y1 - y0) * m - 0.5
            grid[row, column] = interpolate(soft, x, y) >= 0.5
    return grid


def smooth_masks(rng, n, m=28):
    """Probabilities that fall off around a centre, as mask heads give them."""
    y, x = np.mgrid[:m, :m] / m
    centres, sizes = rng.uniform(0.3, 0.7, (n, 2)), rng.uniform(0.05, 0.7, n)
    return np.stack(
        [
            1 / (1 + np.exp(20 * (np.hypot(x - cx, y - cy) - s)))
            for (cx, cy), s in zip(centres, sizes)
        ]
    ).reshape(n, m, m)


def random_boxes(rng, n, size):
    height, width = size
    first = rng.uniform(-0.1, 0.4, (n, 2)) * [width, height]
    sides = rng.uniform(0.3, 0.7, (n, 2)) * [width, height]
    return np.concatenate([first, first + sides], axis=1)


def assert_same(found, expected):
    assert found.valid.dtype == torch.bool
    assert found.area.dtype == found.image.dtype == torch.int64
    assert found.iou.dtype == found.containment.dtype == torch.float64
    for name in ("valid", "area", "iou", "containment", "image"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("stride", [1, 3, 4])
@pytest.mark.parametrize("channel", [False, True])
def test_relations_against_loops(stride, channel):
    rng = np.random.default_rng(stride)
    size = (13 * stride + 2, 15 * stride + 1)
    soft, boxes = smooth_masks(rng, 6), random_boxes(rng, 6, size)
    masks = [
        paste_by_loops(s, b, size, stride) for s, b in zip(soft, np.float32(boxes), strict=True)
    ]
    expected = relations_by_sets(masks, min_area=3)
    assert int(expected.valid.sum()) > 2
    assert ((expected.iou > 0) & (expected.iou < 1)).any()
    tensor = torch.from_numpy(soft).float()
    found = mask_relations(
        tensor[:, None] if channel else tensor, torch.from_numpy(boxes).float(), size, stride, 3
    )
    assert_same(found, expected)


def test_whole_numbers():
    """Boxes full of mask: quotients are those of the boxes' cells, to the last digit."""
    boxes = torch.tensor([[0.0, 0, 40, 40], [0, 0, 40, 28], [8, 8, 24, 24], [60, 0, 80, 20]])
    found = mask_relations(torch.ones(4, 28, 28), boxes, (60, 90), 4, 16)
    assert found.area.tolist() == [100, 70, 16, 25]
    assert found.iou[0, 1] == 0.7  # the quotient in float64: 0.7 in float32 is another number
    assert found.containment[0, 1] == 1
    assert found.containment[1, 0] == 0.7
    assert found.containment[0, 2] == 1
    assert found.iou[0, 2] == 0.16
    assert found.iou[3].tolist() == [0, 0, 0, 1]
    assert found.valid.all()
    assert object_pairs(found, 0.7).tolist() == []  # more than, not at least
    assert object_pairs(found, math.nextafter(0.7, 0)).tolist() == [[0, 1], [1, 0]]
    assert hierarchy_pairs(found, 1.0, 1.0).tolist() == [[0, 1], [0, 2], [1, 2]]
    assert hierarchy_pairs(found, 1.0, 100 / 70).tolist() == [[0, 1], [0, 2], [1, 2]]
    assert hierarchy_pairs(found, 1.0, 1.43).tolist() == [[0, 2], [1, 2]]


def test_empty_small_and_flat_masks_are_invalid():
    soft = torch.ones(5, 28, 28)
    soft[1] = 0.49  # empty
    boxes = torch.tensor(
        [[0.0, 0, 40, 40], [0, 0, 40, 40], [8, 8, 20, 28], [8, 8, 8, 30], [50, 5, 90, 4]]
    )
    found = mask_relations(soft, boxes, (60, 90), 4, min_area=16)
    assert found.valid.tolist() == [True, False, False, False, False]
    assert found.area.tolist() == [100, 0, 15, 0, 0]
    assert found.iou.sum() == found.containment.sum() == 1
    assert hierarchy_pairs(found, 0.0, 1.0).tolist() == []
    assert mask_relations(soft, boxes, (60, 90), 4, min_area=15).valid.tolist()[2]
    # Without a least area empty ones are left out still.
    assert mask_relations(soft, boxes, (60, 90), 4, min_area=0).valid.tolist() == [
        True, False, True, False, False,
    ]  # fmt: skip


def test_dtypes_and_no_masks():
    soft = torch.rand(3, 1, 28, 28, generator=generator()).requires_grad_()
    boxes = torch.tensor([[0.0, 0, 40, 40], [10, 0, 40, 30], [5, 5, 24, 34]])
    found = mask_relations(soft.half(), boxes.double(), (40, 40))
    assert not found.iou.requires_grad
    assert_same(found, mask_relations(soft.half().float(), boxes, (40, 40)))
    empty = mask_relations(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), (40, 40))
    assert len(empty) == 0
    assert empty.iou.shape == empty.containment.shape == (0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 0}, "stride"),
        ({"min_area": -1}, "min_area"),
        ({"soft_masks": torch.ones(2, 3, 28, 28)}, "soft_masks"),
        ({"soft_masks": torch.ones(3, 28, 28)}, "boxes"),
        ({"soft_masks": torch.full((2, 28, 28), math.nan)}, "probabilities"),
        ({"soft_masks": torch.full((2, 28, 28), 1.5)}, "probabilities"),
        ({"boxes": torch.full((2, 4), math.nan)}, "boxes"),
        ({"boxes": torch.ones(2, 5)}, "boxes"),
        ({"image_size": (0, 30)}, "image_size"),
    ],
)
def test_bad_input(changes, message):
    boxes = torch.tensor([[0.0, 0, 9, 9]]).repeat(2, 1)
    arguments = {"soft_masks": torch.ones(2, 28, 28), "boxes": boxes, "image_size": (20, 30)}
    with pytest.raises(ValueError, match=message):
        mask_relations(**arguments | changes)


def test_batches():
    parts = random_batch(3).parts
    parts.insert(1, relations_by_sets([]))
    found = MaskRelations.cat(parts)
    start = 0
    for k, part in enumerate(parts):
        here = slice(start, start + len(part))
        assert torch.equal(found.iou[here, here], part.iou)
        assert torch.equal(found.containment[here, here], part.containment)
        assert torch.equal(found.valid[here], part.valid)
        assert torch.equal(found.area[here], part.area)
        assert (found.image[here] == k).all()
        start += len(part)
    assert len(found) == start
    other_image = found.image[:, None] != found.image
    assert not found.iou[other_image].any()
    assert not found.containment[other_image].any()
    with pytest.raises(ValueError, match="parts"):
        MaskRelations.cat([])


@given(st.integers(0, 100_000), st.sampled_from([0.0, 0.25, 0.4, 0.75]))
def test_pairs(seed, min_iou):
    batch = random_batch(seed)
    relations = MaskRelations.cat(batch.parts)
    pairs = object_pairs(relations, min_iou)
    assert [tuple(pair) for pair in pairs.tolist()] == batch.object_pairs(min_iou)
    for containment, ratio in ((0.95, 1.1), (1.0, 1.0), (0.5, 2.0), (0.0, 1.0)):
        found = hierarchy_pairs(relations, containment, ratio)
        expected = batch.hierarchy_pairs(containment, ratio)
        assert [tuple(pair) for pair in found.tolist()] == expected


@given(st.integers(0, 100_000), st.integers(1, 6))
def test_drawn_masks(seed, per_image):
    batch = random_batch(seed)
    drawn = sample_mask_triplets(MaskRelations.cat(batch.parts), generator(seed), per_image)
    assert drawn.dtype == torch.int64
    drawn = drawn.tolist()
    assert len(set(drawn)) == len(drawn)
    assert all(batch.valid[i] for i in drawn)
    count = Counter(batch.image[i] for i in drawn)
    for k in range(len(batch.parts)):
        valid = sum(v for v, image in zip(batch.valid, batch.image, strict=True) if image == k)
        assert count[k] == min(per_image, valid)


@given(
    st.integers(0, 100_000),
    st.sampled_from([0.2, 0.4]),
    st.sampled_from([0.0, 0.1, 0.6]),
    st.integers(1, 3),
)
def test_drawn_triplets(seed, min_iou, max_iou, per_pair):
    """They are by the rules, and each pair has as many different negatives as can be."""
    batch = random_batch(seed)
    relations = MaskRelations.cat(batch.parts)
    triplets = sample_object_triplets(
        relations, generator(seed), min_iou=min_iou, per_pair=per_pair, max_iou=max_iou
    )
    assert triplets.dtype == torch.int64
    assert triplets.shape[1] == 3
    drawn = Counter()
    for i, j, n in triplets.tolist():
        assert n in batch.negatives(i, j, max_iou)
        drawn[i, j] += 1
    assert len({tuple(t) for t in triplets.tolist()}) == len(triplets)
    expected = {p: len(batch.negatives(*p, max_iou)) for p in batch.object_pairs(min_iou)}
    assert drawn == Counter({p: min(n, per_pair) for p, n in expected.items() if n})


def test_the_positive_is_no_negative():
    """Though it overlaps by so little that as another's negative it would do."""
    masks = [block(0, 0, 6, 5), block(0, 3, 6, 8)]
    relations = MaskRelations.cat(SmallBatch([masks]).parts)
    assert relations.iou[0, 1] == 0.25
    options = {"min_iou": 0.2, "per_pair": 1, "max_iou": 0.3}
    assert len(object_pairs(relations, 0.2)) == 2
    assert sample_object_triplets(relations, generator(), **options).shape == (0, 3)


@pytest.fixture(scope="module")
def crowded():
    """A batch in which one pair has many allowed negatives, of its own and of other images."""
    for seed in range(100):
        batch = random_batch(seed)
        for i, j in batch.object_pairs(0.4):
            negatives = batch.negatives(i, j, 0.1)
            own = [n for n in negatives if batch.image[n] == batch.image[i]]
            if len(negatives) >= 9 and 2 <= len(own) < len(negatives) and not all(batch.valid):
                return batch, (i, j), negatives
    raise LookupError("no such batch")


def assert_uniform(counts, expected_keys, draws):
    """Chi-squared below its mean + 5 standard deviations."""
    assert set(counts) == set(expected_keys)
    mean = draws / len(expected_keys)
    statistic = sum((counts[key] - mean) ** 2 / mean for key in expected_keys)
    freedom = len(expected_keys) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("per_pair", [1, 3])
def test_all_allowed_negatives_are_drawn_alike(crowded, per_pair):
    batch, pair, negatives = crowded
    relations = MaskRelations.cat(batch.parts)
    pairs = torch.tensor([pair]).repeat(2000, 1)
    drawn = sample_negatives(relations, pairs, generator(), per_pair=per_pair, max_iou=0.1)
    assert len(drawn) == 2000 * per_pair
    assert_uniform(Counter(drawn[:, 2].tolist()), negatives, len(drawn))


def test_all_masks_are_drawn_alike():
    batch = random_batch(1)
    relations = MaskRelations.cat(batch.parts)
    own = generator()
    counts = [Counter() for _ in batch.parts]
    for _ in range(1500):
        for i in sample_mask_triplets(relations, own, 2).tolist():
            counts[batch.image[i]][i] += 1
    assert len(batch.parts) > 1
    for k, found in enumerate(counts):
        valid = [i for i in range(len(batch)) if batch.valid[i] and batch.image[i] == k]
        if valid:
            assert_uniform(found, valid, 1500 * min(2, len(valid)))


def test_the_generator_decides(crowded):
    batch, _, _ = crowded
    relations = MaskRelations.cat(batch.parts)
    options = {"min_iou": 0.4, "per_pair": 2, "max_iou": 0.1}

    def draw(source):
        return (
            sample_mask_triplets(relations, source, 2).tolist(),
            sample_object_triplets(relations, source, **options).tolist(),
        )

    state = torch.get_rng_state()
    first, source = draw(generator(5)), generator(5)
    assert draw(source) == first
    assert draw(source) != first
    assert draw(generator(6)) != first
    assert torch.equal(state, torch.get_rng_state())  # nobody else's numbers are used


def block(*corners, side=12):
    mask = np.zeros((side, side), dtype=bool)
    top, left, bottom, right = corners
    mask[top:bottom, left:right] = True
    return mask


def test_no_negative_no_triplet():
    """One image with an object found twice: nobody else is there."""
    twice = [block(0, 0, 6, 6), block(0, 0, 6, 5)]
    options = {"min_iou": 0.4, "per_pair": 2, "max_iou": 0.1}
    alone = MaskRelations.cat(SmallBatch([twice]).parts)
    assert len(object_pairs(alone, 0.4)) == 2
    assert sample_object_triplets(alone, generator(), **options).shape == (0, 3)
    # Masks of another image may be like them; small ones may not.
    others = SmallBatch([twice, [block(0, 0, 6, 6), block(0, 0, 1, 3)]])
    relations = MaskRelations.cat(others.parts)
    found = sample_object_triplets(relations, generator(), **options)
    assert found.tolist() == [[0, 1, 2], [1, 0, 2]]
    # A part of the anchor with a low IoU is not a negative, a neighbour is.
    parts = [*twice, block(0, 0, 2, 2), block(6, 0, 9, 6)]
    relations = MaskRelations.cat(SmallBatch([parts]).parts)
    assert relations.iou[0, 2] < 0.12
    found = sample_object_triplets(relations, generator(), **options | {"max_iou": 0.2})
    assert found.tolist() == [[0, 1, 3], [1, 0, 3]]


@pytest.mark.parametrize("images", [[[]], [[], []], [[block(0, 0, 5, 5)]], [[block(0, 0, 1, 1)]]])
def test_nothing_to_draw(images):
    relations = MaskRelations.cat(SmallBatch(images).parts)
    options = {"min_iou": 0.4, "per_pair": 2, "max_iou": 0.1}
    assert sample_object_triplets(relations, generator(), **options).shape == (0, 3)
    assert hierarchy_pairs(relations, 0.95, 1.1).shape == (0, 2)
    assert len(sample_mask_triplets(relations, generator(), 10)) == int(relations.valid.sum())


def test_random_batches_have_all_kinds():
    """The batches of these tests are worth something: most have pairs, negatives, small masks."""
    kinds = Counter()
    for seed in range(60):
        batch = random_batch(seed)
        pairs, wholes = batch.object_pairs(0.4), batch.hierarchy_pairs(0.95, 1.1)
        kinds["pairs"] += bool(pairs)
        kinds["hierarchy"] += bool(wholes)
        kinds["invalid"] += not all(batch.valid)
        kinds["dropped"] += any(not batch.negatives(*p, 0.1) for p in pairs)
        near = [n for i, j in pairs for n in batch.negatives(i, j, 0.1)]
        kinds["negatives"] += bool(near)
    assert min(kinds[k] for k in ("pairs", "hierarchy", "invalid", "negatives")) > 20, kinds
    assert kinds["dropped"] > 3, kinds
