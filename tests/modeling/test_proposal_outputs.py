"""Proposals from windows: ranking, suppression, outputs, against a greedy loop over pixels."""

import math

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st

from unseg.config import get_cfg
from unseg.modeling.proposals import ProposalSettings, as_outputs, make_proposals
from unseg.structures import WindowMasks

SIZE = (24, 30)


def random_windows(seed, count=12):
    """Windows on few places, so that many overlap; some masks are empty, some logits equal."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(count, 3, 3, generator=generator)
    probabilities[torch.rand(count, generator=generator) < 0.2] *= 0.1
    corners = torch.randint(-4, 14, (count, 2), generator=generator).float()
    sides = torch.randint(6, 12, (count, 1), generator=generator).float()
    logits = torch.randint(-3, 4, (count,), generator=generator).float()
    boxes = torch.cat([corners, corners + sides], dim=1)
    return WindowMasks(probabilities, boxes, SIZE, 0.5), logits


def tight(mask):
    """Bool array of the pixels of a mask's box."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    box = np.zeros_like(mask)
    box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return box


def greedy(masks, logits, settings):
    """Indices of the proposals, from the definition: exact IoU of pixels, one after the other."""
    dense = masks.tensor.numpy()
    order = sorted(range(len(logits)), key=lambda n: (-logits[n].item(), n))
    kept = []
    for n in order:
        if not dense[n].any():
            continue
        regions = {"none": None, "box": tight, "mask": lambda mask: mask}[settings.nms_type]
        clash = False
        for other in kept if regions else ():
            a, b = regions(dense[n]), regions(dense[other])
            clash |= (a & b).sum() / (a | b).sum() > settings.nms_threshold
        if not clash:
            kept.append(n)
    return kept[: settings.topk]


@pytest.mark.parametrize("nms_type", ["none", "box", "mask"])
@given(
    seed=st.integers(0, 10**6),
    threshold=st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]),
    topk=st.sampled_from([1, 4, 100]),
)
@settings(deadline=None, max_examples=40)
def test_against_a_greedy_loop(nms_type, seed, threshold, topk):
    masks, logits = random_windows(seed)
    chosen = ProposalSettings(topk, 0.5, nms_type, threshold)
    expected = greedy(masks, logits, chosen)
    proposals = make_proposals(masks, logits.double(), chosen)
    assert proposals.image_size == SIZE
    assert proposals.objectness_logits.dtype == torch.float32
    assert proposals.objectness_logits.tolist() == logits[expected].tolist()
    assert isinstance(proposals.pred_masks, WindowMasks)
    assert torch.equal(proposals.pred_masks.boxes, masks.boxes[expected])
    assert torch.equal(proposals.pred_masks.probabilities, masks.probabilities[expected])
    assert isinstance(proposals.proposal_boxes, Boxes)
    dense = masks.tensor.numpy()
    for n, (x0, y0, x1, y1) in zip(expected, proposals.proposal_boxes.tensor.int().tolist()):
        box = np.zeros(SIZE, bool)
        box[y0:y1, x0:x1] = True
        assert np.array_equal(box, tight(dense[n]))


def two_squares(logits=(1.0, 1.0)):
    """Corner-aligned, so exactly their windows: 10 x 10 and 10 x 8 in it, IoU .8."""
    boxes = torch.tensor([[2.0, 2, 12, 12], [2, 2, 12, 10]])
    return WindowMasks(torch.ones(2, 2, 2), boxes, SIZE, 0.5, True), torch.tensor(logits)


@pytest.mark.parametrize("nms_type", ["box", "mask"])
def test_an_overlap_of_exactly_the_threshold_stays(nms_type):
    masks, logits = two_squares()
    assert len(make_proposals(masks, logits, ProposalSettings(9, 0.5, nms_type, 0.8))) == 2
    lower = ProposalSettings(9, 0.5, nms_type, 0.7999999)
    (left,) = make_proposals(masks, logits, lower).pred_masks
    assert torch.equal(left, masks.tensor[0])  # of equal ones the first


