"""Copy-paste against a slow transcription in numpy, pixel by pixel."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from unseg.modeling.solo import copy_paste as module
from unseg.modeling.solo.copy_paste import copy_paste


def make_objects(masks, number=0):
    """Objects with boxes (deliberately loose), classes, embeddings and scores of their own."""
    masks = torch.as_tensor(np.asarray(masks), dtype=torch.bool)
    objects = Instances(tuple(masks.shape[1:]))
    index = torch.arange(len(masks)) + number
    objects.gt_boxes = Boxes(torch.stack([index + k / 10 for k in range(4)], dim=1))
    objects.gt_classes = index
    objects.gt_masks = BitMasks(masks)
    objects.gt_embeddings = index[:, None] + torch.rand(len(masks), 5)
    objects.scores = torch.rand(len(masks))
    return objects


def random_case(rng, size, count, dtype=torch.float32, number=0):
    """An image of noise with `count` rectangles, which may overlap, as objects."""
    image = torch.from_numpy(rng.integers(0, 256, (3, *size))).to(dtype)
    masks = np.zeros((count, *size), dtype=bool)
    for mask in masks:
        y, x = rng.integers(0, size[0]), rng.integers(0, size[1])
        mask[y : y + rng.integers(1, size[0] + 1), x : x + rng.integers(1, size[1] + 1)] = True
    return image, make_objects(masks, number)


def slow_stretch(plane, size):
    """Bilinear, half-pixel centres, no antialiasing, borders repeated; float64."""
    out = np.empty(size)
    for i, j in np.ndindex(size):
        y = max((i + 0.5) * plane.shape[0] / size[0] - 0.5, 0)
        x = max((j + 0.5) * plane.shape[1] / size[1] - 0.5, 0)
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, plane.shape[0] - 1), min(x0 + 1, plane.shape[1] - 1)
        top = plane[y0, x0] * (x0 + 1 - x) + plane[y0, x1] * (x - x0)
        bottom = plane[y1, x0] * (x0 + 1 - x) + plane[y1, x1] * (x - x0)
        out[i, j] = top * (y0 + 1 - y) + bottom * (y - y0)
    return out


def slow_box(mask):
    ys, xs = np.nonzero(mask)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def slow_paste(image, target, source_image, source, chosen, max_overlap):
    """Image, masks, boxes, and which objects they are: ("target" or "source", index)."""
    image, size = image.numpy().copy(), tuple(image.shape[1:])
    stretched = np.stack([slow_stretch(plane, size) for plane in source_image.double().numpy()])
    existing = target.gt_masks.tensor.numpy().copy()
    pasted = []
    for index in chosen:
        mask = slow_stretch(source.gt_masks.tensor[index].double().numpy(), size) >= 0.5
        if mask.any() and all((mask & e).sum() < max_overlap * e.sum() for e in existing):
            pasted.append((index, mask))
    for _, mask in pasted:
        for y, x in zip(*np.nonzero(mask)):
            image[:, y, x] = np.rint(stretched[:, y, x]) if image.dtype == np.uint8 else (
                stretched[:, y, x]
            )  # fmt: skip
            existing[:, y, x] = False
    names, masks, boxes = [], [], []
    for index, mask in enumerate(existing):
        if mask.any():
            names.append(("target", index))
            masks.append(mask)
            boxes.append(slow_box(mask) if pasted else target.gt_boxes.tensor[index].tolist())
    for index, mask in pasted:
        names.append(("source", index))
        masks.append(mask)
        boxes.append(slow_box(mask))
    return image, np.array(masks, dtype=bool).reshape(-1, *size), boxes, names


def drawn(count):
    """Which objects the next call chooses, as documented: a uniform number, in random order."""
    wanted = int(torch.randint(count + 1, ()))
    return torch.randperm(count)[:wanted].tolist()


# Quotients of powers of two are exact in float32, so a threshold is one in both computations.
side = st.sampled_from([2, 4, 8, 16])
sizes = st.tuples(side, side)


@settings(max_examples=60)
@given(
    st.integers(0, 2**31),
    st.lists(st.tuples(sizes, sizes, st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=3),
    st.sampled_from([0.1, 0.5, 1.0, 2.0]),
    st.sampled_from([torch.float32, torch.uint8]),
    st.sampled_from([torch.float32, torch.uint8]),
)
def test_against_loops(seed, shapes, max_overlap, dtype, source_dtype):
    rng = np.random.default_rng(seed)
    targets = [random_case(rng, size, n, dtype) for size, _, n, _ in shapes]
    sources = [random_case(rng, size, m, source_dtype, number=100) for _, size, _, m in shapes]
    images, objects = zip(*targets)
    source_images, source_objects = zip(*sources)
    before = copy.deepcopy((images, objects, source_images, source_objects))
    torch.manual_seed(seed)
    new_images, new_objects = copy_paste(
        images, objects, source_images, source_objects, max_overlap=max_overlap
    )
    torch.manual_seed(seed)
    for b, (image, target, source_image, source) in enumerate(zip(*before)):
        chosen = drawn(len(source))
        expected, masks, boxes, names = slow_paste(
            image, target, source_image, source, chosen, max_overlap
        )
        found = new_objects[b]
        assert new_images[b].dtype == image.dtype
        assert np.array_equal(new_images[b].numpy(), expected)
        assert found.image_size == target.image_size
        assert np.array_equal(found.gt_masks.tensor.numpy(), masks)
        np.testing.assert_array_equal(found.gt_boxes.tensor.numpy().reshape(-1, 4),
                                      np.float32(boxes).reshape(-1, 4))  # fmt: skip
        owners = [(target if name == "target" else source, index) for name, index in names]
        for field in ("gt_classes", "gt_embeddings", "scores"):
            values = [o.get(field)[index] for o, index in owners]
            assert len(values) == len(found.get(field))
            assert all(torch.equal(x, y) for x, y in zip(values, found.get(field)))
        # The inputs are as they were.
        for old, new in ((target, objects[b]), (source, source_objects[b])):
            assert torch.equal(old.gt_masks.tensor, new.gt_masks.tensor)
            assert torch.equal(old.gt_boxes.tensor, new.gt_boxes.tensor)
        assert torch.equal(image, images[b])
        assert torch.equal(source_image, source_images[b])


@pytest.fixture
def choose(monkeypatch):
    """Fixes which objects are chosen, of every source."""
    return lambda *indices: monkeypatch.setattr(module, "_choose", lambda n: torch.tensor(indices))


def rectangle(y0, y1, x0, x1, size=(20, 20)):
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def blank(size=(20, 20), value=0.0):
    return torch.full((3, *size), value)


@pytest.mark.parametrize("sizes", [((31, 47), (20, 33)), ((20, 33), (31, 47)), ((7, 64), (64, 7))])
@pytest.mark.parametrize("seed", range(4))
def test_every_pixel_is_of_one_of_the_two_images(seed, sizes):
    rng = np.random.default_rng(seed)
    image, target = random_case(rng, sizes[0], 3)
    source_image, source = random_case(rng, sizes[1], 4, number=100)
    torch.manual_seed(seed)
    (pixels,), (objects,) = copy_paste([image], [target], [source_image], [source], max_overlap=0.9)
    stretched = F.interpolate(source_image[None], sizes[0], mode="bilinear")[0]
    is_pasted = objects.gt_classes >= 100
    region = objects.gt_masks.tensor[is_pasted].any(0)
    assert torch.equal(pixels[:, region], stretched[:, region])
    assert torch.equal(pixels[:, ~region], image[:, ~region])
    assert not (objects.gt_masks.tensor[~is_pasted] & region).any()


@pytest.mark.parametrize(
    ("covered", "max_overlap", "pasted"),
    [(9, 0.5, True), (10, 0.5, False), (12, 0.65, True), (13, 0.65, False), (20, 1.0, False)],
)
def test_overlap_is_a_part_of_the_target_object(choose, covered, max_overlap, pasted):
    choose(0)
    # 13 / 20 is 0.65 only if both are rounded alike.
    target = make_objects([rectangle(0, 1, 0, 20)])
    source = make_objects([rectangle(0, 20, 0, covered)], 100)
    (image,), (objects,) = copy_paste(
        [blank()], [target], [blank(value=1.0)], [source], max_overlap=max_overlap
    )
    assert objects.gt_classes.tolist() == ([0, 100] if pasted else [0])
    assert image.sum() == (3 * 20 * covered if pasted else 0)


def test_one_covered_object_is_enough_to_reject(choose):
    choose(0, 1)
    target = make_objects([rectangle(0, 20, 0, 10), rectangle(0, 2, 18, 20)])
    source = make_objects([rectangle(0, 10, 15, 20), rectangle(12, 20, 15, 20)], 100)
    _, (objects,) = copy_paste([blank()], [target], [blank()], [source])
    assert objects.gt_classes.tolist() == [0, 1, 101]


def test_objects_that_several_pastes_cover_are_dropped(choose):
    choose(0, 1, 2)
    target = make_objects([rectangle(0, 1, 0, 9), rectangle(5, 9, 5, 9)])
    source = make_objects([rectangle(0, 1, k, k + 3) for k in (0, 3, 6)], 100)
    _, (objects,) = copy_paste([blank()], [target], [blank()], [source])
    assert objects.gt_classes.tolist() == [1, 100, 101, 102]
    assert objects.gt_boxes.tensor[0].tolist() == [5, 5, 9, 9]


def test_pasted_objects_keep_overlapping_each_other(choose):
    choose(1, 0)
    source = make_objects([rectangle(0, 8, 0, 8), rectangle(4, 12, 4, 12)], 100)
    _, (objects,) = copy_paste([blank()], [make_objects(blank()[:0])], [blank()], [source])
    assert objects.gt_classes.tolist() == [101, 100]
    assert torch.equal(objects.gt_masks.tensor, source.gt_masks.tensor.flip(0))


def test_objects_that_vanish_when_stretched_are_not_pasted(choose):
    choose(0, 1)
    source = make_objects([rectangle(0, 1, 0, 1), rectangle(10, 20, 10, 20)], 100)
    target = make_objects(np.zeros((0, 4, 4)))
    _, (objects,) = copy_paste([blank((4, 4))], [target], [blank()], [source])
    assert objects.gt_classes.tolist() == [101]


def test_boxes_stay_where_nothing_is_pasted(choose):
    target = make_objects([rectangle(0, 10, 0, 10)])
    source = make_objects([rectangle(0, 10, 0, 10)], 100)
    loose = target.gt_boxes.tensor.clone()
    for chosen in ((), (0,)):  # none is chosen; the chosen one is rejected
        choose(*chosen)
        (image,), (objects,) = copy_paste([blank()], [target], [blank(value=1.0)], [source])
        assert torch.equal(objects.gt_boxes.tensor, loose)
        assert not image.any()


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("empty", [False, True])
def test_boxes_of_what_is_pasted_into_an_empty_image(choose, compat, empty):
    choose(1)
    masks = np.zeros((0, 10, 20)) if empty else [rectangle(8, 10, 0, 1, (10, 20))]
    source = make_objects([rectangle(0, 1, 0, 1), rectangle(4, 8, 10, 14)], 100)
    _, (objects,) = copy_paste(
        [blank((10, 20))], [make_objects(masks)], [blank()], [source], compat=compat
    )
    kept = compat and empty
    expected = source.gt_boxes.tensor[1] if kept else torch.tensor([10.0, 2, 14, 4])
    assert torch.equal(objects.gt_boxes.tensor[-1], expected)
    assert objects.gt_masks.get_bounding_boxes().tensor[-1].tolist() == [10, 2, 14, 4]


def test_images_without_objects():
    none = make_objects(np.zeros((0, 20, 20)))
    some = make_objects([rectangle(0, 5, 0, 5)])
    for seed in range(5):
        torch.manual_seed(seed)
        images, objects = copy_paste(
            [blank(), blank()], [none, some], [blank(value=1.0)] * 2, [none, none]
        )
        assert [len(o) for o in objects] == [0, 1]
        assert not any(image.any() for image in images)


def test_a_batch_tensor_and_fields_of_the_callers_own():
    target, source = make_objects([rectangle(0, 5, 0, 5)]), make_objects(
        [rectangle(10, 12, 0, 5)], 100
    )  # fmt: skip
    for objects in (target, source):
        objects.remove("gt_boxes")
        objects.gt_depth = torch.full((1, 2, 2), 7.0)
    for seed in range(20):
        torch.manual_seed(seed)
        images, found = copy_paste(
            torch.zeros(2, 3, 20, 20), [target] * 2, torch.ones(2, 3, 20, 20), [source] * 2
        )
        assert isinstance(images, list)
        for image, objects in zip(images, found):
            assert image.sum() == 30 * (len(objects) - 1)
            assert not objects.has("gt_boxes")
            assert objects.gt_depth.shape == (len(objects), 2, 2)


def test_number_and_choice_are_uniform_and_follow_the_seed():
    source = make_objects([rectangle(k, k + 1, 0, 5) for k in range(3)], 100)
    target = make_objects(np.zeros((0, 20, 20)))
    picks = []
    for seed in range(400):
        torch.manual_seed(seed)
        _, (objects,) = copy_paste([blank()], [target], [blank()], [source])
        picks.append(objects.gt_classes.tolist())
        if seed < 20:
            torch.manual_seed(seed)
            _, (again,) = copy_paste([blank()], [target], [blank()], [source])
            assert again.gt_classes.tolist() == picks[-1]
    assert all(len(set(p)) == len(p) for p in picks)
    numbers = np.bincount([len(p) for p in picks], minlength=4)
    # 100 each of 0, 1, 2 and 3 objects; each object in half of the images: four deviations.
    assert (np.abs(numbers - 100) < 35).all()
    assert (np.abs(np.bincount(sum(picks, []))[100:] - 200) < 40).all()


class CountReads(TorchDispatchMode):
    """Counts operations for which the host waits if tensors are on a GPU."""

    def __init__(self):
        super().__init__()
        self.sizes, self.values = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func is torch.ops.aten.index.Tensor else ()
        self.sizes += func is torch.ops.aten.nonzero.default
        self.sizes += any(i is not None and i.dtype == torch.bool for i in indices)
        self.values += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_waits_once_per_image(choose):
    choose(0)
    rng = np.random.default_rng(0)
    images, targets = zip(*(random_case(rng, (12, 9), 2) for _ in range(3)))
    sources, objects = zip(*(random_case(rng, (9, 15), 2, number=100) for _ in range(3)))
    with CountReads() as count:
        copy_paste(images, targets, sources, objects)
    assert (count.sizes, count.values) == (3, 0)


def test_errors():
    target, source = make_objects([rectangle(0, 5, 0, 5)]), make_objects([rectangle(0, 5, 0, 5)])
    with pytest.raises(ValueError, match=r"numbers differ: \(1, 1, 2, 1\)"):
        copy_paste([blank()], [target], [blank()] * 2, [source])
    with pytest.raises(ValueError, match="targets: masks"):
        copy_paste([blank((20, 21))], [target], [blank()], [source])
    with pytest.raises(ValueError, match="source_targets: masks"):
        copy_paste([blank()], [target], [blank((20, 21))], [source])
    source.remove("scores")
    with pytest.raises(ValueError, match="targets have the fields .*scores"):
        copy_paste([blank()], [target], [blank()], [source])
    source.remove("gt_masks")
    with pytest.raises(ValueError, match="source_targets have no field gt_masks"):
        copy_paste([blank()], [target], [blank()], [source])
