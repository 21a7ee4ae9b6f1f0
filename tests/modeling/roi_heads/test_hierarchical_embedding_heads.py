"""ROI heads that embed, in R-CNNs of Detectron2's model zoo."""

import math

import pytest
import torch
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.projects.point_rend import add_pointrend_config
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from embedding_cases import (
    C4,
    CASCADE,
    FPN,
    HEADS,
    assert_same,
    build_tame,
    labelled,
    noise_inputs,
    pair_of_models,
    zoo_config,
)

from unseg.structures import Clusters

LOSSES = {"loss_embedding_mask", "loss_embedding_object", "loss_embedding_hier"}
AGNOSTIC = {"MODEL__ROI_MASK_HEAD__CLS_AGNOSTIC_MASK": True}


@pytest.fixture(autouse=True)
def storage():
    with EventStorage() as storage:
        yield storage


def gradients(module):
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("yaml", HEADS)
@pytest.mark.parametrize("agnostic", [False, True], ids=["class masks", "agnostic"])
@torch.no_grad()
def test_detections_are_what_they_were(yaml, agnostic):
    cfg = zoo_config(yaml, **(AGNOSTIC if agnostic else {}))
    plain, ours = pair_of_models(cfg)
    inputs = noise_inputs()
    for do_postprocess in (False, True):
        before, after = (m.inference(inputs, None, do_postprocess) for m in (plain, ours))
        if do_postprocess:
            before, after = ([x["instances"] for x in xs] for xs in (before, after))
        assert sum(len(x) for x in before) > 3
        for one, other in zip(before, after, strict=True):
            assert_same(one, other)
            assert set(other.get_fields()) == {
                *one.get_fields(),
                "pred_embeddings",
                "pred_tangents",
            }
            u, z = other.pred_tangents, other.pred_embeddings
            assert u.shape == z.shape == (len(one), 6)
            assert u.dtype == z.dtype == torch.float32
            norm = u.double().norm(dim=1, keepdim=True)
            torch.testing.assert_close(
                z.double(), norm.tanh() * u.double() / norm, rtol=0, atol=1e-7
            )
    # Detections of one image have embeddings of their own.
    assert float(torch.cdist(u, u).max()) > 1e-4


@pytest.mark.parametrize("yaml", HEADS)
@pytest.mark.parametrize("agnostic", [False, True], ids=["class masks", "agnostic"])
def test_joint_training(yaml, agnostic):
    """Detectron2's losses are the same numbers; those of the embeddings train the head alone."""
    cfg = zoo_config(yaml, **(AGNOSTIC if agnostic else {}))
    plain, ours = pair_of_models(cfg)
    inputs = labelled(noise_inputs())
    proposals, regions, losses = [], [], []
    ours.proposal_generator.register_forward_hook(lambda m, args, out: proposals.extend(out[0]))
    ours.roi_heads.embedding_head.register_forward_pre_hook(lambda m, args: regions.append(args[0]))
    for model in (plain, ours):
        torch.manual_seed(3)
        losses.append(model.train()(inputs))
    before, after = losses
    # Not what is left of them after the detector's training.
    for x, boxes in zip(proposals, regions[0].boxes, strict=True):
        best = x.objectness_logits.sort(descending=True, stable=True).indices[:20]
        assert torch.equal(boxes, x.proposal_boxes.tensor[best])
    assert set(after) == set(before) | LOSSES
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(torch.isfinite(after[key]) and after[key].dim() == 0 for key in after)
    assert after["loss_embedding_mask"] > 0
    sum(after[key] for key in LOSSES).backward()
    found = gradients(ours)
    assert all(name.startswith("roi_heads.embedding_head.") for name in found)
    assert all(torch.isfinite(g).all() for g in found.values())
    assert set(found) == {
        n for n, _ in ours.named_parameters() if n.startswith("roi_heads.embedding_head.")
    }
    assert found["roi_heads.embedding_head.to_tangent.weight"].abs().sum() > 0
    # Everything is in training mode again.
    assert all(m.training for m in ours.modules())


