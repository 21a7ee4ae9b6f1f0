"""The whole FreeSOLO model: training, inference, odd inputs."""

import copy
from fractions import Fraction

import freesolo_oracle as oracle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes
from freesolo_cases import (
    batch_of,
    make_objects,
    narrow_config,
    narrow_model,
    patches,
    rectangles,
)
from torch import nn

from unseg.modeling import FreeSOLO
from unseg.modeling.meta_arch import freesolo as module
from unseg.modeling.solo.criterion import FreeSOLOLossSettings
from unseg.modeling.solo.postprocess import SoloInferenceSettings
from unseg.modeling.solo.targets import GridSpec

LOSSES = {
    "loss_category",
    "loss_max_projection",
    "loss_avg_projection",
    "loss_pairwise",
    "loss_semantic",
}


# A model whose predictions are parameters, to hold its targets and losses against the oracle.

GRIDS, RANGES, STRIDES = (6, 5, 3), ((1, 16), (8, 32), (24, 400)), (8, 16, 32)
CELLS = sum(s * s for s in GRIDS)


class Passing(nn.Module):
    """A backbone that returns what it is given, and remembers it."""

    size_divisibility = 0

    def forward(self, x):
        self.seen = x
        return {"image": x}


class FixedInstanceHead(nn.Module):
    num_grids, strides = GRIDS, STRIDES

    def __init__(self, images, kernels, dim):
        super().__init__()
        self.emb_pred = nn.Conv2d(1, dim, 1)  # tells the length
        sizes = {"category": 1, "kernel": kernels, "embedding": dim}
        for name, channels in sizes.items():
            levels = [nn.Parameter(torch.randn(images, channels, s, s)) for s in GRIDS]
            setattr(self, name, nn.ParameterList(levels))

    def forward(self, features, image_size):
        del features, image_size
        return tuple(list(x) for x in (self.category, self.kernel, self.embedding))


class FixedMaskHead(nn.Module):
    stride = 4

    def __init__(self, images, kernels, size):
        super().__init__()
        self.features = nn.Parameter(torch.randn(images, kernels, *size))

    def forward(self, features):
        del features
        return self.features


def make_fixed(images=4, size=(16, 16), dim=6, **changes):
    torch.manual_seed(3)
    options = {
        "backbone": Passing(),
        "instance_head": FixedInstanceHead(images, 4, dim),
        "mask_head": FixedMaskHead(images, 4, size),
        "grid": GridSpec(GRIDS, RANGES, 0.2),
        "losses": FreeSOLOLossSettings(pairwise_warmup_iters=4),
        "inference": SoloInferenceSettings(),
        "copy_paste_overlap": None,
        "append_weak_view": True,
        "pixel_mean": [10.0, 20.0, 30.0],
        "pixel_std": [1.0, 2.0, 4.0],
        "input_format": "RGB",
    }
    return FreeSOLO(**options | changes)


def test_grids_of_head_and_targets_are_the_same():
    with pytest.raises(ValueError, match="the head has grids"):
        make_fixed(grid=GridSpec((3, 3, 3), ((1, 2),) * 3))


def two_view_batch(seed=16, sizes=((40, 52), (64, 36)), heights=(80, 50), counts=(2, 2)):
    rng = np.random.default_rng(seed)
    batch = []
    for size, height, n in zip(sizes, heights, counts, strict=True):
        weak = patches(rng, *size)
        strong = weak // 2 + patches(rng, *size) // 2
        batch.append(
            {
                "image": torch.from_numpy(weak),
                "strong_image": torch.from_numpy(strong),
                "instances": make_objects(rectangles(rng, n, *size)),
                "height": height,
                "width": 99,
            }
        )
    return batch


