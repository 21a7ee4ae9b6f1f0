"""The exemplar loss in Mask R-CNN, and the pyramid that also returns what it is built on."""

import copy

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    FPN,
    ROI_MASK_HEAD_REGISTRY,
    StandardROIHeads,
    build_backbone,
    build_model,
    build_roi_heads,
)
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from exemplar_cases import (
    contrast_slowly,
    embed_slowly,
    make_pool,
    narrow_config,
    noise_images,
    shake_norms,
)
from freesolo_cases import batch_of
from torch import nn
from torchvision.ops import roi_align

from unseg.config import load_config
from unseg.modeling import (
    ExemplarFeatureError,
    FPNWithBottomUp,
    find_exemplar_head,
    with_exemplars,
)

RCNN = "projects/ExemplarFreeSOLO/configs/exemplar_rcnn_tiny.yaml"
# Narrow enough for seconds.
NARROW = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.EXEMPLAR.ALPHA": 0.0,
    "MODEL.EXEMPLAR.BETA": 0.0,
}


def rcnn_config(**changes):
    options = NARROW | {k.replace("__", "."): v for k, v in changes.items()}
    return load_config(RCNN, [x for item in options.items() for x in item])


@pytest.fixture(autouse=True)
def storage():
    with EventStorage() as storage:
        yield storage


def make_heads(channels=5, **changes):
    """ROI heads on a map "far" of stride 16, with masks read from p2 to p5."""
    cfg = rcnn_config(MODEL__EXEMPLAR__IN_FEATURE="far", **changes)
    shapes = {f"p{k}": ShapeSpec(channels=32, stride=2**k) for k in (2, 3, 4, 5)}
    torch.manual_seed(0)
    heads = build_roi_heads(cfg, shapes | {"far": ShapeSpec(channels=channels, stride=16)})
    if changes.get("MODEL__EXEMPLAR__WEIGHT", 1):
        generator = torch.Generator().manual_seed(4)
        heads.exemplars.pool_embeddings = torch.randn(4, channels, generator=generator)
    return heads.train()