def test_gradients_into_the_detector():
    model = build_tame(zoo_config(embedding={"DETACH_FEATURES": False})).train()
    losses = model(labelled(noise_inputs()))
    sum(losses[key] for key in LOSSES).backward()
    found = gradients(model)
    assert any(name.startswith("backbone.") and grad.any() for name, grad in found.items())
    assert not any("mask_head" in name or "box_" in name for name in found)


def test_terms_that_are_switched_off():
    """No views of theirs are computed."""
    weights = {"WEIGHT_MASK": 0.0, "WEIGHT_HIER": 0.0}
    model = build_tame(zoo_config(embedding=weights)).train()
    seen = []
    model.roi_heads.embedding_head.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    losses = model(labelled(noise_inputs()))
    assert LOSSES & set(losses) == {"loss_embedding_object"}
    assert seen == [("fg",)]
    weights["WEIGHT_OBJECT"] = 0.0
    losses = build_tame(zoo_config(embedding=weights)).train()(labelled(noise_inputs()))
    assert not LOSSES & set(losses)


@pytest.mark.parametrize("yaml", [FPN, C4, CASCADE])
def test_training_regions(yaml):
    """The best proposals, with the masks that inference gives to them; nothing of the detector
    changes, not even the statistics of its norms."""
    cfg = zoo_config(yaml, MODEL__ROI_MASK_HEAD__NORM="BN", embedding={"MAX_PROPOSALS": 5})
    model = build_tame(cfg)
    heads = model.roi_heads
    with torch.no_grad():
        images = model.preprocess_image(noise_inputs())
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features)
        for x in proposals:  # in another order
            shuffled = torch.randperm(len(x))
            x.proposal_boxes, x.objectness_logits = (
                x.proposal_boxes[shuffled],
                x.objectness_logits[shuffled],
            )
        before = {k: v.clone() for k, v in heads.state_dict().items()}
        regions, relations = heads.train()._training_regions(features, proposals)
        assert all(torch.equal(before[k], v) for k, v in heads.state_dict().items())
        assert all(m.training for m in heads.modules())
        heads.eval()
        assert [len(x) for x in relations] == regions.counts == [5, 5]
        given = []
        for x, boxes in zip(proposals, regions.boxes, strict=True):
            best = x.objectness_logits.sort(descending=True).indices[:5]
            assert torch.equal(boxes, x.proposal_boxes.tensor[best])
            given.append(Instances(x.image_size, proposal_boxes=Boxes(boxes)))
        predictor = heads.box_predictor[0] if yaml == CASCADE else heads.box_predictor
        # Of random weights one class is best everywhere.
        predictor.cls_score.bias -= class_scores(heads, predictor, features, given).mean(dim=0)
        classes = class_scores(heads, predictor, features, given)[:, :5].argmax(dim=1).split([5, 5])
        assert len({int(c) for own in classes for c in own}) > 1
        regions, _ = heads._training_regions(features, proposals)
        for x, own in zip(given, classes, strict=True):
            x.pred_boxes, x.pred_classes = x.proposal_boxes, own
        expected = heads.forward_with_given_boxes(features, given)
        for x, masks in zip(expected, regions.masks, strict=True):
            assert torch.equal(x.pred_masks[:, 0], masks)


def class_scores(heads, predictor, features, proposals):
    """By Detectron2's own way through the box head, without suppressing anything."""
    boxes = [x.proposal_boxes for x in proposals]
    if isinstance(heads, Res5ROIHeads):
        x = heads.res5(heads.pooler([features["res4"]], boxes)).mean(dim=(2, 3))
    else:
        x = heads.box_pooler([features[k] for k in heads.box_in_features], boxes)
        head = heads.box_head
        x = head[0](x) if isinstance(head, torch.nn.ModuleList) else head(x)
    return predictor(x)[0]