def slow_losses(images, objects, bottoms, outputs, factor, mask_size=(16, 16)):
    """Losses of a batch padded to 64 x 64, from its pixels, masks and the outputs in float64."""
    category, kernels, embeddings, features = outputs
    settings = FreeSOLOLossSettings()
    h, w = mask_size
    logits, masks, levels, pairs, last = [], [], [], [], {}
    margins = []
    for b, (image, own, bottom) in enumerate(zip(images, objects, bottoms, strict=True)):
        colors = oracle.lab_of_mask_pixels(image, h, w)
        valid = oracle.valid_mask_pixels(image.shape[1:], h, w, bottom)
        margins.append(oracle.threshold_margin(colors, 3, 2, 0.3))
        for n in range(len(own)):
            mask = own.gt_masks.tensor[n].numpy()
            if not mask.any():
                continue
            small = oracle.small_mask_values(mask, h, w) >= 0.5
            cells, margin = oracle.cells_of_object(
                own.gt_boxes.tensor[n].tolist(),
                oracle.center_of_mass(mask),
                (4 * h, 4 * w),
                GRIDS,
                RANGES,
                Fraction(1, 5),
            )
            margins.append(margin)
            for level, row, column in cells:
                cell = oracle.cell_index(level, row, column, GRIDS)
                x = sum(kernels[b, cell, e] * features[b, e] for e in range(features.shape[1]))
                logits.append(x)
                masks.append(small)
                levels.append(level)
                pairs.append(oracle.pairwise(x, small, colors, valid))
                last[b, cell] = own.gt_embeddings[n].double()
    assert min(margins) > 1e-4, "choose another seed"
    assert len(set(levels)) == 3
    sums, weights = [x for x, _ in pairs], [n for _, n in pairs]
    return {
        "loss_category": oracle.focal(category, last.keys()),
        "loss_max_projection": oracle.by_level(map(oracle.max_projection, logits, masks), levels),
        "loss_avg_projection": settings.avg_projection_weight
        * oracle.by_level(map(oracle.avg_projection, logits, masks), levels),
        "loss_pairwise": factor * oracle.pairwise_by_level(sums, weights, levels),
        "loss_semantic": settings.semantic_weight
        * oracle.semantic([embeddings[key] for key in last], last.values()),
    }


def flat_outputs(model):
    """(B, K, ...) float64 of the fixed outputs: level by level, row by row."""
    results = []
    for levels in (model.ins_head.category, model.ins_head.kernel, model.ins_head.embedding):
        cells = [
            level[:, :, y, x]
            for level in levels
            for y in range(level.shape[2])
            for x in range(level.shape[3])
        ]
        results.append(torch.stack(cells, dim=1).double())
    return (*results, model.mask_head.features.double())


def test_losses_of_a_batch_from_its_pixels():
    """Two images of different sizes, both views: nothing of the code but the predictions."""
    model = make_fixed().train()
    batch = two_view_batch()
    found = model(copy.deepcopy(batch))
    views = [x["strong_image"].numpy() for x in batch] + [x["image"].numpy() for x in batch]
    objects = [x["instances"] for x in batch] * 2
    # 10 * 40 // 80 and 10 * 64 // 50 rows of the input
    expected = slow_losses(views, objects, [5, 12] * 2, flat_outputs(model), factor=1 / 4)
    assert found.keys() == expected.keys() == LOSSES
    parameters = [p for n, p in model.named_parameters() if "emb_pred" not in n]
    for name in LOSSES:
        assert found[name].dtype == torch.float32
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-5), name
    gradients = torch.autograd.grad(sum(found.values()), parameters)
    slow = torch.autograd.grad(sum(expected.values()), parameters)
    assert sum(y.abs().max() > 1e-6 for y in slow) >= 9, "most of ten"
    for x, y in zip(gradients, slow, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_the_backbone_sees_strong_views_then_weak_ones_padded_with_zeros():
    model = make_fixed().train()
    batch = two_view_batch()
    model(batch)
    views = [x["strong_image"] for x in batch] + [x["image"] for x in batch]
    assert model.backbone.seen.shape == (4, 3, 64, 64)
    for seen, view in zip(model.backbone.seen, views, strict=True):
        expected = torch.zeros(3, 64, 64)
        mean, std = torch.tensor([10.0, 20, 30]), torch.tensor([1.0, 2, 4])
        inside = (view.float() - mean[:, None, None]) / std[:, None, None]
        expected[:, : view.shape[1], : view.shape[2]] = inside
        torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("with_strong_view", [True, False])
def test_without_the_weak_view(with_strong_view):
    model = make_fixed(images=2, append_weak_view=False).train()
    batch = two_view_batch()
    view = batch[0]["strong_image" if with_strong_view else "image"].float()
    if not with_strong_view:
        for x in batch:
            del x["strong_image"]
    model(batch)
    assert len(model.backbone.seen) == 2
    mean, std = torch.tensor([10.0, 20, 30]), torch.tensor([1.0, 2, 4])
    torch.testing.assert_close(
        model.backbone.seen[0, :, :40, :52], (view - mean[:, None, None]) / std[:, None, None]
    )


def test_pasting_goes_from_weak_views_in_reversed_order_into_strong_ones(monkeypatch):
    calls = []

    def spy(images, targets, source_images, source_targets, **options):
        calls.append((images, targets, source_images, source_targets, options))
        return [x + 1 for x in images], targets

    monkeypatch.setattr(module, "copy_paste", spy)
    model = make_fixed(copy_paste_overlap=0.3, inference=SoloInferenceSettings(compat=True)).train()
    batch = two_view_batch()
    model(batch)
    ((images, targets, source_images, source_targets, options),) = calls
    assert options == {"max_overlap": 0.3, "compat": True}
    for n, x in enumerate(batch):
        assert torch.equal(images[n], x["strong_image"].float())
        assert torch.equal(source_images[1 - n], x["image"].float())
        for objects in (targets[n], source_targets[1 - n]):
            assert torch.equal(objects.gt_masks.tensor, x["instances"].gt_masks.tensor)
    seen = model.backbone.seen[:, 0, 0, 0] * 1.0 + 10.0
    expected = [x["strong_image"][0, 0, 0] + 1.0 for x in batch] + [
        x["image"][0, 0, 0] for x in batch
    ]
    assert seen.tolist() == [float(x) for x in expected]


def test_losses_after_pasting_are_those_of_the_pasted_images(monkeypatch):
    """With the real copy-paste: what it returns is what is learned, weak views stay."""
    kept = []

    def remember(*args, **options):
        kept.append(module_copy_paste(*args, **options))
        return kept[-1]

    module_copy_paste = module.copy_paste
    monkeypatch.setattr(module, "copy_paste", remember)
    model = make_fixed(copy_paste_overlap=0.5).train()
    batch = two_view_batch()
    torch.manual_seed(0)
    found = model(copy.deepcopy(batch))
    ((images, objects),) = kept
    assert len(objects[0]) + len(objects[1]) > 4, "nothing was pasted: choose another seed"
    views = [x.numpy() for x in images] + [x["image"].numpy() for x in batch]
    objects = [*objects, *(x["instances"] for x in batch)]
    expected = slow_losses(views, objects, [5, 12] * 2, flat_outputs(model), factor=1 / 4)
    for name in LOSSES:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-5), name