def make_features(images=2, channels=5):
    generator = torch.Generator().manual_seed(5)
    sizes = {f"p{k}": (32, 128 // 2**k) for k in (2, 3, 4, 5)} | {"far": (channels, 8)}
    return {
        k: torch.randn(images, c, side, side, generator=generator).requires_grad_()
        for k, (c, side) in sizes.items()
    }


def make_proposals(classes):
    """Boxes in images of 128 x 128 pixels with these classes of objects."""
    generator = torch.Generator().manual_seed(6)
    result = []
    for own in classes:
        x = Instances((128, 128), gt_classes=torch.tensor(own, dtype=torch.int64))
        corners = torch.rand(len(own), 2, generator=generator) * 60
        sides = 20 + torch.rand(len(own), 2, generator=generator) * 80
        x.proposal_boxes = x.gt_boxes = Boxes(torch.cat([corners, corners + sides], dim=1))
        x.gt_masks = BitMasks(torch.rand(len(own), 128, 128, generator=generator) < 0.5)
        result.append(x)
    return result


def slow_exemplar_loss(heads, features, proposals, num_classes):
    """Of foreground proposals; ROIAlign is torchvision's."""
    rows = []
    for b, own in enumerate(proposals):
        for box, label in zip(own.proposal_boxes.tensor, own.gt_classes.tolist(), strict=True):
            if label == num_classes:
                continue
            maps = [features[f"p{k}"][b : b + 1] for k in (2, 3, 4, 5)]
            logits = heads.mask_head.layers(heads.mask_pooler(maps, [Boxes(box[None])]))[0]
            roi = torch.cat([torch.zeros(1), box])[None]
            cells = roi_align(features["far"][b : b + 1], roi, 7, 1 / 16, 0, aligned=True)[0]
            mask = logits[0 if len(logits) == 1 else label].double().sigmoid()
            rows.append(embed_slowly(cells, mask))
    head = heads.exemplars
    return contrast_slowly(rows, head.pool_embeddings, head.alpha, head.beta, head.temperature)


@pytest.mark.parametrize(("num_classes", "agnostic"), [(1, False), (3, False), (3, True)])
def test_loss_of_foreground_proposals(num_classes, agnostic):
    changes = {
        "MODEL__ROI_HEADS__NUM_CLASSES": num_classes,
        "MODEL__ROI_MASK_HEAD__CLS_AGNOSTIC_MASK": agnostic,
        "MODEL__EXEMPLAR__TEMPERATURE": 0.5,
    }
    heads = make_heads(**changes)
    nn.init.normal_(heads.mask_head.predictor.weight, std=0.5)
    features = make_features()
    classes = [[0, num_classes, num_classes - 1, 0], [num_classes - 1, 0, num_classes]]
    proposals = make_proposals(classes)
    found = heads._forward_mask(features, proposals)
    expected, numbers = slow_exemplar_loss(heads, features, proposals, num_classes)
    assert numbers["used"] >= 3
    assert heads.exemplars.tally.tolist() == list(numbers.values())
    assert found["loss_exemplar"].item() == pytest.approx(1.3 * expected.item(), rel=1e-4)
    inputs = [features["far"], features["p2"], heads.mask_head.predictor.weight]
    gradients = torch.autograd.grad(found["loss_exemplar"], inputs)
    slow = torch.autograd.grad(1.3 * expected, inputs)
    for x, y in zip(gradients, slow, strict=True):
        assert y.abs().max() > 1e-4
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("classes", [[[0, 1, 0], [0]], [[1, 1], [1]], [[], []]])
def test_mask_loss_is_that_of_standard_heads(classes):
    heads = make_heads()
    heads.mask_head.loss_weight = 0.7
    features, proposals = make_features(), make_proposals(classes)
    expected = StandardROIHeads._forward_mask(heads, features, copy.deepcopy(proposals))
    found = heads._forward_mask(features, proposals)
    assert found.keys() == {"loss_mask", "loss_exemplar"}
    assert expected.keys() == {"loss_mask"}
    assert torch.equal(found["loss_mask"], expected["loss_mask"])
    foreground = any(label == 0 for own in classes for label in own)
    assert (found["loss_mask"] > 0) == (found["loss_exemplar"] > 0) == foreground
    sum(found.values()).backward()
    assert all(p.grad.isfinite().all() for p in heads.mask_head.parameters())


def test_loss_in_bfloat16():
    heads = make_heads()
    features, proposals = make_features(), make_proposals([[0, 0], [0, 0]])
    expected = heads._forward_mask(features, proposals)["loss_exemplar"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = heads._forward_mask(features, proposals)["loss_exemplar"]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=0.05)
    assert expected > 0


@ROI_MASK_HEAD_REGISTRY.register()
class OddMaskHead(nn.Module):
    """Whose steps are not known."""

    def __init__(self, cfg, shapes):
        super().__init__()


# The whole model.


def rcnn(seed=0, **changes):
    torch.manual_seed(seed)
    return build_model(rcnn_config(**changes)).train()


def losses_and_gradients(model):
    torch.manual_seed(1)  # of the sampled proposals
    batch = batch_of([(64, 96), (96, 64)], [3, 2])
    losses = model(batch)
    sum(losses.values()).backward()
    return losses, {k: p.grad for k, p in model.named_parameters()}


STANDARD = {
    "MODEL__ROI_HEADS__NAME": "StandardROIHeads",
    "MODEL__BACKBONE__NAME": "build_resnet_fpn_backbone",
}


def test_with_weight_0_they_are_the_standard_heads():
    ours, theirs = rcnn(MODEL__EXEMPLAR__WEIGHT=0.0), rcnn(**STANDARD)
    assert type(theirs.roi_heads) is StandardROIHeads
    assert list(ours.state_dict()) == list(theirs.state_dict())
    (losses, gradients), (expected, slow) = (losses_and_gradients(x) for x in (ours, theirs))
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[k], expected[k]) for k in expected)
    assert all(torch.equal(gradients[k], slow[k]) for k in slow)
    assert find_exemplar_head(ours) is None