@pytest.mark.parametrize("yaml", HEADS)
def test_nothing_found(yaml):
    cfg = zoo_config(yaml, MODEL__ROI_HEADS__SCORE_THRESH_TEST=1.1)
    model = build_tame(cfg)
    with torch.no_grad():
        for x in model(noise_inputs()):
            assert len(x["instances"]) == 0
            assert x["instances"].pred_embeddings.shape == (0, 6)
            assert x["instances"].pred_tangents.shape == (0, 6)
    # No proposals in training: zeros, with gradients of zeros for every weight.
    images = model.preprocess_image(noise_inputs())
    features = model.backbone(images.tensor)
    nothing = [
        Instances(size, proposal_boxes=Boxes(torch.zeros(0, 4)), objectness_logits=torch.zeros(0))
        for size in images.image_sizes
    ]
    losses = model.roi_heads.train().embedding_losses(features, nothing)
    assert set(losses) == LOSSES
    assert not any(losses.values())
    sum(losses.values()).backward()
    grads = gradients(model.roi_heads.embedding_head)
    assert len(grads) == len(list(model.roi_heads.embedding_head.parameters()))
    assert not any(g.any() for g in grads.values())


@torch.no_grad()
def test_few_proposals():
    """One in an image, none in the other."""
    model = build_tame(zoo_config())
    images = model.preprocess_image(noise_inputs())
    features = model.backbone(images.tensor)
    boxes = torch.tensor([[10.0, 10, 60, 70]])
    few = [
        Instances(size, proposal_boxes=Boxes(own), objectness_logits=torch.zeros(len(own)))
        for size, own in zip(images.image_sizes, (boxes, boxes[:0]), strict=True)
    ]
    losses = model.roi_heads.embedding_losses(features, few)
    assert set(losses) == LOSSES
    assert all(torch.isfinite(x) for x in losses.values())
    assert losses["loss_embedding_object"] == losses["loss_embedding_hier"] == 0


def test_the_same_random_numbers():
    """What a step draws depends on torch's generator alone, so on StepSeeds: a resumed run has the
    same losses."""
    model = build_tame(zoo_config()).train()
    inputs = labelled(noise_inputs())
    found = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        found.append(model(inputs))
    assert all(torch.equal(found[0][k], found[2][k]) for k in found[0])


@pytest.mark.parametrize("yaml", HEADS)
@torch.no_grad()
def test_given_boxes(yaml):
    """As test-time augmentation calls it: the embeddings of the boxes are those of detections."""
    model = build_tame(zoo_config(yaml))
    inputs = noise_inputs()
    found = model.inference(inputs, do_postprocess=False)
    given = [
        Instances(x.image_size, pred_boxes=x.pred_boxes, pred_classes=x.pred_classes) for x in found
    ]
    again = model.inference(inputs, given, do_postprocess=False)
    for one, other in zip(found, again, strict=True):
        assert_same(one, other, ["pred_masks", "pred_tangents", "pred_embeddings"])


@torch.no_grad()
def test_test_time_augmentation():
    """Boxes and masks as Detectron2 merges them, no embeddings."""
    cfg = zoo_config(TEST__AUG__ENABLED=True, TEST__AUG__MIN_SIZES=(96,))
    plain, ours = pair_of_models(cfg)
    inputs = [x | {"height": 96, "width": 128} for x in noise_inputs((96, 128))]
    before, after = (GeneralizedRCNNWithTTA(cfg, m)(inputs)[0]["instances"] for m in (plain, ours))
    assert_same(before, after)
    assert not after.has("pred_tangents")
    ours.roi_heads.set_clusters(Clusters(torch.zeros(1, 6, dtype=torch.float64)))
    with pytest.raises(RuntimeError, match="test-time augmentation"):
        GeneralizedRCNNWithTTA(cfg, ours)(inputs)


@torch.no_grad()
def test_pixels():
    """The crop source sees the images of forward, and no others."""
    cfg = zoo_config(embedding={"FEATURE_SOURCE": "crop", "CROP_SIZE": 32})
    plain, ours = pair_of_models(cfg)
    inputs = noise_inputs()
    found = ours.inference(inputs, do_postprocess=False)
    for one, other in zip(plain.inference(inputs, do_postprocess=False), found, strict=True):
        assert_same(one, other)
        assert other.pred_tangents.shape == (len(one), 6)
    given = [
        Instances(x.image_size, pred_boxes=x.pred_boxes, pred_classes=x.pred_classes) for x in found
    ]
    with pytest.raises(RuntimeError, match="showing"):
        ours.inference(inputs, given, do_postprocess=False)
    with ours.roi_heads.showing(ours.preprocess_image(inputs)):
        again = ours.inference(inputs, given, do_postprocess=False)
    for one, other in zip(found, again, strict=True):
        assert_same(one, other, ["pred_tangents"])
    # A changed pixel in a box is seen, though the features were made before.
    images = ours.preprocess_image(inputs)
    features = ours.backbone(images.tensor)
    images.tensor[0] = 0
    with ours.roi_heads.showing(images):
        grey = ours.roi_heads.forward_with_given_boxes(features, given)
    assert not torch.equal(grey[0].pred_tangents, found[0].pred_tangents)
    losses = ours.train()(labelled(inputs))
    assert set(losses) >= LOSSES
    assert all(torch.isfinite(x) for x in losses.values())
    assert ours.roi_heads._images is None


