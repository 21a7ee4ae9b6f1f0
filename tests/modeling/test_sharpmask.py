"""SharpMask: what is trained, what is not, and that its masks are the refined ones."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import nn

from unseg.checkpoint import SafeCheckpointer
from unseg.config import load_config
from unseg.modeling import SharpMask

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.META_ARCHITECTURE": "SharpMask",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3"],
    # Statistics that training could move.
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.DEEPMASK.IN_FEATURE": "res3",
    "MODEL.DEEPMASK.INPUT_SIZE": 32,
    "MODEL.DEEPMASK.CONTEXT": 16,
    "MODEL.DEEPMASK.OUT_SIZE": 8,
    "MODEL.DEEPMASK.GT_SIZE": 32,
    "MODEL.DEEPMASK.EMBED_DIM": 12,
    "MODEL.DEEPMASK.REDUCE_DIM": 8,
    "MODEL.DEEPMASK.SCORE_HIDDEN": 8,
    "MODEL.DEEPMASK.TEST.SCALES": [-1.0, 0.0],
    "MODEL.DEEPMASK.TEST.TOPK": 9,
    "MODEL.DEEPMASK.TEST.MASK_THRESH": 0.01,
    "MODEL.SHARPMASK.IN_FEATURES": ["res3", "res2", "stem"],
    "MODEL.SHARPMASK.KM": 8,
    "MODEL.SHARPMASK.KS": 4,
}
NAMES = ("res3", "res2", "stem")
CELLS = 4


def build(seed=0, **changes):
    options = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    torch.manual_seed(seed)
    model = build_model(load_config("", [x for pair in options.items() for x in pair]))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
    return model


def batch(labels=(1, -1, 1), images=1):
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(images):
        masks = torch.randint(0, 2, (len(labels), 32, 32), generator=generator) * 2 - 1
        labels = torch.tensor(labels, dtype=torch.int8)
        patches = torch.rand(len(labels), 3, 48, 48, generator=generator) * 255
        found.append(
            {
                "patches": patches,
                "patch_masks": (masks * (labels > 0)[:, None, None]).to(torch.int8),
                "patch_labels": labels,
            }
        )
    return found


def image(height=50, width=70):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def trunk_maps(model, images):
    """res3, res2 and stem by calling the modules one by one."""
    net = model.backbone
    x = (images - model.pixel_mean) / model.pixel_std
    stem = F.relu(net.stem.conv1(x))
    res2 = net.res2(F.max_pool2d(stem, 3, 2, 1))
    return [net.res3(res2), res2, stem]


def refined(model, maps, vector, row=0, column=0):
    """The mask of one window of maps (1, C, h, w), step by step."""
    refinement = model.refinement
    encoding = refinement.encode(vector).view(1, -1, CELLS, CELLS)
    for n, (step, features) in enumerate(zip(refinement.steps, maps, strict=True)):
        f = 2**n
        lateral = step.horizontal(features)
        lateral = lateral[..., row * f : (row + CELLS) * f, column * f : (column + CELLS) * f]
        encoding = F.relu(step.vertical(encoding) + lateral)
        encoding = encoding.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return refinement.predict(encoding)[0, 0]


def vector_of(model, features):
    """The embedding of a window's map (1, C, 4, 4)."""
    head = model.head
    return F.linear(
        F.relu(head.reduce(features)).flatten(), head.embed.weight.flatten(1), head.embed.bias
    )