def test_warm_up_of_the_pairwise_loss():
    model = make_fixed(losses=FreeSOLOLossSettings(pairwise_warmup_iters=3)).train()
    full = make_fixed(losses=FreeSOLOLossSettings(pairwise_warmup_iters=0)).train()
    batch = two_view_batch()
    reference = full(batch)
    for step, factor in enumerate((1 / 3, 2 / 3, 1, 1), 1):
        losses = model(batch)
        assert model._iter.tolist() == [step]
        for name in LOSSES:
            share = factor if name == "loss_pairwise" else 1
            assert losses[name].item() == pytest.approx(share * reference[name].item(), rel=1e-6)
    model.reset_schedule()
    assert model(batch)["loss_pairwise"].item() == pytest.approx(
        reference["loss_pairwise"].item() / 3, rel=1e-6
    )
    model.eval()
    model([{"image": x["image"]} for x in batch * 2])
    assert model._iter.tolist() == [1], "inference is no step"


def test_bgr_input_has_the_color_edges_of_rgb():
    batch = two_view_batch()
    rng = np.random.default_rng(0)
    for x in batch:  # neighbours of nearly one colour
        blocks = torch.from_numpy(rng.integers(100, 108, (3, 16, 16)).astype(np.uint8))
        height, width = x["image"].shape[1:]
        blocks = blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :height, :width]
        x["image"] = x["strong_image"] = blocks
    flipped = [
        x | {k: x[k].flip(0) for k in ("image", "strong_image")} for x in copy.deepcopy(batch)
    ]
    rgb, bgr = make_fixed().train(), make_fixed(input_format="BGR").train()
    expected = rgb(batch)["loss_pairwise"].item()
    assert bgr(flipped)["loss_pairwise"].item() == expected
    assert make_fixed().train()(flipped)["loss_pairwise"].item() != expected