def clusters_of(heads, tangents, classes=None):
    """Clusters with these tangents as centroids."""
    return Clusters(
        tangents.double(), heads.embedding_head.geometry, heads.embedding_head.c, classes
    )


@pytest.mark.parametrize("geometry", ["poincare", "euclidean"])
@torch.no_grad()
def test_clusters(geometry):
    c = 0.5
    model = build_tame(zoo_config(embedding={"GEOMETRY": geometry, "CURVATURE": c}))
    keys = set(model.state_dict())
    inputs = noise_inputs()
    plain = [x["instances"] for x in model(inputs)]
    tangents = torch.cat([x.pred_tangents for x in plain])
    centroids = tangents[::3] * 0.9 + 0.01
    model.roi_heads.set_clusters(clusters_of(model.roi_heads, centroids))
    assert set(model.state_dict()) == keys
    found = [x["instances"] for x in model(inputs)]
    u, v = tangents.double()[:, None], centroids.double()[None]
    if geometry == "poincare":
        # cosh(s d) of two tangents, by the hyperboloid.
        s = math.sqrt(c)
        a, b = (2 * s * x.norm(dim=-1, keepdim=True) for x in (u, v))
        x, y = (n.sinh() * t / t.norm(dim=-1, keepdim=True) for n, t in ((a, u), (b, v)))
        cosh = (a.cosh() * b.cosh())[..., 0] - (x * y).sum(dim=-1)
        expected = cosh.clamp(min=1).acosh() / s
    else:
        expected = (u - v).norm(dim=-1)
    labels = torch.cat([x.pred_clusters for x in found])
    distances = torch.cat([x.cluster_distances for x in found])
    assert labels.dtype == torch.int64
    assert distances.dtype == torch.float32
    assert len(labels.unique()) > 1
    assert torch.equal(labels, expected.argmin(dim=1))
    nearest = expected.min(dim=1).values.float()
    torch.testing.assert_close(distances, nearest, atol=1e-5, rtol=1e-5)
    for one, other in zip(plain, found, strict=True):
        assert_same(one, other)

    # With classes: others are dropped.
    classes = torch.full((len(centroids),), -1)
    classes[labels[0]] = 700
    model.roi_heads.set_clusters(clusters_of(model.roi_heads, centroids, classes))
    for one, own in zip(found, (x["instances"] for x in model(inputs)), strict=True):
        kept = one[one.pred_clusters == labels[0]]
        assert (own.pred_classes == 700).all()
        assert_same(kept, own, [k for k in kept.get_fields() if k != "pred_classes"])
    # All of them dropped, and again without clusters.
    classes[:] = -1
    model.roi_heads.set_clusters(clusters_of(model.roi_heads, centroids, classes))
    assert all(len(x["instances"]) == 0 for x in model(inputs))
    model.roi_heads.set_clusters(None)
    for one, x in zip(plain, model(inputs), strict=True):
        assert_same(one, x["instances"])
        assert not x["instances"].has("pred_clusters")


