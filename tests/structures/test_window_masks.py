"""Masks of windows, pasted as Detectron2 does or corner-aligned: all forms are the same pixels."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.layers import paste_masks_in_image
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_util

from unseg.layers import PackedMasks
from unseg.structures import WindowMasks, encode_masks, pasting

SIZE = (37, 53)


def slow_values(probabilities, box, size, align_corners):
    """Probability at every pixel's centre, float64, one pixel after the other."""
    cells = len(probabilities)
    soft = probabilities.double().tolist()

    def cell(y, x):
        return soft[y][x] if 0 <= y < cells and 0 <= x < cells else 0.0

    def place(pixel, first, last):
        if align_corners:
            step = (cells - 1) / (last - first - 1) if last - first > 1 else 0.0
            return min(max((pixel - first) * step, 0.0), cells - 1.0)
        return (pixel + 0.5 - first) / (last - first) * cells - 0.5

    def visible(pixel, first, last):
        if align_corners:
            return first <= pixel + 0.5 < last
        return math.floor(first) - 1 <= pixel < math.ceil(last) + 1

    x0, y0, x1, y1 = box.double().tolist()
    values = np.zeros(size)
    for row in range(size[0]):
        for column in range(size[1]):
            if not (visible(row, y0, y1) and visible(column, x0, x1)):
                continue
            y, x = place(row, y0, y1), place(column, x0, x1)
            top, left = math.floor(y), math.floor(x)
            for j in (top, top + 1):
                for i in (left, left + 1):
                    values[row, column] += cell(j, i) * (1 - abs(y - j)) * (1 - abs(x - i))
    return values


