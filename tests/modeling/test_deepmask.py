"""DeepMask's inference: planted squares, the pyramid's coordinates, patches, settings."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from deepmask_cases import BlockMeans, SquareHead, build, config, patches, scene, square_finder
from detectron2.modeling import build_model

from unseg.modeling import DeepMask
from unseg.modeling.proposals import ProposalSettings
from unseg.modeling.proposals.deepmask_geometry import GREY, PatchGeometry
from unseg.modeling.proposals.deepmask_losses import DeepMaskLosses


def best(model, image, **sizes):
    """Box and mask of the best proposal."""
    proposals = model([{"image": image, **sizes}])[0]["proposals"]
    return proposals.proposal_boxes.tensor[0].tolist(), proposals.pred_masks[:1].tensor[0]


# Planted objects.


@pytest.mark.parametrize("center", [(16, 16), (48, 24), (24, 80), (88, 8), (8, 88), (96, 96)])
def test_the_window_at_a_place_is_centred_on_multiples_of_the_stride(center):
    x, y = center
    box = [x - 8, y - 8, x + 8, y + 8]
    height, width = 104 if y > 90 else 101, 104 if x > 90 else 99
    image = scene(height, width, [box])
    found, mask = best(square_finder(topk=1), image)
    assert found == box
    assert (mask ^ (image[0] > 0)).sum() <= 24  # interpolation rounds the corners off
    # What this would look like half a stride off: no test of boxes with a margin.
    assert found != [v + 4 for v in box]


@pytest.mark.parametrize("size", [(96, 128), (97, 131), (101, 99)])
@pytest.mark.parametrize(("scale", "side"), [(-1.0, 32), (0.0, 16), (1.0, 8)])
def test_an_object_is_found_at_the_scale_of_its_size(scale, side, size):
    """By a pyramid of three scales, each of which alone finds its own size only."""
    step = round(8 / 2.0**scale)
    box = [3 * step - side // 2, 2 * step - side // 2, 3 * step + side // 2, 2 * step + side // 2]
    image = scene(*size, [box])
    for scales in ((-1.0, 0.0, 1.0), (1.0, 0.0, -1.0), (scale,)):
        found, mask = best(square_finder(scales, topk=1), image)
        # Sizes are rounded: a window may be off by a fraction of a pixel.
        np.testing.assert_allclose(found, box, atol=1)
        wanted = image[0] > 0
        assert (mask & wanted).sum() / (mask | wanted).sum() > 0.85
    others = [s for s in (-1.0, 0.0, 1.0) if s != scale]
    logit = {}
    for s in (scale, *others):
        output = square_finder((s,), topk=1, mask_threshold=1e-6)([{"image": image}])[0]
        logit[s] = output["proposals"].objectness_logits[0]
    assert all(logit[scale] > logit[s] + 2 for s in others)


def test_output_sizes_scale_both_axes_by_themselves():
    image = scene(96, 64, [[24, 40, 40, 56]])
    found, _ = best(square_finder(topk=1), image, height=192, width=32)
    assert found == [12, 80, 20, 112]
    output = square_finder()([{"image": image, "height": 192, "width": 32}])[0]
    for name in ("proposals", "instances"):
        assert output[name].image_size == (192, 32)
    assert output["proposals"].pred_masks.tensor.shape[1:] == (192, 32)


def test_rounded_sizes_have_their_own_factors():
    """9x99 pixels at 2^-1 are 4x50 (of 4.5 and 49.5): y by 4/9, x by 50/99."""
    model = square_finder((-1.0,), topk=1000)
    windows = model([{"image": torch.full((3, 9, 99), 255, dtype=torch.uint8)}])[0]["proposals"]
    boxes = windows.pred_masks.boxes.double()
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    sides = boxes[:, 2:] - boxes[:, :2]
    fy, fx = round(9 / 2) / 9, round(99 / 2) / 99
    wanted = torch.tensor([32 / fx, 32 / fy], dtype=torch.float64)
    torch.testing.assert_close(sides, wanted.expand_as(sides), atol=1e-4, rtol=0)
    steps = centers * torch.tensor([fx, fy], dtype=torch.float64) / 8
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(90, 63), (1, 1), (8, 16), (33, 40)])
def test_no_window_is_lost(size):
    """ceil((h + 32) / 8) - 3 rows; what is beyond the image is grey before normalisation."""
    model = square_finder(topk=100000)
    levels = []
    original = model._encode_scale
    model._encode_scale = lambda image: levels.append(original(image)) or levels[-1]
    model([{"image": torch.full((3, *size), 255, dtype=torch.uint8)}])
    rows, columns = (math.ceil((side + 32) / 8) - 3 for side in size)
    assert levels[0].scores.shape == (1, rows, columns)
    seen = model.backbone.seen[0]
    assert seen.shape[2] % 8 == 0
    assert seen.shape[3] % 8 == 0
    inside = seen[0, 0, 16 : 16 + size[0], 16 : 16 + size[1]]
    assert torch.equal(inside, torch.ones(size))  # white
    assert seen.sum() == 3 * size[0] * size[1]  # and grey, which is 0 here


def test_grey_is_raw():
    model = build().eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model([{"image": torch.zeros(3, 24, 24, dtype=torch.uint8)}])
    for channel, (mean, std) in enumerate(((100, 60), (110, 55), (120, 50))):
        assert seen[-1][0, channel, 0, 0].item() == pytest.approx((GREY - mean) / std)
        assert seen[-1][0, channel, 20, 20].item() == pytest.approx(-mean / std)


def test_grid_of_the_released_sizes():
    geometry = PatchGeometry()
    assert geometry.cells(16) == 10
    assert geometry.object_size == 92  # ceil(160 * 128 / 224)
    assert PatchGeometry(input_size=224, context=0).object_size == 128
    assert PatchGeometry(object_size=70).object_size == 70
    assert geometry.grid(90, 63, 16) == (7, 5)
    assert geometry.padding(90, 63, 16) == (80, 80 + 1, 80, 80 + 6)
    assert geometry.patch_size == 192


# Which windows, and what of them.


def test_masks_of_the_chosen_windows_only():
    image = scene(96, 96, [[8, 8, 24, 24], [56, 40, 72, 56]])
    model = square_finder((-0.5, 0.0), topk=3)
    proposals = model([{"image": image}])[0]["proposals"]
    assert sum(len(x) for x in model.head.asked) == 3
    boxes = proposals.proposal_boxes.tensor[:2].tolist()
    assert sorted(boxes) == [[8, 8, 24, 24], [56, 40, 72, 56]]
    logits = proposals.objectness_logits
    assert logits.dtype == torch.float32
    assert logits.tolist() == sorted(logits.tolist(), reverse=True)


def test_the_best_of_all_scales_are_taken():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
    scales = (-1.0, -0.5, 0.0, 0.5)
    # Every window, by one model per scale.
    alone = []
    for scale in scales:
        out = square_finder((scale,), topk=10**6, mask_threshold=1e-6)([{"image": image}])
        masks = out[0]["proposals"].pred_masks
        alone += zip(
            out[0]["proposals"].objectness_logits.tolist(),
            masks.boxes.tolist(),
            masks.probabilities.tolist(),
        )
    alone.sort(key=lambda x: -x[0])
    out = square_finder(scales, topk=50, mask_threshold=1e-6)([{"image": image}])
    got = out[0]["proposals"]
    assert len(got) == 50
    for (logit, box, mask), n in zip(alone, range(50)):
        assert got.objectness_logits[n].item() == pytest.approx(logit, abs=1e-5)
        np.testing.assert_allclose(got.pred_masks.boxes[n], box, atol=1e-4)
        np.testing.assert_allclose(got.pred_masks.probabilities[n], mask, atol=1e-5)


def test_empty_masks_are_dropped_and_nothing_may_be_left():
    dark = torch.zeros(3, 40, 40, dtype=torch.uint8)
    output = square_finder(mask_threshold=0.6)([{"image": dark}])[0]
    assert len(output["proposals"]) == len(output["instances"]) == 0
    assert output["proposals"].proposal_boxes.tensor.shape == (0, 4)


def test_outputs_of_a_real_model_in_eval_mode():
    model = build(DROPOUT=0.5, TEST__TOPK=40).eval()
    image = torch.randint(0, 256, (3, 45, 61), dtype=torch.uint8)
    inputs = [{"image": image}, {"image": image[:, :30], "height": 60, "width": 122}]
    outputs = model(inputs)
    assert [len(x["proposals"]) for x in outputs] == [40, 40]
    again = model(inputs[:1])[0]["proposals"]  # dropout is off
    first = outputs[0]["proposals"]
    assert torch.equal(again.objectness_logits, first.objectness_logits)
    assert torch.equal(again.pred_masks.probabilities, first.pred_masks.probabilities)
    assert not first.objectness_logits.requires_grad
    instances = outputs[0]["instances"]
    torch.testing.assert_close(instances.scores, first.objectness_logits.sigmoid())
    assert not instances.pred_classes.any()


@pytest.mark.parametrize("kind", ["shared", "paper", "full"])
def test_crop_then_convolve_is_convolve_then_crop(kind):
    model = build(HEAD=kind, CONTEXT=32).eval()
    x = patches([1, -1, 1], side=64)["patches"]
    with torch.no_grad():
        images = model.encode(x, in_patches=True)
        maps = model.backbone((x - model.pixel_mean) / model.pixel_std)["res3"]
        assert maps.shape[-2:] == (8, 8)
        whole = model.head.encode(maps)
        scores = model.head.scores(whole)
        places = torch.tensor([[0, 2, 2], [1, 2, 2], [2, 2, 2]])
        assert images.scores.shape == (3, 1, 1)
        assert scores.shape == (3, 5, 5)
        torch.testing.assert_close(images.scores[:, 0, 0], scores[:, 2, 2])
        cropped = model.mask_logits(images, places * torch.tensor([1, 0, 0]))
        torch.testing.assert_close(cropped, model.head.masks(whole, places))
    assert not torch.allclose(scores[:, 2, 2], scores[:, 1, 2])


def upsampled(mask, size, align_corners):
    """Bilinear upsampling of (m, m), written out in float64."""
    m = len(mask)
    result = np.zeros((size, size))
    for r in range(size):
        for c in range(size):
            at = []
            for p in (r, c):
                x = p * (m - 1) / (size - 1) if align_corners else (p + 0.5) * m / size - 0.5
                x = min(max(x, 0.0), m - 1.0)
                low = min(int(x), m - 2)
                at.append((low, x - low))
            (i, u), (j, v) = at
            result[r, c] = (1 - u) * ((1 - v) * mask[i, j] + v * mask[i, j + 1]) + u * (
                (1 - v) * mask[i + 1, j] + v * mask[i + 1, j + 1]
            )
    return result


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("labels", [[1, -1, 1], [-1]])
def test_patches_of_an_evaluation(labels, align_corners):
    model = build(ALIGN_CORNERS=align_corners).eval()
    x = patches(labels) | {"image": torch.zeros(3, 20, 20, dtype=torch.uint8)}
    output = model([x])[0]
    logits, scores = output["patch_logits"], output["patch_scores"]
    assert logits.shape == (len(labels), 12, 12)
    assert scores.shape == (len(labels),)
    assert logits.dtype == scores.dtype == torch.float32
    assert output["proposals"].pred_masks.align_corners == align_corners
    with torch.no_grad():
        images = model.encode(x["patches"], in_patches=True)
        for n in range(len(labels)):
            mask = model.head.masks(images.encoded, torch.tensor([[n, 0, 0]]))[0].numpy()
            wanted = upsampled(mask.astype(np.float64), 12, align_corners)
            np.testing.assert_allclose(logits[n], wanted, atol=1e-4, rtol=1e-5)
            assert scores[n] == pytest.approx(images.scores[n, 0, 0].item())


def test_half_precision_ranks_in_float32():
    model = build(TEST__TOPK=100).eval()
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model([{"image": image} | patches([1])])[0]
    assert output["proposals"].objectness_logits.dtype == torch.float32
    assert output["proposals"].pred_masks.probabilities.dtype == torch.float32
    assert output["patch_logits"].dtype == output["patch_scores"].dtype == torch.float32


def test_mirror_padding_by_the_config():
    x = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    found = {}
    for mode in ("zeros", "symmetric", "port"):
        model = build(PAD_MODE=mode, TEST__TOPK=5).eval()
        found[mode] = model([{"image": x}])[0]["proposals"].objectness_logits
    assert not torch.allclose(found["zeros"], found["symmetric"])
    assert not torch.allclose(found["port"], found["symmetric"])


# Settings.


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("INPUT_SIZE must be even", {"INPUT_SIZE": 33}),
        ("INPUT_SIZE must be a multiple of 8, the stride", {"INPUT_SIZE": 36}),
        ("CONTEXT must be a multiple of 16, twice the stride", {"CONTEXT": 8}),
        ("CONTEXT must not be negative: -16", {"CONTEXT": -16}),
        ("INPUT_SIZE must be positive", {"INPUT_SIZE": 0}),
        ("OUT_SIZE must be positive", {"OUT_SIZE": 0}),
        ("GT_SIZE must be positive", {"GT_SIZE": 0}),
        ("OBJECT_SIZE must not be negative", {"OBJECT_SIZE": -1}),
        ("IN_FEATURE must be one of the backbone's maps, res3: 'res4'", {"IN_FEATURE": "res4"}),
        ("HEAD must be one of", {"HEAD": "half"}),
        ("even multiple of the trunk's stride", {"HEAD": "paper", "INPUT_SIZE": 40}),
        ("PAD_MODE must be one of", {"PAD_MODE": "ring"}),
        ("LOSS_REDUCTION must be one of sum, mean: 'max'", {"LOSS_REDUCTION": "max"}),
        ("TRAIN_MODE must be one of joint, alternate", {"TRAIN_MODE": "both"}),
        ("SCORE_WEIGHT must not be negative", {"SCORE_WEIGHT": -1.0}),
        ("SCALES must be numbers", {"TEST__SCALES": []}),
        ("SCALES must be numbers", {"TEST__SCALES": [float("nan")]}),
        ("TOPK", {"TEST__TOPK": 0}),
    ],
)
def test_bad_settings_name_the_key(message, changes):
    with pytest.raises(ValueError, match=message):
        build_model(config(**changes))


def test_parts_that_do_not_fit_are_refused():
    def model(geometry, backbone=None, in_feature="mean"):
        return DeepMask(
            backbone=backbone or BlockMeans(),
            head=SquareHead(),
            geometry=geometry,
            in_feature=in_feature,
            losses=DeepMaskLosses(),
            scales=(0.0,),
            inference=ProposalSettings(),
            pixel_mean=[0.0] * 3,
            pixel_std=[1.0] * 3,
        )

    with pytest.raises(ValueError, match="INPUT_SIZE is 6 cells .* the head is for 4"):
        model(PatchGeometry(input_size=48, context=0, out_size=4))
    with pytest.raises(ValueError, match="OUT_SIZE is 5, the head's 4"):
        model(PatchGeometry(input_size=32, context=0, out_size=5))
    with pytest.raises(ValueError, match="IN_FEATURE"):
        model(PatchGeometry(input_size=32, context=0, out_size=4), in_feature="res3")

    class Coarse(BlockMeans):
        size_divisibility = 64

    with pytest.raises(ValueError, match=r"INPUT_SIZE \+ CONTEXT must be a multiple of 64.*: 32"):
        model(PatchGeometry(input_size=32, context=0, out_size=4), Coarse())


def test_backbones_that_want_larger_multiples():
    """An FPN at stride 8 that wants multiples of 32: the same windows as ever."""

    class Coarse(BlockMeans):
        size_divisibility = 32

        def forward(self, x):
            assert x.shape[2] % 32 == 0
            assert x.shape[3] % 32 == 0
            return super().forward(x)

    image = scene(70, 50, [[16, 40, 32, 56]])
    fine, coarse = (square_finder(topk=10**6, mask_threshold=1e-6) for _ in range(2))
    coarse.backbone, coarse.divisibility = Coarse(), 32
    a, b = (m([{"image": image}])[0]["proposals"] for m in (fine, coarse))
    assert torch.equal(a.pred_masks.boxes, b.pred_masks.boxes)
    assert torch.equal(a.objectness_logits, b.objectness_logits)
    assert F.l1_loss(a.pred_masks.probabilities, b.pred_masks.probabilities) == 0