def test_clusters_of_nothing_and_of_another_space():
    model = build_tame(zoo_config(MODEL__ROI_HEADS__SCORE_THRESH_TEST=1.1))
    heads = model.roi_heads
    centroids = torch.zeros(3, 6, dtype=torch.float64)
    heads.set_clusters(Clusters(centroids, classes=torch.tensor([0, 1, -1])))
    with torch.no_grad():
        for x in model(noise_inputs()):
            assert x["instances"].pred_clusters.shape == (0,)
            assert x["instances"].cluster_distances.shape == (0,)
    for other in (
        Clusters(centroids[:, :5]),
        Clusters(centroids, geometry="euclidean"),
        Clusters(centroids, c=0.9),
    ):
        with pytest.raises(ValueError, match="clusters"):
            heads.set_clusters(other)


@pytest.mark.parametrize("source", ["roi", "crop"])
@torch.no_grad()
def test_given_masks(source):
    """Masks of the file's size are embedded like predicted ones that look the same."""
    options = {"FEATURE_SOURCE": source, "CROP_SIZE": 32}
    model = build_tame(zoo_config(embedding=options))
    heads = model.roi_heads
    images = model.preprocess_image(noise_inputs((96, 128), (128, 96)))
    features = model.backbone(images.tensor)
    boxes = [Boxes(torch.tensor([[20.0, 16, 76, 72]])), Boxes(torch.zeros(0, 4))]
    window = torch.zeros(1, 28, 28, dtype=torch.bool)
    window[:, 4:20, 6:26] = True  # cells of two pixels
    masks = [torch.zeros(1, 192, 256, dtype=torch.bool), torch.zeros(0, 128, 96) > 0]
    masks[0][:, 32:144, 40:152] = window.repeat_interleave(4, 1).repeat_interleave(4, 2)
    found = heads.embed(images, features, boxes, masks)
    assert [tuple(x.shape) for x in found] == [(1, 6), (0, 6)]

    predicted = heads.forward_with_given_boxes
    sizes = images.image_sizes
    given = [
        Instances(size, pred_boxes=own, pred_classes=torch.zeros(len(own), dtype=torch.int64))
        for size, own in zip(sizes, boxes, strict=True)
    ]

    def planted(features, instances):
        for x, own in zip(instances, (window.float(), window[:0].float()), strict=True):
            x.pred_masks = own[:, None]
        return instances

    heads._forward_mask = planted
    with heads.showing(images):
        expected = predicted(features, given)
    torch.testing.assert_close(found[0], expected[0].pred_tangents, atol=1e-4, rtol=1e-4)
    moved = heads.embed(images, features, boxes, [torch.roll(masks[0], 8, dims=2), masks[1]])
    assert (moved[0] - found[0]).abs().max() > 1e-3
    for bad_boxes, bad_masks in (
        (boxes[:1], masks),
        (boxes, masks[:1]),
        (boxes, [masks[0][0], masks[1]]),
        (boxes, [masks[0].repeat(2, 1, 1), masks[1]]),
    ):
        with pytest.raises(ValueError, match=r"images|masks"):
            heads.embed(images, features, bad_boxes, bad_masks)


def test_construction():
    with pytest.raises(ValueError, match="MASK_ON"):
        build_model(zoo_config(MODEL__MASK_ON=False))
    for options, match in (
        ({"MASK_SOURCE": "box"}, "WEIGHT_MASK"),
        ({"MASK_SOURCE": "gt"}, "MASK_SOURCE"),
        ({"SKIP_BOX_HEAD": True}, "CLS_AGNOSTIC_MASK"),
        ({"MAX_PROPOSALS": 0}, "MAX_PROPOSALS"),
    ):
        with pytest.raises(ValueError, match=match):
            build_model(zoo_config(embedding=options))


@pytest.mark.parametrize("yaml", [FPN, C4, CASCADE])
def test_boxes_without_masks(yaml):
    options = {"MASK_SOURCE": "box", "WEIGHT_MASK": 0.0}
    model = build_tame(zoo_config(yaml, MODEL__MASK_ON=False, embedding=options))
    with torch.no_grad():
        found = model(noise_inputs())[0]["instances"]
        assert found.pred_tangents.shape == (len(found), 6)
        assert len(found) > 0
        assert not found.has("pred_masks")
    losses = model.train()(labelled(noise_inputs()))
    assert LOSSES & set(losses) == {"loss_embedding_object", "loss_embedding_hier"}