@pytest.mark.parametrize("bottom", [0, 10, 30])  # 60 of 50 rows
def test_bottom_rows_are_no_neighbours(bottom):
    settings = FreeSOLOLossSettings(bottom_pixels_removed=bottom)
    model = make_fixed(losses=settings, images=1, append_weak_view=False).train()
    (x,) = two_view_batch(sizes=((50, 60),), heights=(25,), counts=(2,))
    x["strong_image"] = torch.zeros(3, 50, 60, dtype=torch.uint8)
    mask = torch.zeros(1, 50, 60, dtype=torch.bool)
    mask[0, 24:, 8:28] = True
    x["instances"] = make_objects(mask)
    loss = model([x])["loss_pairwise"]
    rows = [y for y in range(16) if 4 * y + 2 < 50 - 2 * bottom]
    gradient = torch.autograd.grad(loss, model.mask_head.features)[0][0]
    # Centres in rows 6 to 12, neighbours two rows above and below.
    reached = gradient.abs().sum((0, 2)).nonzero()[:, 0].tolist()
    assert max(reached, default=0) == (min(12, rows[-1] + 2) if rows else 0)
    assert (loss > 0) == bool(rows)


# Inference with fixed predictions.


class ImageFeatures(nn.Module):
    stride = 4

    def forward(self, features):
        return F.avg_pool2d(features["image"][:, :1], 4)


class OneObject(FixedInstanceHead):
    """The cell 7 of the first level finds what is bright, for all images."""

    def __init__(self):
        super().__init__(1, 1, 6)
        for level in self.category:
            nn.init.constant_(level, -9)
        with torch.no_grad():
            self.category[0][0, 0, 1, 1] = 2.0
            self.kernel[0][:] = 1.0

    def forward(self, features, image_size):
        outputs = super().forward(features, image_size)
        b = len(features["image"])
        return tuple([x.expand(b, -1, -1, -1) for x in level] for level in outputs)


def bright_image(height, width, rows, columns):
    image = torch.full((3, height, width), 4.0)
    image[:, rows[0] : rows[1], columns[0] : columns[1]] = 16.0
    return image


def one_object_model(**changes):
    return make_fixed(instance_head=OneObject(), mask_head=ImageFeatures(), **changes).eval()


def test_an_image_gives_the_same_alone_and_padded_in_a_batch():
    model = one_object_model()
    small, large = bright_image(45, 70, (8, 24), (16, 40)), bright_image(96, 64, (0, 40), (8, 64))
    results = model([{"image": small}, {"image": large}])
    for image, result in zip((small, large), results, strict=True):
        (alone,) = model([{"image": image}])
        for name, value in alone["instances"].get_fields().items():
            other = result["instances"].get(name)
            if isinstance(value, Boxes):
                value, other = value.tensor, other.tensor
            torch.testing.assert_close(other, value, msg=name)
    boxes = [x["instances"].pred_boxes.tensor.tolist() for x in results]
    assert boxes == [[[16, 8, 40, 24]], [[8, 0, 64, 40]]]
    assert results[0]["instances"].scores.item() == pytest.approx(
        torch.tensor(2.0).sigmoid().item() * torch.tensor(6.0).sigmoid().item(), rel=1e-4
    )


def test_results_have_the_size_of_the_file():
    model = one_object_model()
    image = bright_image(45, 70, (8, 24), (16, 40))
    (result,) = model([{"image": image, "height": 90, "width": 210}])
    instances = result["instances"]
    assert instances.image_size == (90, 210)
    assert instances.pred_masks.shape == (1, 90, 210)
    assert instances.pred_boxes.tensor.tolist() == [[48, 16, 120, 48]]


def test_the_released_ratio_misplaces_what_is_padded_much():
    image = bright_image(9, 13, (0, 8), (4, 12))
    boxes = []
    for compat in (False, True):
        # One decision of many features: areas above 8 mask pixels would be missed here.
        model = one_object_model(inference=SoloInferenceSettings(compat=compat))
        model.ins_head.strides = (1, 1, 1)
        (result,) = model([{"image": image}])
        boxes.append(result["instances"].pred_boxes.tensor[0].tolist())
    assert boxes[0] == [4, 0, 12, 8]
    assert boxes[1] == pytest.approx([1.5, -0.5, 5.5, 3.5], abs=0.51)


def test_cells_need_masks_larger_than_the_stride_of_their_own_level():
    model = one_object_model()
    for columns, count in (((0, 16), 0), ((0, 20), 1)):  # 2 x 4 = 8 and 2 x 5 mask pixels
        (result,) = model([{"image": bright_image(64, 64, (0, 8), columns)}])
        assert len(result["instances"]) == count
    with torch.no_grad():
        model.ins_head.category[0].fill_(-9)
        model.ins_head.category[1][0, 0, 1, 1] = 2.0
        model.ins_head.kernel[1].fill_(1.0)
    for columns, count in (((0, 32), 0), ((0, 36), 1)):  # 16 and 18
        (result,) = model([{"image": bright_image(64, 64, (0, 8), columns)}])
        assert len(result["instances"]) == count