@pytest.mark.parametrize("head", ["shared", "paper"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_loss_is_that_of_the_positives_at_full_size(head, reduction):
    model = build(MODEL__DEEPMASK__HEAD=head, MODEL__DEEPMASK__LOSS_REDUCTION=reduction)
    inputs = batch()
    losses = model(inputs)
    assert losses.keys() == {"loss_mask"}
    expected = 0
    for i in (0, 2):
        maps = trunk_maps(model, inputs[0]["patches"][i : i + 1])
        # 8 pixels of context at each side: 1 cell of stride 8.
        mask = refined(model, maps, vector_of(model, maps[0][..., 1:-1, 1:-1]), 1, 1)
        target = inputs[0]["patch_masks"][i]
        expected = expected + torch.log1p(torch.exp(-target * mask)).mean()
    if reduction == "mean":
        expected = expected / 3
    torch.testing.assert_close(losses["loss_mask"], expected)


def test_only_the_refinement_learns():
    model = build(MODEL__DEEPMASK__DROPOUT=0.9).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"refinement.{name}" for name, _ in model.refinement.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    first = model(batch())["loss_mask"]
    assert torch.equal(first, model(batch())["loss_mask"])  # no dropout, no batch statistics
    first.backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == trained


def test_train_and_eval_reach_the_refinement_only():
    model = build()
    for mode in (True, False, True):
        model.train(mode)
        assert model.training == model.refinement.training == mode
        assert not any(m.training for m in [*model.backbone.modules(), *model.head.modules()])


def test_negatives_are_not_run():
    model = build()
    seen = []
    model.backbone.register_forward_hook(lambda _, args, output: seen.append(len(args[0])))
    model(batch((1, -1, -1, 1, -1)))
    assert seen == [2]


def test_a_batch_of_negatives_gives_zero_and_gradients():
    model = build()
    loss = model(batch((-1, -1)))["loss_mask"]
    assert loss == 0
    loss.backward()
    gradients = [p.grad for p in model.refinement.parameters()]
    assert all(g is not None and not g.any() for g in gradients)


def test_it_learns_masks_by_heart():
    model = build(
        MODEL__RESNETS__NORM="GN",
        MODEL__DEEPMASK__LOSS_REDUCTION="mean",
        MODEL__SHARPMASK__KM=32,
    )
    (inputs,) = batch((1, 1, 1, -1))
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    inputs["patch_masks"][:3] = torch.stack([y < 11, x + y > 30, (x - 16) ** 2 < 50]) * 2 - 1
    optimizer = torch.optim.Adam(model.refinement.parameters(), lr=0.003)
    for _ in range(30):
        loss = model([inputs])["loss_mask"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * 3 / 4  # ln 2 * 3/4 at the start


@pytest.mark.parametrize("head", ["shared", "paper"])
def test_masks_of_an_image_are_the_refined_ones(head):
    """Each proposal against its own window, cut out of the padded, resized image's maps."""
    model = build(MODEL__DEEPMASK__HEAD=head, MODEL__DEEPMASK__TEST__SCALES=[0.0]).eval()
    with torch.no_grad():
        found = model([{"image": image()}])[0]["proposals"]
        assert len(found) > 3
        # 16 pixels around it, and 6 and 2 more to whole cells.
        padded = F.pad(image().float(), (16, 16 + 2, 16, 16 + 6), value=127.5)[None]
        maps = trunk_maps(model, padded)
        assert maps[0].shape[-2:] == (11, 13)
        places = set()
        masks = found.pred_masks
        for probabilities, box in zip(masks.probabilities, masks.boxes, strict=True):
            # The window at (i, j) is centred on pixel (8 j, 8 i) of the image.
            column, row = (int(x) for x in ((box[:2] + box[2:]) / 2 / 8).round())
            places.add((row, column))
            window = maps[0][..., row : row + CELLS, column : column + CELLS]
            expected = refined(model, maps, vector_of(model, window), row, column).sigmoid()
            assert probabilities.shape == (32, 32)
            torch.testing.assert_close(probabilities.float(), expected, rtol=1e-3, atol=1e-3)
    assert len({row for row, _ in places}) > 1
    assert len({column for _, column in places}) > 1


def test_proposals_depend_on_the_refinement_and_scores_do_not():
    model = build().eval()
    before = model([{"image": image()}])[0]["proposals"]
    nn.init.constant_(model.refinement.predict.bias, 3.0)
    after = model([{"image": image()}])[0]["proposals"]
    assert torch.equal(before.objectness_logits, after.objectness_logits)
    assert not torch.equal(before.pred_masks.probabilities, after.pred_masks.probabilities)


def test_images_smaller_than_a_window_and_other_output_sizes():
    model = build().eval()
    (found,) = model([{"image": image(9, 5), "height": 90, "width": 50}])
    assert found["instances"].image_size == (90, 50)
    assert len(found["instances"]) > 0


@pytest.mark.parametrize("pad_mode", ["symmetric", "port"])
def test_mirror_padding_in_both_parts(pad_mode):
    """A flat image has no border then: every cell looks the same."""
    model = build(MODEL__DEEPMASK__PAD_MODE=pad_mode, MODEL__SHARPMASK__PAD_MODE=pad_mode).eval()
    with torch.no_grad():
        level = model.encode(torch.full((1, 3, 96, 96), 90.0))
    for lateral in level.maps.values():
        torch.testing.assert_close(lateral, lateral[..., :1, :1].expand_as(lateral))


def test_patches_in_inference():
    model = build().eval()
    inputs = batch()[0]
    (found,) = model([{"image": image(), **inputs}])
    assert found["patch_logits"].shape == (3, 32, 32)
    assert found["patch_scores"].shape == (3,)
    with torch.no_grad():
        masks = inputs["patch_masks"][:, None].float()
        logits = found["patch_logits"][:, None]
        loss = F.softplus(-masks * logits).mean(dim=(1, 2, 3))[[0, 2]].sum()
    torch.testing.assert_close(loss, model.train()(batch())["loss_mask"].detach())


def test_a_shorter_path_is_upsampled():
    """Two steps end at half the resolution."""
    model = build(MODEL__SHARPMASK__IN_FEATURES=["res3", "res2"])
    assert model(batch())["loss_mask"] > 0
    (found,) = model.eval()([{"image": image(), **batch()[0]}])
    assert found["patch_logits"].shape == (3, 32, 32)
    assert found["proposals"].pred_masks.probabilities.shape[1:] == (16, 16)


def test_begins_from_a_deepmask(tmp_path):
    first = build(MODEL__META_ARCHITECTURE="DeepMask").eval()
    assert not isinstance(first, SharpMask)
    DetectionCheckpointer(first, str(tmp_path)).save("stage1")
    second = build(seed=1).eval()
    SafeCheckpointer(second).load(str(tmp_path / "stage1.pth"))
    theirs, ours = first.state_dict(), second.state_dict()
    assert theirs.keys() - ours.keys() == {"head.mask.weight", "head.mask.bias"}
    assert {name.split(".")[0] for name in ours.keys() - theirs.keys()} == {"refinement"}
    shared = theirs.keys() & ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in shared)
    # All windows are proposed, so that none is lost to an empty mask: the scores are DeepMask's.
    for model in (first, second):
        model.inference = type(model.inference)(topk=1000, mask_threshold=1e-9)
    with torch.no_grad():
        scores = [
            m([{"image": image()}])[0]["proposals"].objectness_logits for m in (first, second)
        ]
    assert len(scores[0]) > 50
    torch.testing.assert_close(*scores)
    assert second.train()(batch())["loss_mask"] > 0


def test_head_mask_of_the_checkpoint_changes_nothing(tmp_path):
    first = build(MODEL__META_ARCHITECTURE="DeepMask")
    found = []
    for value in (0.0, 5.0):
        nn.init.constant_(first.head.mask.bias, value)
        DetectionCheckpointer(first, str(tmp_path)).save("stage1")
        model = build(seed=1).eval()
        SafeCheckpointer(model).load(str(tmp_path / "stage1.pth"))
        found.append(model([{"image": image()}])[0]["proposals"].pred_masks.probabilities)
    assert torch.equal(*found)


def test_a_trunk_that_nobody_trained_is_warned_about(caplog):
    build()
    assert "MODEL.WEIGHTS is empty" in caplog.text
    caplog.clear()
    build(MODEL__WEIGHTS="deepmask.pth")
    assert "MODEL.WEIGHTS" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MODEL__DEEPMASK__GT_SIZE": 16}, "MODEL.DEEPMASK.GT_SIZE must be INPUT_SIZE, 32.*: 16"),
        ({"MODEL__DEEPMASK__HEAD": "full"}, "MODEL.DEEPMASK.HEAD must be shared or paper.*'full'"),
        ({"MODEL__DEEPMASK__TRAIN_MODE": "alternate"}, "MODEL.DEEPMASK.TRAIN_MODE must be joint"),
        ({"MODEL__SHARPMASK__KM": 12}, "MODEL.SHARPMASK.KM must be a positive multiple of 8"),
        ({"MODEL__SHARPMASK__KS": 5}, "MODEL.SHARPMASK.KS"),
        ({"MODEL__SHARPMASK__UPSAMPLE": "cubic"}, "MODEL.SHARPMASK.UPSAMPLE"),
        ({"MODEL__SHARPMASK__IN_FEATURES": []}, "MODEL.SHARPMASK.IN_FEATURES"),
        ({"MODEL__SHARPMASK__IN_FEATURES": ["res4", "res3"]}, "IN_FEATURES names res4"),
        ({"MODEL__SHARPMASK__IN_FEATURES": ["res2", "stem"]}, "IN_FEATURES must begin with res3"),
        ({"MODEL__SHARPMASK__IN_FEATURES": ["res3", "stem"]}, "half the stride.*stem has 2"),
    ],
)
def test_configs_that_do_not_fit_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        build(**changes)