def test_box_and_mask_suppression_differ():
    """Two diagonals of one square share their box and no pixel."""
    soft = torch.eye(2).expand(2, 2, 2).clone()
    soft[1] = soft[1].flip(0)
    masks = WindowMasks(soft, torch.tensor([[4.0, 4, 12, 12]] * 2), SIZE, 0.6)
    logits = torch.tensor([0.0, 1.0])
    found = {
        kind: make_proposals(masks, logits, ProposalSettings(9, 0.6, kind, 0.5)).objectness_logits
        for kind in ("none", "box", "mask")
    }
    assert {k: v.tolist() for k, v in found.items()} == {
        "none": [1, 0],
        "box": [1],
        "mask": [1, 0],
    }


def test_ranked_where_probabilities_are_equal():
    """Sigmoid is 1 for both, in half precision the logits are equal too: the higher is first."""
    masks, _ = two_squares()
    logits = torch.tensor([40.0, 40.001])
    proposals = make_proposals(masks, logits, ProposalSettings())
    assert torch.equal(proposals.objectness_logits, logits.flip(0))
    outputs = as_outputs(proposals)
    assert outputs["instances"].scores.tolist() == [1, 1]
    assert torch.equal(outputs["instances"].pred_masks.boxes, masks.boxes.flip(0))


def test_empty_masks_take_no_place():
    masks, logits = two_squares((5.0, 1.0))
    masks.probabilities[0] = 0.1
    (logit,) = make_proposals(masks, logits, ProposalSettings(topk=1)).objectness_logits.tolist()
    assert logit == 1
    masks.probabilities[:] = 0.1
    for kind in ("none", "box", "mask"):
        nothing = make_proposals(masks, logits, ProposalSettings(nms_type=kind))
        assert len(nothing) == 0
        assert nothing.proposal_boxes.tensor.shape == (0, 4)
        assert len(as_outputs(nothing)["instances"]) == 0
        assert len(make_proposals(masks[:0], logits[:0], ProposalSettings(nms_type=kind))) == 0


def test_outputs():
    masks, logits = two_squares((-1.0, 2.0))
    proposals = make_proposals(masks, logits.requires_grad_(), ProposalSettings())
    outputs = as_outputs(proposals)
    assert outputs["proposals"] is proposals
    assert not proposals.objectness_logits.requires_grad
    instances = outputs["instances"]
    expected = [1 / (1 + math.exp(-2)), 1 / (1 + math.e)]
    assert instances.scores.tolist() == pytest.approx(expected)
    assert instances.pred_classes.tolist() == [0, 0]
    assert instances.pred_classes.dtype == torch.int64
    assert torch.equal(instances.pred_boxes.tensor, proposals.proposal_boxes.tensor)
    assert instances.pred_boxes.tensor.tolist() == [[2, 2, 12, 10], [2, 2, 12, 12]]
    assert torch.equal(instances.pred_masks.tensor, masks.tensor.flip(0))


def test_settings_of_the_config():
    cfg = get_cfg()
    deepmask = ProposalSettings.from_node(cfg.MODEL.DEEPMASK.TEST)
    assert deepmask == ProposalSettings(1000, 0.2, "none", 0.8)
    fcn = ProposalSettings.from_node(cfg.MODEL.INSTANCE_FCN.TEST)
    assert fcn == ProposalSettings(1000, 0.5, "box", 0.8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"topk": 0}, r"topk \(TOPK\) must be a positive integer, not 0"),
        ({"topk": 10.0}, "topk"),
        ({"topk": True}, "topk"),
        ({"mask_threshold": 0}, "MASK_THRESH"),
        ({"mask_threshold": 1.5}, "MASK_THRESH"),
        ({"nms_type": "Box"}, "NMS_TYPE.*'Box'"),
        ({"nms_threshold": -0.1}, "NMS_THRESH"),
        ({"nms_threshold": math.nan}, "NMS_THRESH"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        ProposalSettings(**values)


def test_bad_input():
    masks, logits = two_squares()
    with pytest.raises(ValueError, match=r"logits must be \(2,\), as the masks, not \(1,\)"):
        make_proposals(masks, logits[:1], ProposalSettings())
    with pytest.raises(ValueError, match="1 of 2 logits are NaN"):
        make_proposals(masks, torch.tensor([0.0, math.nan]), ProposalSettings())
    with pytest.raises(ValueError, match=r"masks have the threshold 0.5, the settings 0.2"):
        make_proposals(masks, logits, ProposalSettings(mask_threshold=0.2))