def test_cells_beside_a_better_one_are_left_out():
    model = one_object_model()
    with torch.no_grad():
        model.ins_head.category[0][0, 0, 1, 2] = 1.9  # its window ends in it and holds (1, 1)
        model.ins_head.category[0][0, 0, 3, 4] = 1.8
    (result,) = model([{"image": bright_image(64, 64, (0, 32), (0, 32))}])
    scores = result["instances"].category_scores.tolist()
    assert scores == pytest.approx(torch.tensor([2.0, 1.8]).sigmoid().tolist())


# The real model, narrow, on odd inputs.


def one_pixel_masks(n, height, width):
    """Also more than there are pixels; the last one is empty."""
    masks = torch.zeros(n, height * width, dtype=torch.bool)
    index = torch.arange(n - 1)
    masks[index, index * 7 % (height * width)] = True
    return masks.view(n, height, width)


CASES = {
    "plain": ([(64, 96), (64, 96)], [3, 2]),
    "no objects": ([(64, 64), (64, 64)], [0, 0]),
    "one without objects": ([(64, 64), (64, 64)], [0, 2]),
    "different sizes": ([(40, 96), (96, 33)], [2, 2]),
    "smaller than the grid": ([(9, 13), (12, 7)], [1, 1]),
    "one pixel": ([(1, 1), (3, 1)], [torch.ones(1, 1, 1).bool(), torch.ones(2, 3, 1).bool()]),
    "pixels as masks": ([(64, 64), (33, 41)], [one_pixel_masks(6, 64, 64), 1]),
    "many masks": ([(32, 40), (48, 48)], [513, 0]),
    "empty masks": ([(64, 64), (48, 48)], [torch.zeros(3, 64, 64).bool(), 1]),
}


@pytest.fixture(scope="module")
def model():
    return narrow_model()


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_learns_from_every_batch(model, name):
    sizes, objects = CASES[name]
    if name == "smaller than the grid":
        objects = [torch.ones(1, *size).bool() for size in sizes]
    model.train()
    model.zero_grad()
    losses = model(batch_of(sizes, objects))
    assert losses.keys() == LOSSES
    assert all(v.isfinite() and v.shape == () for v in losses.values())
    sum(losses.values()).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    learned = losses["loss_max_projection"].item() > 0
    assert learned == (name != "no objects")
    assert (model.ins_head.kernel_pred.weight.grad.abs().max() > 0) == learned


@pytest.mark.parametrize("size", [(64, 96), (9, 13), (1, 1), (33, 200)])
@pytest.mark.parametrize("threshold", [0.0, 0.99])
def test_inference_of_any_size(model, size, threshold):
    model.eval()
    inference = SoloInferenceSettings(score_thr=threshold, update_thr=0.0, nms_pre=50)
    kept, model.inference = model.inference, inference
    try:
        (result,) = model([{"image": batch_of([size], [0])[0]["image"], "height": 20, "width": 30}])
    finally:
        model.inference = kept
    instances = result["instances"]
    assert instances.image_size == (20, 30)
    assert instances.pred_masks.shape == (len(instances), 20, 30)
    assert instances.pred_embeddings.shape == (len(instances), 6)
    assert (instances.scores > 0).all()
    assert (len(instances) == 0) == (threshold == 0.99) or size != (64, 96)
    torch.testing.assert_close(
        instances.pred_embeddings.norm(dim=1), torch.ones(len(instances)), msg=str(size)
    )


def test_nan_in_an_image_gives_no_instances_and_spoils_no_other(model):
    model.eval()
    inference = SoloInferenceSettings(score_thr=0.0, update_thr=0.0, nms_pre=50)
    kept, model.inference = model.inference, inference
    batch = batch_of([(64, 64), (64, 64)], [0, 0], torch.float32)
    clean = model(batch)
    try:
        batch[0]["image"][1, 20, 30] = float("nan")
        spoiled = model(batch)
    finally:
        model.inference = kept
    assert len(spoiled[0]["instances"]) == 0
    expected, found = clean[1]["instances"], spoiled[1]["instances"]
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.scores, expected.scores)