def test_the_loss_comes_beside_the_others_and_reaches_masks_and_backbone():
    model = with_exemplars(rcnn(), make_pool(4), update_period=1)
    head = model.roi_heads.exemplars
    losses, _ = losses_and_gradients(rcnn(**STANDARD))
    found, _ = losses_and_gradients(model)
    assert found.keys() == losses.keys() | {"loss_exemplar"}
    assert all(torch.equal(found[k], losses[k]) for k in losses)
    assert head.pool_embeddings.shape == (
        4,
        model.backbone.output_shape()[head.in_feature].channels,
    )
    # Every embedding has a positive and a negative: features are not negative.
    ones = torch.ones_like(head.pool_embeddings[:1])
    head.encoder.period, head.pool_embeddings = 0, torch.cat([ones, -ones])
    model.zero_grad()
    torch.manual_seed(1)
    model(batch_of([(64, 96)], [3]))["loss_exemplar"].backward()
    touched = {k for k, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    deep = f"backbone.bottom_up.{head.in_feature}.0.conv1.weight"
    assert {"roi_heads.mask_head.predictor.weight", deep} <= touched
    assert not any("box" in k for k in touched)


def test_inference_is_that_of_standard_heads_and_needs_no_pool():
    changes = {"MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.0}
    ours, theirs = shake_norms(rcnn(**changes)), rcnn(seed=3, **STANDARD, **changes)
    theirs.load_state_dict(ours.state_dict())
    batch = [{"image": x["image"]} for x in batch_of([(64, 96)], [0])]
    (x,), (y,) = ours.eval()(batch), theirs.eval()(batch)
    assert len(y["instances"]) > 0
    for name, value in y["instances"].get_fields().items():
        other = x["instances"].get(name)
        assert torch.equal(getattr(other, "tensor", other), getattr(value, "tensor", value))


def test_what_it_cannot_do_is_said():
    odd = {"MODEL__ROI_MASK_HEAD__NAME": "OddMaskHead"}
    for changes in (
        {"MODEL__MASK_ON": False},
        odd,
        odd | {"MODEL__ROI_MASK_HEAD__POOLER_TYPE": ""},
    ):
        with pytest.raises(ValueError, match=r"needs MODEL\.MASK_ON and a pooled mask head"):
            make_heads(**changes)
    with pytest.raises(ExemplarFeatureError, match=r"'res6' is none .*res5\)"):
        rcnn(MODEL__EXEMPLAR__IN_FEATURE="res6")
    with pytest.raises(ExemplarFeatureError, match="training needs an exemplar pool"):
        losses_and_gradients(rcnn())


# The pyramid that also returns what it is built on.


@pytest.mark.parametrize("levels", [["res2", "res3", "res4"], ["res3", "res4", "res5"]])
def test_pyramid_with_what_it_is_built_on(levels):
    whole = levels[-1] == "res5"
    changes = {
        "MODEL__RESNETS__OUT_FEATURES": ["stem", *levels],
        "MODEL__FPN__IN_FEATURES": levels,
    }
    name = f"build_resnet_fpn_{'' if whole else 'no_top_'}backbone"
    plain = build_backbone(narrow_config(MODEL__BACKBONE__NAME=name, **changes)).eval()
    torch.manual_seed(9)
    both = build_backbone(narrow_config(**changes)).eval()
    assert isinstance(both, FPNWithBottomUp)
    assert type(plain) is FPN
    assert list(both.state_dict()) == list(plain.state_dict())
    shake_norms(plain)
    both.load_state_dict(plain.state_dict())
    images = noise_images(size=64)
    with torch.no_grad():
        expected = {**plain(images), **plain.bottom_up(images)}
        found = both(images)
    pyramid = ["p3", "p4", "p5", "p6"] if whole else ["p2", "p3", "p4"]
    assert found.keys() == expected.keys() == {*pyramid, "stem", *levels}
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    shapes = both.output_shape()
    assert shapes.keys() == found.keys()
    for k, shape in shapes.items():
        assert found[k].shape[1] == shape.channels, k
        assert found[k].shape[2] == 64 // shape.stride, k
    assert both.size_divisibility == plain.size_divisibility == (32 if whole else 16)
    assert not both.bottom_up._forward_hooks


def test_no_hook_is_left_after_an_error():
    backbone = build_backbone(narrow_config())
    for broken in (torch.zeros(1, 4, 64, 64), torch.zeros(1, 3, 50, 50)):  # below, and above it
        with pytest.raises((RuntimeError, AssertionError)):
            backbone(broken)
        assert not backbone.bottom_up._forward_hooks
    assert np.isfinite(backbone(noise_images(size=64))["res4"].detach().numpy()).all()
