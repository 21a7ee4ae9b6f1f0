"""LongTailDiscoveryRCNN: label-free training of the embedding head on a detector that stays."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from embedding_cases import (
    C4,
    CASCADE,
    FPN,
    assert_same,
    build_tame,
    labelled,
    noise_inputs,
    pair_of_models,
    zoo_config,
)

from unseg.modeling import LongTailDiscoveryRCNN

HEAD = "roi_heads.embedding_head."
LOSSES = {"loss_embedding_mask", "loss_embedding_object", "loss_embedding_hier"}


@pytest.fixture(autouse=True)
def storage():
    with EventStorage() as storage:
        yield storage


def long_tail_config(yaml=FPN, embedding=None, **changes):
    return zoo_config(
        yaml, embedding=embedding, MODEL__META_ARCHITECTURE="LongTailDiscoveryRCNN", **changes
    )


@pytest.mark.parametrize("yaml", [FPN, C4, CASCADE])
def test_frozen_training_changes_the_head_alone(yaml):
    """Images without labels; norms that would learn keep their statistics."""
    norms = {
        "MODEL__RESNETS__NORM": "BN",
        "MODEL__FPN__NORM": "BN",
        "MODEL__ROI_MASK_HEAD__NORM": "BN",
        "MODEL__BACKBONE__FREEZE_AT": 0,
        "SOLVER__BASE_LR": 0.1,
    }
    cfg = long_tail_config(yaml, **norms)
    model = build_tame(cfg)
    optimizer = build_optimizer(cfg, model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    for step in range(3):
        losses = model(noise_inputs(seed=step))
        assert set(losses) == LOSSES
        assert all(torch.isfinite(x) for x in losses.values())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != key.startswith(HEAD), key


def test_modes():
    model = build_model(long_tail_config())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(HEAD)}
    for mode in (True, False, True):
        assert model.train(mode) is model
        for name, part in model.named_modules():
            if name.startswith(HEAD) or name in (HEAD[:-1], "", "roi_heads"):
                assert part.training == mode, name
            else:
                assert not part.training, name


def test_training_lowers_the_losses():
    """On the same images again and again; hinges of 0.2 before, and how many are left."""
    model = build_tame(long_tail_config(embedding={"INIT_STD": 0.01})).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    totals = []
    for _ in range(25):
        torch.manual_seed(0)
        total = sum(model(noise_inputs()).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.5 * totals[0]


@torch.no_grad()
def test_inference_is_that_of_the_detector():
    plain, ours = pair_of_models(long_tail_config())
    inputs = noise_inputs()
    found = ours(inputs)
    for one, other in zip(plain(inputs), found, strict=True):
        assert_same(one["instances"], other["instances"])
        assert other["instances"].pred_embeddings.shape == (len(one["instances"]), 6)


def test_a_detector_that_is_trained_too():
    """The same step as of a GeneralizedRCNN with these heads, with labels."""
    ours = build_tame(long_tail_config(embedding={"FREEZE_DETECTOR": False}))
    general = build_tame(zoo_config())
    general.load_state_dict(ours.state_dict())
    losses = []
    for model in (general, ours):
        assert all(m.training for m in model.train().modules())
        torch.manual_seed(5)
        losses.append(model(labelled(noise_inputs())))
    assert set(losses[0]) == set(losses[1]) > LOSSES
    assert all(torch.equal(losses[0][key], losses[1][key]) for key in losses[0])
    assert [p.requires_grad for p in ours.parameters()] == [
        p.requires_grad for p in general.parameters()
    ]


def test_given_proposals():
    """Without a proposal generator the inputs have them; the best are trained on."""
    cfg = long_tail_config(
        MODEL__PROPOSAL_GENERATOR__NAME="PrecomputedProposals",
        MODEL__ROI_MASK_HEAD__CLS_AGNOSTIC_MASK=True,
        embedding={"MAX_PROPOSALS": 2},
    )
    model = build_tame(cfg).train()
    assert model.proposal_generator is None
    inputs = noise_inputs()
    with pytest.raises(ValueError, match="proposals"):
        model(inputs)
    boxes = Boxes(torch.tensor([[5.0, 5, 20, 20], [10, 10, 80, 90], [12, 8, 85, 90]]))
    for x in inputs:
        x["proposals"] = Instances(
            x["image"].shape[1:],
            proposal_boxes=boxes,
            objectness_logits=torch.tensor([-1.0, 2.0, 1.0]),
        )
    seen = []
    model.roi_heads.embedding_head.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    assert set(model(inputs)) == LOSSES
    assert all(torch.equal(own, boxes.tensor[1:]) for own in seen[0].boxes)


def test_pixels_of_given_boxes():
    """The crop source in training, in inference and for given boxes."""
    options = {"FEATURE_SOURCE": "crop", "CROP_SIZE": 32}
    model = build_tame(long_tail_config(embedding=options))
    inputs = noise_inputs()
    with torch.no_grad():
        found = model.inference(inputs, do_postprocess=False)
        given = [
            Instances(x.image_size, pred_boxes=x.pred_boxes, pred_classes=x.pred_classes)
            for x in found
        ]
        again = model.inference(inputs, given, do_postprocess=False)
    for one, other in zip(found, again, strict=True):
        assert_same(one, other, ["pred_masks", "pred_tangents"])
    losses = model.train()(inputs)
    sum(losses.values()).backward()
    assert set(losses) == LOSSES
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {
        n for n, _ in model.named_parameters() if n.startswith((HEAD + "fcs", HEAD + "to_tangent"))
    }
    assert model.roi_heads._images is None


def test_construction():
    with pytest.raises(ValueError, match="StandardROIHeads"):
        build_model(long_tail_config(MODEL__ROI_HEADS__NAME="StandardROIHeads"))
    nothing = {"WEIGHT_MASK": 0.0, "WEIGHT_OBJECT": 0.0, "WEIGHT_HIER": 0.0}
    with pytest.raises(ValueError, match="WEIGHT_OBJECT"):
        build_model(long_tail_config(embedding=nothing))
    model = build_model(long_tail_config(embedding=nothing | {"FREEZE_DETECTOR": False}))
    assert isinstance(model, LongTailDiscoveryRCNN)