def test_images_of_one_size_do_not_see_each_other(model):
    model.eval()
    inference = SoloInferenceSettings(score_thr=0.0, update_thr=0.0, nms_pre=20)
    kept, model.inference = model.inference, inference
    batch = batch_of([(64, 96), (64, 96)], [0, 0])
    try:
        together = model(batch)
        alone = [model([x])[0] for x in batch]
    finally:
        model.inference = kept
    for x, y in zip(together, alone, strict=True):
        assert len(x["instances"]) == len(y["instances"]) > 0
        torch.testing.assert_close(x["instances"].scores, y["instances"].scores)
        same = x["instances"].pred_masks == y["instances"].pred_masks
        assert same.float().mean() > 0.999


def test_bfloat16_autocast():
    model = narrow_model().train()
    batch = batch_of([(32, 64)] * 2, [2, 2])
    expected = model(batch)
    model.reset_schedule()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert value.item() == pytest.approx(expected[name].item(), rel=0.25, abs=0.02), name
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_inference_under_autocast_scores_in_float32(monkeypatch):
    model = narrow_model().eval()
    model.inference = SoloInferenceSettings(score_thr=0.0, update_thr=0.0, nms_pre=20)
    seen = []

    def spy(found, settings):
        seen.append((found.masks.dtype, found.scores.dtype, found.maskness.dtype))
        return suppress(found, settings)

    suppress = module.suppress
    monkeypatch.setattr(module, "suppress", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (result,) = model([{"image": batch_of([(64, 64)], [0])[0]["image"]}])
    assert len(result["instances"]) > 0
    assert seen == [(torch.float32,) * 3]
    for name in ("scores", "maskness", "category_scores", "pred_embeddings"):
        assert result["instances"].get(name).dtype == torch.float32


def test_a_step_is_a_function_of_weights_batch_and_seed():
    changes = {
        "MODEL__FREESOLO__DATA__COPY_PASTE": True,
        "MODEL__FREESOLO__DATA__APPEND_WEAK_VIEW": True,
    }
    runs = []
    for _ in range(2):
        model = narrow_model(**changes).train()
        torch.manual_seed(5)
        losses = model(two_view_batch(counts=(3, 3)))
        sum(losses.values()).backward()
        runs.append((losses, [p.grad for p in model.parameters()]))
    for name in LOSSES:
        assert torch.equal(runs[0][0][name], runs[1][0][name]), name
    for x, y in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(x, y)


def test_losses_are_computed_in_float32_under_autocast():
    batch = two_view_batch()
    expected = make_fixed().train()(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = make_fixed().train()(batch)
    for name in LOSSES:
        assert torch.equal(found[name], expected[name]), name


def test_empty_masks_teach_nothing_whatever_their_box():
    batch = two_view_batch()
    expected = make_fixed().train()(batch)
    for x in batch:
        objects = x["instances"]
        masks = objects.gt_masks.tensor
        more = make_objects(
            torch.cat([masks, torch.zeros_like(masks[:1])]),
            boxes=torch.cat([objects.gt_boxes.tensor, torch.tensor([[0.0, 0, 40, 40]])]),
        )
        more.gt_embeddings[: len(objects)] = objects.gt_embeddings
        x["instances"] = more
    found = make_fixed().train()(batch)
    for name in LOSSES:
        assert torch.equal(found[name], expected[name]), name


def test_embeddings_may_be_missing():
    model = make_fixed().train()
    batch = two_view_batch()
    for x in batch:
        x["instances"].remove("gt_embeddings")
    losses = model(batch)
    assert losses["loss_semantic"] == 0
    assert losses["loss_pairwise"] > 0


def test_the_config_decides_about_views_and_losses():
    cfg = narrow_config(
        MODEL__FREESOLO__DATA__COPY_PASTE=True,
        MODEL__FREESOLO__DATA__COPY_PASTE_MAX_OVERLAP=0.4,
        MODEL__FREESOLO__DATA__APPEND_WEAK_VIEW=True,
        MODEL__FREESOLO__LOSS__SEMANTIC_WEIGHT=0.0,
        MODEL__FREESOLO__COMPAT=True,
        MODEL__FREESOLO__SIGMA=0.3,
        INPUT__FORMAT="BGR",
    )
    options = FreeSOLO.from_config(cfg)
    assert options["copy_paste_overlap"] == 0.4
    assert options["append_weak_view"] is True
    assert options["losses"].semantic_weight == 0
    assert options["inference"].compat is True
    assert options["grid"].sigma == 0.3
    assert list(options["grid"].num_grids) == [20, 12, 8]
    assert [list(r) for r in options["grid"].scale_ranges] == [[1, 36], [24, 72], [48, 400]]
    assert options["input_format"] == "BGR"
    assert FreeSOLO.from_config(narrow_config())["copy_paste_overlap"] is None