@pytest.mark.parametrize("yaml", [FPN, C4, CASCADE])
@torch.no_grad()
def test_proposals_as_detections(yaml):
    """Without the box head: boxes and order of the proposals, scores their objectness."""
    skip = zoo_config(yaml, embedding={"SKIP_BOX_HEAD": True}, **AGNOSTIC)
    model = build_tame(skip)
    inputs = noise_inputs()
    images = model.preprocess_image(inputs)
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features)
    found = model.inference(inputs, do_postprocess=False)
    for x, own in zip(proposals, found, strict=True):
        assert len(own) == 8  # TEST.DETECTIONS_PER_IMAGE
        assert torch.equal(own.pred_boxes.tensor, x.proposal_boxes.tensor[:8])
        torch.testing.assert_close(own.scores, 1 / (1 + (-x.objectness_logits[:8]).exp()))
        assert not own.pred_classes.any()
        assert own.pred_masks.shape == (8, 1, *own.pred_masks.shape[2:])
        assert own.pred_tangents.shape == (8, 6)


def pointrend_config():
    cfg = zoo_config().clone()
    cfg.defrost()
    add_pointrend_config(cfg)
    cfg.MODEL.ROI_MASK_HEAD.NAME = "PointRendMaskHead"
    cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = ""
    cfg.MODEL.ROI_MASK_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_MASK_HEAD.IN_FEATURES = ["p2"]
    cfg.MODEL.ROI_MASK_HEAD.POINT_HEAD_ON = True
    cfg.MODEL.POINT_HEAD.NUM_CLASSES = 5
    cfg.MODEL.POINT_HEAD.SUBDIVISION_STEPS = 3
    cfg.MODEL.POINT_HEAD.FC_DIM = 16
    cfg.MODEL.POINT_HEAD.IN_FEATURES = ["p2"]
    return cfg


def test_mask_heads_without_a_pooler():
    """PointRend, in inference and, as inference makes them, in training."""
    plain, ours = pair_of_models(pointrend_config())
    inputs = noise_inputs()
    with torch.no_grad():
        for one, other in zip(plain(inputs), ours(inputs), strict=True):
            assert_same(one["instances"], other["instances"])
            assert other["instances"].pred_tangents.shape == (len(one["instances"]), 6)
    losses = ours.train()(labelled(inputs))
    assert set(losses) >= LOSSES
    assert losses["loss_embedding_mask"] > 0


@pytest.mark.parametrize("yaml", [FPN, C4])
def test_autocast(yaml):
    """Half precision around: finite, float32, and close to what full precision gives."""
    model = build_tame(zoo_config(yaml))
    inputs = noise_inputs()
    given = [
        Instances(
            x["image"].shape[1:],
            pred_boxes=Boxes(torch.tensor([[10.0, 10, 80, 80], [30, 20, 60, 90]])),
            pred_classes=torch.tensor([0, 1]),
        )
        for x in inputs
    ]
    with torch.no_grad():
        full = model.inference(
            inputs, [Instances(x.image_size, **x.get_fields()) for x in given], False
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model.inference(inputs, given, False)
    for one, other in zip(full, half, strict=True):
        assert other.pred_tangents.dtype == other.pred_embeddings.dtype == torch.float32
        torch.testing.assert_close(other.pred_tangents, one.pred_tangents, atol=0.05, rtol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.train()(labelled(inputs))
    assert all(torch.isfinite(losses[key]) and losses[key].dtype == torch.float32 for key in LOSSES)


@torch.no_grad()
def test_detector_postprocess():
    """Embeddings go along with the instances that stay."""
    model = build_tame(zoo_config())
    raw = model.inference(noise_inputs(), do_postprocess=False)[0]
    boxes = raw.pred_boxes.tensor.clone()
    boxes[1] = torch.tensor([500.0, 500, 600, 600])  # outside: dropped
    raw.pred_boxes = Boxes(boxes)
    done = detector_postprocess(raw, 192, 256)
    stay = torch.arange(len(raw)) != 1
    stay &= Boxes(boxes[:, :]).area() > 0
    assert len(done) == int(stay.sum())
    assert torch.equal(done.pred_tangents, raw.pred_tangents[stay])
    assert torch.equal(done.pred_embeddings, raw.pred_embeddings[stay])