def random_windows(seed, count=6, cells=7, size=SIZE, whole=False):
    """Probabilities and windows of all sizes, some of which leave the image."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(count, cells, cells, generator=generator)
    corners = (torch.rand(count, 2, generator=generator) * 1.6 - 0.5) * torch.tensor(size[::-1])
    sides = torch.rand(count, 2, generator=generator) * 40 + 0.4
    if whole:
        corners, sides = corners.floor(), sides.ceil() + 1
    return probabilities, torch.cat([corners, corners + sides], dim=1)


def assert_equal_but_ties(masks, values, threshold):
    """Equal, but where the exact value is the threshold up to rounding in float32."""
    clear = np.abs(values - threshold) > 1e-5
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(masks)[clear], (values >= threshold)[clear])


@pytest.mark.parametrize("align_corners", [False, True])
@given(
    seed=st.integers(0, 10**6),
    cells=st.sampled_from([1, 2, 5]),
    threshold=st.sampled_from([0.2, 0.6]),
)
@settings(deadline=None, max_examples=12)
def test_pixels_against_a_loop(align_corners, seed, cells, threshold):
    probabilities, boxes = random_windows(seed, 3, cells)
    values = np.stack(
        [slow_values(p, b, SIZE, align_corners) for p, b in zip(probabilities, boxes)]
    )
    masks = WindowMasks(probabilities, boxes, SIZE, threshold, align_corners)
    assert_equal_but_ties(masks, values, threshold)
    # The form for GPUs, on the CPU.
    batch = pasting.paste_batch(probabilities, boxes, SIZE, threshold, align_corners)
    assert_equal_but_ties(batch, values, threshold)


@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_equals_detectron2(seed):
    probabilities, boxes = random_windows(seed, 8, 14)
    height, width = SIZE
    # Detectron2 raises for windows that do not touch the image.
    inside = (boxes[:, :2] < torch.tensor([width, height])).all(1) & (boxes[:, 2:] > 0).all(1)
    probabilities, boxes = probabilities[inside], boxes[inside]
    masks = WindowMasks(probabilities, boxes, SIZE, 0.5)
    expected = paste_masks_in_image(probabilities, boxes, SIZE, 0.5)
    different = (masks.tensor != expected.bool()).nonzero()
    for n, row, column in different.tolist():  # a tie, or rounding in Detectron2's float32
        value = slow_values(probabilities[n], boxes[n], SIZE, False)[row, column]
        assert abs(value - 0.5) < 1e-5


@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=15)
def test_corner_aligned_windows_are_interpolated_and_copied(seed):
    """For windows of whole pixels it is F.interpolate, pasted."""
    probabilities, boxes = random_windows(seed, 4, 6, whole=True)
    masks = WindowMasks(probabilities, boxes, SIZE, 0.5, align_corners=True)
    height, width = SIZE
    for soft, box, mask in zip(probabilities.double(), boxes.int().tolist(), masks):
        x0, y0, x1, y1 = box
        patch = F.interpolate(
            soft[None, None], (y1 - y0, x1 - x0), mode="bilinear", align_corners=True
        )[0, 0]
        values = torch.zeros(3 * height + 200, 3 * width + 200, dtype=torch.float64)
        values[y0 + 100 : y1 + 100, x0 + 100 : x1 + 100] = patch
        values = values[100 : 100 + height, 100 : 100 + width].numpy()
        assert_equal_but_ties(mask, values, 0.5)


def test_values_at_the_threshold_are_in():
    probabilities = torch.full((1, 2, 2), 0.25)
    box = torch.tensor([[2.0, 3, 6, 7]])
    for align_corners in (False, True):
        masks = WindowMasks(probabilities, box, (10, 10), 0.25, align_corners)
        # Without corners aligned, half a cell inside the border zeros begin to count.
        expected = torch.zeros(10, 10, dtype=torch.bool)
        border = 0 if align_corners else 1
        expected[3 + border : 7 - border, 2 + border : 6 - border] = True
        assert torch.equal(masks.tensor[0], expected)


@pytest.mark.parametrize("align_corners", [False, True])
@given(seed=st.integers(0, 10**6), size=st.sampled_from([(1, 1), (1, 9), (13, 1), (24, 31)]))
@settings(deadline=None, max_examples=20)
def test_all_forms_are_of_the_same_pixels(align_corners, seed, size):
    probabilities, boxes = random_windows(seed, 5, 4, size)
    boxes[0] = torch.tensor([-9.0, -9, size[1] + 9, size[0] + 9])  # runs go on in the next column
    boxes[1] += 500  # nothing in the image
    probabilities[0] = 0.9
    masks = WindowMasks(probabilities, boxes, size, 0.45, align_corners)
    dense = masks.tensor
    assert dense[0].all()
    assert not dense[1].any()
    assert dense.dtype == torch.bool
    assert masks.shape == tuple(dense.shape)
    assert np.array_equal(np.asarray(masks), dense.numpy())
    assert np.asarray(masks, dtype=np.float32).dtype == np.float32
    assert torch.equal(torch.stack(list(masks)), dense)
    assert torch.equal(masks.pack().to_dense(), dense)
    assert masks.to_rle() == encode_masks(dense)
    tight = masks.tight_boxes()
    assert isinstance(tight, Boxes)
    assert tight.tensor.dtype == torch.float32
    for mask, box in zip(dense, tight.tensor.tolist()):
        y, x = mask.nonzero(as_tuple=True)
        empty = not len(y)
        assert box == ([0] * 4 if empty else [x.min(), y.min(), x.max() + 1, y.max() + 1])
    assert torch.equal(pasting.bounds(dense), tight.tensor)
    assert torch.equal(masks.get_bounding_boxes().tensor, tight.tensor)


def test_no_masks():
    masks = WindowMasks(torch.zeros(0, 5, 5), torch.zeros(0, 4), SIZE)
    assert len(masks) == 0
    assert list(masks) == []
    assert masks.to_rle() == []
    assert masks.tensor.shape == np.asarray(masks).shape == (0, *SIZE)
    assert masks.tight_boxes().tensor.shape == (0, 4)
    packed = masks.pack()
    assert isinstance(packed, PackedMasks)
    assert packed.size == SIZE
    assert len(WindowMasks.cat([masks, masks])) == 0


def test_indices():
    probabilities, boxes = random_windows(3, 5)
    masks = WindowMasks(probabilities, boxes, SIZE, 0.4, True)
    dense = masks.tensor
    chosen = torch.tensor([True, False, False, True, True])
    for index in (slice(1, 4), slice(None, None, 2), chosen, torch.tensor([4, 0, 0]), [2, 1]):
        part = masks[index]
        assert isinstance(part, WindowMasks)
        assert torch.equal(part.tensor, dense[index])
        assert (part.threshold, part.align_corners, part.image_size) == (0.4, True, SIZE)
    for index in (0, -1, np.int64(2)):
        assert torch.equal(masks[index].tensor, dense[[int(index)]])
    for index in (5, -6, torch.tensor([True])):
        with pytest.raises(IndexError):
            masks[index]
    both = WindowMasks.cat([masks[3:], masks[:1]])
    assert torch.equal(both.tensor, dense[[3, 4, 0]])
    assert masks.to("cpu").device == masks.device == torch.device("cpu")
    assert masks.to(device="meta").device.type == "meta"
    assert "5 of 7 x 7 cells in 37 x 53 pixels" in repr(masks)


def test_parts_that_do_not_fit():
    probabilities, boxes = random_windows(0, 2)
    masks = WindowMasks(probabilities, boxes, SIZE)
    others = [
        WindowMasks(probabilities, boxes, (40, 53)),
        WindowMasks(probabilities, boxes, SIZE, 0.4),
        WindowMasks(probabilities, boxes, SIZE, align_corners=True),
        WindowMasks(probabilities[:, :2, :2], boxes, SIZE),
    ]
    for other in others:
        with pytest.raises(ValueError, match="parts must share"):
            WindowMasks.cat([masks, other])
    with pytest.raises(ValueError, match="at least one"):
        WindowMasks.cat([])


def test_half_precision_is_only_for_storage():
    probabilities, boxes = random_windows(11, 6, 28)
    half = WindowMasks(probabilities.half(), boxes, SIZE, 0.5)
    assert half.probabilities.dtype == torch.float16
    # As if the rounded probabilities had been float32 all the time.
    assert torch.equal(
        half.tensor, WindowMasks(probabilities.half().float(), boxes, SIZE, 0.5).tensor
    )
    assert half.to_rle() == encode_masks(half.tensor)


def test_chunks_bound_the_memory():
    probabilities, boxes = random_windows(1, 150, 3, (8, 9))
    masks = WindowMasks(probabilities, boxes, (8, 9))
    assert [len(chunk) for chunk in masks.chunks()] == [64, 64, 22]
    assert torch.equal(torch.cat(list(masks.chunks())), masks.tensor)
    large = WindowMasks(probabilities, boxes, (4000, 3000))
    assert len(next(large.chunks())) == 2


def test_instances_carry_them():
    probabilities, boxes = random_windows(5, 4)
    instances = Instances(SIZE, pred_masks=WindowMasks(probabilities, boxes, SIZE))
    instances.scores = torch.tensor([0.1, 0.9, 0.5, 0.7])
    dense = instances.pred_masks.tensor
    assert torch.equal(instances[instances.scores > 0.4].pred_masks.tensor, dense[1:])
    assert torch.equal(instances[2].pred_masks.tensor, dense[2:3])
    assert torch.equal(instances[-1].pred_masks.tensor, dense[3:])
    both = Instances.cat([instances, instances[:1]]).to("cpu")
    assert torch.equal(both.pred_masks.tensor, dense[[0, 1, 2, 3, 0]])


def detections(count=70):
    probabilities, boxes = random_windows(8, count)
    masks = WindowMasks(probabilities, boxes, SIZE)
    return Instances(
        SIZE,
        pred_boxes=masks.tight_boxes(),
        scores=torch.linspace(0.9, 0.3, count),
        pred_classes=torch.zeros(count, dtype=torch.int64),
        pred_masks=masks,
    )


def test_detectron2s_evaluator_encodes_them():
    instances = detections()
    results = instances_to_coco_json(instances, 7)
    assert len(results) == len(instances)
    for result, mask in zip(results, instances.pred_masks.tensor):
        assert np.array_equal(mask_util.decode(result["segmentation"]), mask.numpy())


def test_detectron2s_visualizer_draws_them():
    instances = detections(3)
    pictures = []
    for masks in (instances.pred_masks, instances.pred_masks.tensor):
        shown = Instances(SIZE, **(instances.get_fields() | {"pred_masks": masks}))
        metadata = MetadataCatalog.get("__window_masks").set(thing_colors=[(200, 30, 30)])
        image = np.zeros((*SIZE, 3), np.uint8)
        # By the metadata's colour: random ones would differ.
        visualizer = Visualizer(image, metadata, instance_mode=2)
        np.random.seed(0)
        pictures.append(visualizer.draw_instance_predictions(shown).get_image())
    assert np.array_equal(*pictures)
    assert pictures[0].any()


def bad_cases():
    good = torch.full((2, 3, 3), 0.5)
    boxes = torch.tensor([[0.0, 0, 4, 4], [1, 1, 5, 3]])
    nan, high, flat, far = good.clone(), good.clone(), boxes.clone(), boxes.clone()
    nan[1, 0, 2] = math.nan
    high[0, 0, 0] = 3
    flat[1, 3] = 1
    far[0, 0] = -math.inf
    yield "NaN", (nan, boxes, SIZE), "probabilities must be from 0 to 1"
    yield "logits", (high, boxes, SIZE), "not from 0.5 to 3.0"
    yield "no side", (good, flat, SIZE), r"boxes\[1\] has no extent: \[1.0, 1.0, 5.0, 1.0\]"
    yield "turned", (good, boxes[:, [2, 1, 0, 3]], SIZE), r"boxes\[0\] has no extent"
    yield "infinite", (good, far, SIZE), "boxes are NaN/inf"
    yield "not square", (good[:, :2], boxes, SIZE), "must be square, not 2 x 3"
    yield "no cells", (good[:, :0, :0], boxes, SIZE), "must be square, not 0 x 0"
    yield "dimensions", (good[:, None], boxes, SIZE), r"\(N, m, m\)"
    yield "bool", (good > 0, boxes, SIZE), r"floating \(N, m, m\), not torch.bool"
    yield "numbers", (good, boxes[:1], SIZE), r"boxes must be floating \(2, 4\)"
    yield "integers", (good, boxes.long(), SIZE), "boxes must be floating"
    yield "no image", (good, boxes, (0, 4)), r"image_size must be positive \(H, W\), not \(0, 4\)"
    yield "threshold", (good, boxes, SIZE, 0.0), r"threshold must be in \(0, 1\]"


CASES = list(bad_cases())


@pytest.mark.parametrize(
    ("arguments", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        WindowMasks(*arguments)


def test_devices_must_be_the_same():
    with pytest.raises(RuntimeError, match="probabilities are on cpu, boxes are on meta"):
        WindowMasks(torch.zeros(1, 2, 2), torch.zeros(1, 4, device="meta"), SIZE)


def test_no_array_without_a_copy():
    with pytest.raises(ValueError, match="without a copy"):
        WindowMasks(torch.zeros(1, 2, 2), torch.tensor([[0.0, 0, 1, 1]]), SIZE).__array__(
            copy=False
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("align_corners", [False, True])
def test_gpu_gives_the_same(align_corners):
    probabilities, boxes = random_windows(21, 100, 14)
    masks = WindowMasks(probabilities, boxes, SIZE, 0.3, align_corners)
    there = masks.to("cuda")
    expected = masks.tensor
    assert (there.tensor.cpu() != expected).sum() <= 2  # rounding at the threshold
    dense = there.tensor.cpu()
    assert there.to_rle() == encode_masks(dense)
    assert torch.equal(there.tight_boxes().tensor.cpu(), pasting.bounds(dense))
    assert torch.equal(there.pack().to("cpu").to_dense(), dense)
    assert torch.equal(there[torch.tensor([3, 1])].tensor.cpu(), dense[[3, 1]])