def test_a_vgg_trunk():
    """The paper's trunk: five maps, of which the last has stride 1 and cannot be doubled."""
    vgg = {
        "MODEL__BACKBONE__NAME": "build_vgg_backbone",
        "MODEL__VGG__DEPTH": 11,
        "MODEL__VGG__OUT_FEATURES": ["conv1", "conv2", "conv3", "conv4"],
        "MODEL__DEEPMASK__IN_FEATURE": "conv4",
        "MODEL__DEEPMASK__HEAD": "paper",
    }
    names = ["conv4", "conv3", "conv2"]
    model = build(**vgg, MODEL__SHARPMASK__IN_FEATURES=names)
    model(batch())["loss_mask"].backward()
    (found,) = model.eval()([{"image": image()}])
    assert found["proposals"].pred_masks.probabilities.shape[1:] == (32, 32)
    with pytest.raises(ValueError, match="at least 2: .*conv1 has 1"):
        build(**vgg, MODEL__SHARPMASK__IN_FEATURES=[*names, "conv1"], MODEL__SHARPMASK__KM=16)


def test_resized_scales_use_their_own_maps():
    """A window of the coarse scale is refined by the coarse scale's maps."""
    model = build(
        MODEL__DEEPMASK__TEST__SCALES=[0.0, -1.0], MODEL__DEEPMASK__TEST__TOPK=1000
    ).eval()
    one = build(MODEL__DEEPMASK__TEST__SCALES=[-1.0], MODEL__DEEPMASK__TEST__TOPK=1000).eval()
    both = model([{"image": image(64, 64)}])[0]["proposals"]
    coarse = one([{"image": image(64, 64)}])[0]["proposals"]
    sides = both.pred_masks.boxes[:, 2] - both.pred_masks.boxes[:, 0]
    large = both[sides > 48]
    assert len(large) == len(coarse) < len(both)
    torch.testing.assert_close(large.pred_masks.boxes, coarse.pred_masks.boxes)
    torch.testing.assert_close(large.pred_masks.probabilities, coarse.pred_masks.probabilities)
