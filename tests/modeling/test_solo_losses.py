"""FreeSOLO's losses against the textbook forms in float64: values, gradients, memory."""

import math

import freesolo_oracle as oracle
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unseg.config import get_cfg
from unseg.modeling.losses import (
    avg_projection_loss,
    color_edges,
    dice_loss,
    downsample_colors,
    half_neighbourhood,
    max_projection_loss,
    pairwise_affinity,
)
from unseg.modeling.losses import pairwise as pairwise_module
from unseg.modeling.solo.criterion import (
    FreeSOLOLossSettings,
    Predictions,
    Targets,
    focal_loss,
    freesolo_losses,
    mask_logits,
    mean_over_levels,
    semantic_loss,
)
from unseg.modeling.solo.targets import Pairs

PROJECTIONS = {
    max_projection_loss: oracle.max_projection,
    avg_projection_loss: oracle.avg_projection,
}
EXTREME = st.floats(-100, 100, width=32)  # exp overflows at 89


def random_masks(rng, n, h, w):
    """Two rectangles each, so that there are gaps; the last one is empty."""
    masks = np.zeros((n, h, w), dtype=bool)
    for mask in masks[:-1]:
        for _ in range(2):
            y, x = rng.integers(h), rng.integers(w)
            mask[y : y + rng.integers(1, h // 3 + 2), x : x + rng.integers(1, w // 3 + 2)] = True
    return masks


def with_gradient(function, *inputs):
    """The value and the gradients of its sum with fixed weights with respect to the inputs."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    weights = torch.linspace(0.5, 2, value.numel(), dtype=value.dtype).view(value.shape)
    return value.detach(), *torch.autograd.grad((value * weights).sum(), inputs)


def assert_equal(found, expected, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol)


# Projections.


@pytest.mark.parametrize("loss", PROJECTIONS)
@pytest.mark.parametrize("shape", [(4, 7, 11), (3, 1, 6), (3, 6, 1), (2, 1, 1)])
def test_projection_losses(loss, shape):
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=shape) * 3)
    masks = random_masks(rng, *shape)

    def slow(x):
        pairs = zip(x, masks, strict=True)
        return torch.stack([PROJECTIONS[loss](*pair) for pair in pairs])

    value, gradient = with_gradient(lambda x: loss(x, torch.from_numpy(masks)), logits.float())
    expected, expected_gradient = with_gradient(slow, logits.float().double())
    assert value.dtype == torch.float32
    assert_equal(value, expected)
    assert_equal(gradient, expected_gradient)


@pytest.mark.parametrize("loss", PROJECTIONS)
@given(
    logits=hnp.arrays(np.float32, (1, 3, 5), elements=EXTREME),
    mask=hnp.arrays(bool, (1, 3, 5)),
)
@settings(max_examples=30)
def test_projection_losses_of_any_logits(loss, logits, mask):
    value, gradient = with_gradient(
        lambda x: loss(x, torch.from_numpy(mask)), torch.from_numpy(logits)
    )
    assert gradient.isfinite().all()
    expected = PROJECTIONS[loss](torch.from_numpy(logits[0]).double(), mask[0])
    assert_equal(value[0], expected)
    assert 0 <= value <= 2


def test_dice():
    a, b = torch.tensor([[0.5, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert dice_loss(a, b).item() == pytest.approx(1 - 2 * 1.5 / (1.25 + 2 + 1e-5))
    assert dice_loss(torch.zeros(1, 3), torch.zeros(1, 3)).tolist() == [1.0]


# Colours.


def image_of_patches(rng, b, h, w):
    """Flat patches with a little noise: some neighbours are alike and some are not."""
    colors = rng.integers(0, 252, (b, 3, 3))
    which = rng.integers(0, 3, (b, -(-h // 8), -(-w // 8)))
    which = which.repeat(8, axis=1).repeat(8, axis=2)[:, :h, :w]
    image = np.stack([c[:, k] for c, k in zip(colors, which, strict=True)])
    return image + rng.integers(0, 4, image.shape)


def test_colors_of_mask_pixels():
    image = np.random.default_rng(1).integers(0, 256, (1, 3, 13, 10))
    image[..., :4, :4] //= 32  # the dark end of the cube root and of the transfer curve
    found = downsample_colors(torch.from_numpy(image).float(), 4)
    expected = oracle.lab_of_mask_pixels(image[0][:, :12, :8], 3, 2)
    np.testing.assert_allclose(found[0].permute(1, 2, 0), expected, atol=5e-4)


def test_colors_are_cut_to_whole_numbers():
    image = torch.full((1, 3, 4, 4), 100.0)
    image[:, :, 0, :3] = 105.0  # mean 100.9
    cut = downsample_colors(torch.full((1, 3, 4, 4), 100.0), 4)
    assert torch.equal(downsample_colors(image, 4), cut)


def test_colors_equal_scikit_image():
    color = pytest.importorskip("skimage.color")
    image = np.random.default_rng(2).integers(0, 256, (3, 6, 7))
    expected = color.rgb2lab(image.transpose(1, 2, 0).astype(np.uint8))
    for y in range(6):
        for x in range(7):
            np.testing.assert_allclose(oracle.lab(image[:, y, x]), expected[y, x], atol=1e-6)


def pairs_between(edges, shifts, shape):
    """{(image, i, j)}: pairs that count with i as the centre."""
    pairs = set()
    b, h, w = shape
    for n in range(b):
        for t, (dy, dx) in enumerate(shifts):
            for y in range(h):
                for x in range(w):
                    if edges[0][n, t, y, x]:
                        pairs.add((n, (y, x), (y + dy, x + dx)))
                    if edges[1][n, t, y, x]:
                        pairs.add((n, (y + dy, x + dx), (y, x)))
    return pairs


@pytest.mark.parametrize(("size", "dilation"), [(3, 2), (3, 1), (5, 1), (5, 2)])
def test_edges_need_one_color_and_a_valid_neighbour(size, dilation):
    rng = np.random.default_rng(3)
    b, h, w = 2, 7, 9
    image = image_of_patches(rng, b, 4 * h, 4 * w)
    valid = rng.random((b, h, w)) < 0.8
    colors = [oracle.lab_of_mask_pixels(x, h, w) for x in image]
    assert min(oracle.threshold_margin(c, size, dilation, 0.3) for c in colors) > 1e-3
    shifts = half_neighbourhood(size, dilation)
    lab = downsample_colors(torch.from_numpy(image), 4)
    edges = color_edges(lab, torch.from_numpy(valid), shifts, 0.3)
    expected = {
        (n, (y, x), j)
        for n in range(b)
        for y in range(h)
        for x in range(w)
        for j in oracle.neighbours(y, x, h, w, size, dilation)
        if valid[n][j] and oracle.similarity(colors[n], (y, x), j) >= 0.3
    }
    assert pairs_between(edges, shifts, (b, h, w)) == expected
    everything = b * h * w * (size * size - 1)
    assert 0.05 * everything < len(expected) < 0.8 * everything


@pytest.mark.parametrize("size", [1, 2, 4])
def test_neighbourhoods_are_odd(size):
    with pytest.raises(ValueError, match="PAIRWISE_SIZE must be odd"):
        half_neighbourhood(size, 2)


# Pairwise affinity.


class Case:
    """Masks of several images, with what both the code and the oracle want to know."""

    def __init__(self, seed, image, h, w, size=3, dilation=2, scale=3.0, valid=0.9):
        rng = np.random.default_rng(seed)
        self.image = image
        b = max(image) + 1
        self.logits = torch.from_numpy(rng.normal(size=(len(image), h, w)) * scale).float()
        self.masks = random_masks(rng, len(image), h, w)
        pixels = image_of_patches(rng, b, 4 * h, 4 * w)
        self.valid = rng.random((b, h, w)) < valid
        self.lab = downsample_colors(torch.from_numpy(pixels), 4)
        self.colors = self.lab.double().permute(0, 2, 3, 1).numpy()
        self.size, self.dilation = size, dilation

    def found(self, logits):
        shifts = half_neighbourhood(self.size, self.dilation)
        edges = color_edges(self.lab, torch.from_numpy(self.valid), shifts, 0.3)
        image = torch.tensor(self.image)
        return pairwise_affinity(logits, torch.from_numpy(self.masks), image, edges, shifts)

    def expected(self, logits):
        results = [
            oracle.pairwise(
                x, mask, self.colors[n], self.valid[n], self.size, self.dilation, threshold=0.3
            )
            for x, mask, n in zip(logits, self.masks, self.image, strict=True)
        ]
        return torch.stack([x for x, _ in results]), torch.tensor([float(n) for _, n in results])


@pytest.mark.parametrize(("size", "dilation"), [(3, 2), (3, 3), (5, 1), (5, 2)])
@pytest.mark.parametrize("shape", [(9, 13), (2, 8), (8, 1)])
def test_pairwise_affinity(shape, size, dilation):
    case = Case(0, [0, 0, 1, 0], *shape, size=size, dilation=dilation)
    value, gradient = with_gradient(lambda x: case.found(x)[0], case.logits)
    expected, expected_gradient = with_gradient(lambda x: case.expected(x)[0], case.logits.double())
    assert value.dtype == torch.float32
    assert_equal(value, expected)
    assert_equal(gradient, expected_gradient)
    counts = case.found(case.logits)[1]
    assert torch.equal(counts, case.expected(case.logits.double())[1])
    assert counts[-1] == 0, "an empty mask has no pairs"
    assert shape == (8, 1) or counts[:-1].sum() > 0


@given(
    logits=hnp.arrays(np.float32, (1, 5, 6), elements=EXTREME),
    mask=hnp.arrays(bool, (1, 5, 6)),
    seed=st.integers(0, 5),
)
@settings(max_examples=25)
def test_pairwise_affinity_of_any_logits(logits, mask, seed):
    case = Case(seed, [0], 5, 6)
    case.masks = mask
    assume(oracle.threshold_margin(case.colors[0], 3, 2, 0.3) > 1e-6)
    value, gradient = with_gradient(lambda x: case.found(x)[0], torch.from_numpy(logits))
    expected, expected_gradient = with_gradient(
        lambda x: case.expected(x)[0], torch.from_numpy(logits).double()
    )
    count = case.found(torch.from_numpy(logits))[1].item()
    # The terms of a pair are up to 200 and may cancel.
    assert_equal(value, expected, rtol=1e-6, atol=2e-5 * max(count, 1))
    assert_equal(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


def test_pairs_reach_beyond_the_box_and_centres_do_not():
    mask = np.zeros((1, 9, 9), dtype=bool)
    mask[0, 4, 3], mask[0, 4, 5] = True, True  # column 4 is a gap
    lab, valid = torch.zeros(1, 3, 9, 9), torch.ones(1, 9, 9, dtype=torch.bool)
    shifts = half_neighbourhood(3, 2)
    logits = torch.randn(1, 9, 9)
    _, gradient = with_gradient(
        lambda x: pairwise_affinity(
            x,
            torch.from_numpy(mask),
            torch.tensor([0]),
            color_edges(lab, valid, shifts, 0.3),
            shifts,
        )[0],
        logits,
    )
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[2:7:2, 1:8:2] = True  # (4, 3), (4, 5) and their neighbours, nothing of (4, 4)
    assert torch.equal(gradient[0] != 0, expected)


@pytest.mark.parametrize("chunk", [1, 250, 1 << 24])
def test_whole_masks_as_on_a_gpu_give_the_same(monkeypatch, chunk):
    case = Case(4, [0, 0, 1, 1, 0, 2], 9, 13)
    expected = with_gradient(lambda x: case.found(x)[0], case.logits)
    counts = case.found(case.logits)[1]
    used = []

    def whole(rows, columns, image, margin):
        used.append(len(image))
        return pairwise_module._whole_blocks((len(rows), 9, 13), image)

    monkeypatch.setattr(pairwise_module, "_CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(pairwise_module, "_cropped_blocks", whole)
    found = with_gradient(lambda x: case.found(x)[0], case.logits)
    assert_equal(found[0], expected[0], rtol=1e-6)
    assert_equal(found[1], expected[1], rtol=1e-6)
    assert torch.equal(case.found(case.logits)[1], counts)
    assert used


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pairwise_affinity_on_a_gpu():
    case = Case(4, [0, 0, 1, 1, 0, 2], 40, 60)
    shifts = half_neighbourhood(3, 2)
    edges = color_edges(case.lab, torch.from_numpy(case.valid), shifts, 0.3)
    arguments = (torch.from_numpy(case.masks), torch.tensor(case.image))

    def on_device(x):
        moved = [a.cuda() for a in arguments]
        return pairwise_affinity(x.cuda(), *moved, [e.cuda() for e in edges], shifts)[0].cpu()

    found = with_gradient(on_device, case.logits)
    for x, y in zip(found, with_gradient(lambda x: case.found(x)[0], case.logits), strict=True):
        assert_equal(x, y)


def test_batches_without_masks():
    case = Case(0, [0], 5, 6)
    case.image, case.masks = [], case.masks[:0]
    empty = torch.zeros(0, 5, 6, requires_grad=True)
    losses, counts = case.found(empty)
    assert losses.shape == counts.shape == (0,)
    losses.sum().backward()
    assert empty.grad.shape == (0, 5, 6)
    for loss in PROJECTIONS:
        assert loss(torch.zeros(0, 5, 6), torch.zeros(0, 5, 6, dtype=torch.bool)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    case = Case(5, [0, 0, 1], 9, 13)
    logits = case.logits.to(dtype)
    masks = torch.from_numpy(case.masks)
    losses = {
        "pairwise": lambda x: case.found(x)[0],
        "max": lambda x: max_projection_loss(x, masks),
        "avg": lambda x: avg_projection_loss(x, masks),
    }
    for name, loss in losses.items():
        value, gradient = with_gradient(loss, logits)
        expected, expected_gradient = with_gradient(loss, logits.float())
        assert value.dtype == torch.float32, name
        assert gradient.dtype == dtype, name
        assert torch.equal(value, expected), name
        # Two terms are added in half precision.
        torch.testing.assert_close(gradient, expected_gradient.to(dtype))


def saved_floats(function, logits):
    """Bytes / 4 that autograd keeps for the backward pass, each storage once."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    logits = (logits.detach() * 1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = function(logits)
    storages.pop(logits.untyped_storage().data_ptr(), None)
    del value
    return sum(storages.values()) / 4


@pytest.mark.parametrize("name", ["pairwise", "max", "avg"])
def test_at_most_one_float_per_logit_is_kept_for_the_gradient(name):
    case = Case(6, [0, 0, 1, 1], 60, 80)
    masks = torch.from_numpy(case.masks)
    function = {
        "pairwise": lambda x: case.found(x)[0],
        "max": lambda x: max_projection_loss(x, masks),
        "avg": lambda x: avg_projection_loss(x, masks),
    }[name]
    kept = saved_floats(function, case.logits) / case.logits.numel()
    assert 0 < kept < (0.2 if name == "max" else 1.1)


# Everything together.


def random_predictions(rng, b, k, classes, e, d, h, w):
    def normal(*shape, scale=1.0):
        return torch.from_numpy(rng.normal(size=shape) * scale)

    return (
        normal(b, k, classes, scale=2.0),
        normal(b, k, e),
        normal(b, k, d),
        normal(b, e, h, w),
    )


class Batch:
    """Two images, three objects; objects 0 and 1 share cell 4, object 1 has no embedding."""

    # (image, level, cell, target)
    ROWS = [(0, 0, 4, 0), (0, 0, 5, 0), (0, 2, 9, 0), (0, 0, 4, 1), (1, 0, 0, 2), (1, 0, 4, 2)]
    SHAPE = (8, 10)
    LEVELS = 3

    def __init__(self, classes=2, rows=None):
        rng = np.random.default_rng(7)
        self.rows = self.ROWS if rows is None else rows
        h, w = self.SHAPE
        self.inputs = random_predictions(rng, 2, 11, classes, 5, 6, h, w)
        self.masks = random_masks(rng, 4, h, w)[:3]
        self.embeddings = rng.normal(size=(3, 6))
        self.embeddings[1] = 0
        # Similarities from 0 to 1 between neighbours.
        pixels = rng.integers(100, 108, (2, 3, h, w)).repeat(4, axis=2).repeat(4, axis=3)
        self.lab = downsample_colors(torch.from_numpy(pixels), 4)
        self.valid = rng.random((2, h, w)) < 0.9

    def found(self, settings, factor=1.0, inputs=None):
        columns = [torch.tensor(x, dtype=torch.int64) for x in zip(*self.rows, strict=True)]
        image, level, cell, target = columns or [torch.zeros(0, dtype=torch.int64)] * 4
        counts = [sum(row[0] == b for row in self.rows) for b in range(2)]
        targets = Targets(
            counts=[1, 2],
            centers=torch.zeros(3, 2),  # not used
            pairs=Pairs(image=image, level=level, cell=cell, target=target, counts=counts),
            masks=torch.from_numpy(self.masks),
            embeddings=torch.from_numpy(self.embeddings).float(),
            lab=self.lab,
            valid=torch.from_numpy(self.valid),
        )
        inputs = inputs or [x.float() for x in self.inputs]
        return freesolo_losses(Predictions(*inputs), targets, self.LEVELS, settings, factor)

    def expected(self, s, factor=1.0, inputs=None):
        category, kernels, embeddings, features = inputs or self.inputs
        last = {(image, cell): target for image, _, cell, target in self.rows}
        logits = [
            (kernels[image, cell][:, None, None] * features[image]).sum(0)
            for image, _, cell, _ in self.rows
        ]
        levels = [row[1] for row in self.rows]
        masks = [self.masks[row[3]] for row in self.rows]
        colors = self.lab.double().permute(0, 2, 3, 1).numpy()
        pairs = [
            oracle.pairwise(
                x,
                mask,
                colors[row[0]],
                self.valid[row[0]],
                s.pairwise_size,
                s.pairwise_dilation,
                s.pairwise_color_thr,
            )
            for x, mask, row in zip(logits, masks, self.rows, strict=True)
        ]
        sums, weights = [x for x, _ in pairs], [n for _, n in pairs]
        targets = [torch.from_numpy(self.embeddings[t]) for t in last.values()]
        return {
            "loss_category": s.focal_weight
            * oracle.focal(category, last.keys(), s.focal_alpha, s.focal_gamma),
            "loss_max_projection": s.max_projection_weight
            * oracle.by_level(map(oracle.max_projection, logits, masks), levels),
            "loss_avg_projection": s.avg_projection_weight
            * oracle.by_level(map(oracle.avg_projection, logits, masks), levels),
            "loss_pairwise": s.pairwise_weight
            * factor
            * oracle.pairwise_by_level(sums, weights, levels),
            "loss_semantic": s.semantic_weight
            * oracle.semantic([embeddings[key] for key in last], targets),
        }


NAMES = [
    "loss_category",
    "loss_max_projection",
    "loss_avg_projection",
    "loss_pairwise",
    "loss_semantic",
]
ODD = FreeSOLOLossSettings(
    focal_alpha=0.4,
    focal_gamma=1.5,
    focal_weight=1.3,
    max_projection_weight=0.7,
    avg_projection_weight=2.0,
    pairwise_weight=1.7,
    pairwise_size=5,
    pairwise_dilation=1,
    pairwise_color_thr=0.6,
    semantic_weight=0.3,
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [FreeSOLOLossSettings(), ODD], ids=["defaults", "others"])
def test_losses_of_a_batch(name, settings):
    batch = Batch()
    inputs = [x.float() for x in batch.inputs]

    def run(function, inputs):
        inputs = [x.clone().requires_grad_() for x in inputs]
        loss = function(settings, 0.4, inputs)[name]
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        zeros = [torch.zeros_like(x) for x in inputs]
        return loss.detach(), [z if g is None else g for g, z in zip(gradients, zeros, strict=True)]

    found, gradients = run(batch.found, inputs)
    expected, expected_gradients = run(batch.expected, [x.double() for x in inputs])
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert_equal(found, expected)
    for x, y in zip(gradients, expected_gradients, strict=True):
        assert_equal(x, y)
    assert any(x.abs().max() > 1e-4 for x in gradients)


def test_default_weights_are_those_of_the_paper():
    s = FreeSOLOLossSettings()
    assert (s.focal_alpha, s.focal_gamma, s.focal_weight) == (0.25, 2, 1)
    assert (s.max_projection_weight, s.avg_projection_weight) == (1, 0.1)
    assert (s.pairwise_weight, s.pairwise_size, s.pairwise_dilation) == (1, 3, 2)
    assert (s.pairwise_color_thr, s.pairwise_warmup_iters) == (0.3, 1000)
    assert (s.bottom_pixels_removed, s.semantic_weight) == (10, 4)


@pytest.mark.parametrize("semantic_weight", [4.0, 0.0])
def test_without_objects_all_predictions_still_get_gradients(semantic_weight):
    batch = Batch(rows=[])
    inputs = [x.float().requires_grad_() for x in batch.inputs]
    settings = FreeSOLOLossSettings(semantic_weight=semantic_weight)
    losses = batch.found(settings, inputs=inputs)
    assert ("loss_semantic" in losses) == (semantic_weight > 0)
    expected = batch.expected(settings)
    assert_equal(losses["loss_category"], expected["loss_category"])
    assert all(losses[k] == 0 for k in losses if k != "loss_category")
    sum(losses.values()).backward()
    for x in inputs[1:]:
        assert torch.equal(x.grad, torch.zeros_like(x))
    assert (inputs[0].grad != 0).all(), "background cells learn"


def test_without_a_semantic_loss_the_embeddings_still_get_a_gradient():
    inputs = [x.float().requires_grad_() for x in Batch().inputs]
    sum(Batch().found(FreeSOLOLossSettings(semantic_weight=0.0), inputs=inputs).values()).backward()
    assert torch.equal(inputs[2].grad, torch.zeros_like(inputs[2]))


def test_extreme_logits_give_finite_losses_and_gradients():
    for sign in (1, -1):
        batch = Batch()
        batch.inputs = list(batch.inputs)
        batch.inputs[0] = sign * torch.full_like(batch.inputs[0], 100)
        batch.inputs[1] = sign * torch.full_like(batch.inputs[1], 5)
        batch.inputs[3] = torch.where(batch.inputs[3] > 0, 4.0, -4.0).double()
        inputs = [x.float().requires_grad_() for x in batch.inputs]
        losses = batch.found(FreeSOLOLossSettings(), inputs=inputs)
        expected = batch.expected(FreeSOLOLossSettings())
        for name in NAMES:
            assert_equal(losses[name], expected[name], rtol=1e-4, atol=1e-5)
        sum(losses.values()).backward()
        assert all(x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("classes", [1, 2])
def test_objects_are_of_the_first_class(classes):
    logits = torch.randn(1, 3, classes)
    owner = torch.tensor([[-1, 0, 5]])
    expected = oracle.focal(logits.double(), {(0, 1), (0, 2)})
    assert_equal(focal_loss(logits, owner, FreeSOLOLossSettings()), expected)


def test_semantic_loss_leaves_out_zero_targets_and_cells_of_others():
    predicted = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    target = torch.tensor([[0.0, 3.0], [0.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    counts = torch.tensor([True, True, False, True])
    loss = semantic_loss(predicted, target, counts)
    assert loss.item() == pytest.approx(1.0)  # two rows count, both orthogonal
    loss.backward()
    assert predicted.grad.isfinite().all()
    assert (predicted.grad[1:3] == 0).all()
    nothing = semantic_loss(predicted, torch.zeros(4, 2), counts)
    assert nothing.item() == 0


def test_levels_count_alike_whatever_they_hold():
    values, levels = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([0, 0, 0, 3])
    assert mean_over_levels(values, levels, 5).item() == pytest.approx((2 + 10) / 2)
    assert mean_over_levels(values[:0], levels[:0], 5).item() == 0


def test_mask_logits_use_the_features_of_their_image():
    kernels, features = torch.randn(5, 3), torch.randn(3, 3, 4, 6)
    found = mask_logits(kernels, features, [2, 0, 3])
    for n, b in enumerate([0, 0, 2, 2, 2]):
        expected = sum(kernels[n, e] * features[b, e] for e in range(3))
        torch.testing.assert_close(found[n], expected)


def test_settings_are_read_from_the_config():
    cfg = get_cfg()
    assert FreeSOLOLossSettings.from_config(cfg) == FreeSOLOLossSettings()
    for value, name in enumerate(FreeSOLOLossSettings.__dataclass_fields__):
        cfg.MODEL.FREESOLO.LOSS[name.upper()] = value + 0.5
    found = FreeSOLOLossSettings.from_config(cfg)
    for value, name in enumerate(FreeSOLOLossSettings.__dataclass_fields__):
        assert getattr(found, name) == value + 0.5


def test_pairwise_levels_are_weighted_by_pairs_not_by_masks():
    batch = Batch()
    settings = FreeSOLOLossSettings()
    found = batch.found(settings)["loss_pairwise"].item()
    # A mean over masks would be another number.
    logits = [
        (batch.inputs[1][image, cell][:, None, None] * batch.inputs[3][image]).sum(0)
        for image, _, cell, _ in batch.rows
    ]
    colors = batch.lab.double().permute(0, 2, 3, 1).numpy()
    by_mask = [
        oracle.pairwise(x, batch.masks[row[3]], colors[row[0]], batch.valid[row[0]])
        for x, row in zip(logits, batch.rows, strict=True)
    ]
    other = oracle.by_level([x / max(n, 1) for x, n in by_mask], [row[1] for row in batch.rows])
    assert not math.isclose(found, float(other), rel_tol=1e-3)
