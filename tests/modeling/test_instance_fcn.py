"""InstanceFCN: planted objects are found where they are, training on images and on patches."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks
from instance_fcn_cases import (
    PoolingBackbone,
    bin_of,
    make_head,
    make_objects,
    make_reader,
    slow_losses,
)
from PIL import Image

from unseg.config import get_cfg
from unseg.data import build_mapper
from unseg.modeling import InstanceFCN
from unseg.modeling.proposals.deepmask_geometry import PatchGeometry
from unseg.modeling.proposals.instance_fcn_losses import TrainingWindows
from unseg.modeling.proposals.outputs import ProposalSettings

BOX = ProposalSettings(nms_type="box")


def make_model(backbone, head, short_sides=(), topk=50, crop=None, proposals=BOX, std=255.0):
    return InstanceFCN(
        backbone=backbone,
        head=head,
        proposals=proposals,
        short_sides=short_sides,
        pre_nms_topk=topk,
        crop=crop,
        pixel_mean=[0.0] * 3,
        pixel_std=[std] * 3,
    )


def pooling_model(strides, m=11, divisibility=0, cell_offset=-1.0, reader=True, **others):
    """Of PoolingBackbone; masks are the first channel of the image, scores the second."""
    head = make_head(strides, k=3, m=m, cell_offset=cell_offset)
    if reader:
        make_reader(head)
    names = {f"p{i}": stride for i, stride in enumerate(strides)}
    return make_model(PoolingBackbone(names, divisibility), head, **others).eval()


def paint(size, box, mark):
    """An image of a rectangle in the first channel, and of its mark in the second."""
    image = torch.zeros((3, *size), dtype=torch.uint8)
    for channel, (x0, y0, x1, y1) in enumerate((box, mark)):
        image[channel, y0:y1, x0:x1] = 255
    return image


def best(model, image, **sizes):
    (outputs,) = model([{"image": image} | sizes])
    found = outputs["proposals"]
    assert found.objectness_logits[0] > 0
    assert (found.objectness_logits[1:] < found.objectness_logits[0]).all()
    return found[0]


def overlap(proposal, box, size):
    truth = make_objects(size, [box]).gt_masks.tensor[0]
    mask = proposal.pred_masks.tensor[0]
    return float((mask & truth).sum() / (mask | truth).sum())


@pytest.mark.parametrize(
    ("strides", "divisibility", "level"), [([16], 0, 0), ([4, 8, 16], 16, 0), ([4, 8, 16], 16, 2)]
)
def test_planted_objects_are_found_where_they_are(strides, divisibility, level):
    stride, size = strides[level], (139, 155)
    row, column = (size[0] // stride) // 2, (size[1] // stride) // 2 - 1
    mark = (column * stride, row * stride, (column + 1) * stride, (row + 1) * stride)
    box = (mark[0] - 3 * stride, mark[1] - 2 * stride, mark[2] + 3 * stride, mark[3] + 2 * stride)
    model = pooling_model(strides, divisibility=divisibility)
    if len(strides) > 1:  # only this level sees the mark
        others = {s for s in strides if s != stride}
        _blind(model, others)
    proposal = best(model, paint(size, box, mark))
    assert proposal.proposal_boxes.tensor[0].tolist() == list(box)
    assert overlap(proposal, box, size) > 0.98  # corners are rounded when pasted
    for wrong in (0, stride):  # half a stride off
        model = pooling_model([stride], cell_offset=wrong)
        shifted = best(model, paint(size, box, mark))
        assert overlap(shifted, box, size) < 0.85


def _blind(model, strides):
    """The maps of these strides are darkened, so that their windows have low scores."""
    forward = model.backbone.forward

    def darkened(x):
        maps = forward(x)
        return {
            name: y * 0 if model.backbone.strides[name] in strides else y
            for name, y in maps.items()
        }

    model.backbone.forward = darkened


def test_vgg_windows_are_centred_on_the_pixels_that_their_cells_see():
    cfg = vgg_config()
    for offset, error in ((-1.0, 0), (4.0, 4)):
        cfg.MODEL.INSTANCE_FCN.CELL_OFFSET = offset
        model = build_model(cfg).eval()
        assert model.head.levels[0].offset == (8 if error == 0 else 4)
        with torch.no_grad():
            for layer in model.backbone.features:  # channels pass through: maxima of 16 x 16
                if isinstance(layer, torch.nn.Conv2d):
                    layer.weight.zero_()
                    layer.bias.zero_()
                    for channel in range(2):
                        layer.weight[channel, channel, 1, 1] = 1
        make_reader(model.head)
        # The mark touches three cells along each axis; the one in the middle wins by the sum.
        with torch.no_grad():
            model.head.score_branch[0].weight[0, 1] = 1 / 9
            model.head.score_branch[2].bias.fill_(-19)
        row, column = 11, 9
        x, y = 8 * column + 8, 8 * row + 8
        image = paint((170, 160), (x - 40, y - 24, x + 40, y + 24), (x - 1, y - 1, x + 1, y + 1))
        left, top, right, bottom = best(model, image).proposal_boxes.tensor[0].tolist()
        assert abs((left + right) / 2 - x) == abs((top + bottom) / 2 - y) == error
        assert 80 <= right - left <= 96
        assert 48 <= bottom - top <= 64


def vgg_config():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "InstanceFCN"
    cfg.MODEL.BACKBONE.NAME = "build_vgg_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.VGG.DEPTH = 11
    cfg.MODEL.VGG.OUT_FEATURES = ("conv5",)
    cfg.MODEL.VGG.POOL4_STRIDE = 1
    cfg.MODEL.VGG.CONV5_DILATION = 2
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0] * 3, [255.0] * 3
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.INSTANCE_FCN.HIDDEN = 4
    cfg.MODEL.INSTANCE_FCN.TEST.SHORT_SIDES = ()
    cfg.MODEL.INSTANCE_FCN.TEST.PRE_NMS_TOPK = 50
    return cfg


def fpn_config():
    cfg = vgg_config()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.INSTANCE_FCN.IN_FEATURES = ("p2", "p3", "p4", "p5")
    return cfg


@pytest.mark.parametrize("file_size", [(96, 128), (48, 64), (150, 150)])
def test_every_scale_of_the_pyramid_puts_its_masks_in_the_file_s_pixels(file_size):
    model = pooling_model([8], short_sides=(48, 96, 144))
    size, box, mark = (96, 128), (40, 32, 88, 64), (56, 40, 72, 56)
    (outputs,) = model(
        [{"image": paint(size, box, mark)} | dict(zip(("height", "width"), file_size))]
    )
    found = outputs["proposals"]
    assert found.image_size == file_size
    y, x = file_size[0] / 96, file_size[1] / 128
    expected = torch.tensor([40 * x, 32 * y, 88 * x, 64 * y])
    sure = found[found.objectness_logits > 0]
    assert len(sure) >= 1
    errors = (sure.proposal_boxes.tensor - expected).abs().amax(dim=1)
    assert errors.min() <= 2  # windows of other scales cut the object
    # Each scale alone finds it, too, if its window holds it: 88 pixels of the resized image.
    for side in (48, 96, 144):
        alone = pooling_model([8], short_sides=(side,))
        proposal = best_of(alone, paint(size, box, mark), *file_size)
        error = (proposal.proposal_boxes.tensor[0] - expected).abs().max()
        assert error <= 8 * 96 / side * max(x, y) / 2 + 1


def best_of(model, image, height, width):
    (outputs,) = model([{"image": image, "height": height, "width": width}])
    return outputs["proposals"][0]


def test_the_outputs_have_stock_fields_after_nms_over_all_scales():
    model = pooling_model([8], short_sides=(96, 97), proposals=ProposalSettings(nms_type="none"))
    image = paint((96, 128), (40, 32, 88, 64), (56, 40, 72, 56))
    (everything,) = model([{"image": image}])
    model.proposals = BOX
    (outputs,) = model([{"image": image}])
    proposals, instances = outputs["proposals"], outputs["instances"]
    assert len(proposals) < len(everything["proposals"]) / 2  # both scales are nearly the same
    assert set(proposals.get_fields()) == {"proposal_boxes", "objectness_logits", "pred_masks"}
    assert set(instances.get_fields()) == {"pred_boxes", "scores", "pred_classes", "pred_masks"}
    assert torch.equal(instances.scores, proposals.objectness_logits.sigmoid())
    assert proposals.pred_masks.tensor.flatten(1).any(dim=1).all()


def test_panoramas_have_no_larger_images_than_others():
    """Else the pyramid of a line of 500 pixels would be 450,000 pixels wide."""
    cfg = vgg_config()
    cfg.MODEL.INSTANCE_FCN.TEST.SHORT_SIDES = (100, 300, 600)
    cfg.MODEL.INSTANCE_FCN.TEST.MAX_SIZE = 1000
    model = build_model(cfg)
    assert model.test_sizes((480, 640)) == [(100, 133), (300, 400), (600, 800)]
    assert model.test_sizes((400, 100)) == [(400, 100), (1000, 250)]
    assert model.test_sizes((1, 500)) == [(2, 1000)]
    cfg.MODEL.INSTANCE_FCN.TEST.SHORT_SIDES = ()
    assert build_model(cfg).test_sizes((1, 5000)) == [(1, 5000)]


def batch(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for height, width in sizes:
        boxes = [(2, 3, width // 2, height // 2), (width // 2, 5, width - 1, height - 2)]
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": make_objects((height, width), boxes)})
    return inputs


@pytest.mark.parametrize("divisibility", [0, 16])
def test_losses_of_images_of_any_size(divisibility):
    model = pooling_model([4, 8], m=5, divisibility=divisibility, reader=False).train()
    sizes = [(45, 62), (37, 33), (45, 62)]
    inputs = batch(*sizes)
    inputs[1]["crowd_masks"] = BitMasks(torch.zeros((1, *sizes[1]), dtype=torch.bool))
    inputs[1]["crowd_masks"].tensor[:, 10:20] = True
    losses = model(inputs)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    # Maps of a batch that is padded as one, whose cells near the border are those of each image.
    canvas = torch.zeros((3, 3, 48, 64))
    for x, (height, width), y in zip(inputs, sizes, canvas, strict=True):
        y[:, :height, :width] = x["image"] / 255
    with torch.no_grad():
        maps = model.head(model.backbone(canvas))
    crowds = [x.get("crowd_masks") for x in inputs]
    expected = slow_losses(model.head, maps, sizes, [x["instances"] for x in inputs], crowds)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4)


CROP = PatchGeometry(input_size=40, context=16, gt_size=5, object_size=round(40 / 1.3125))


def test_patches_have_one_window_in_their_middle():
    """The same window as in the image that the patch is cut from."""
    offset = 4.0
    model = pooling_model([8], m=5, reader=False, crop=CROP, cell_offset=offset)
    with pytest.raises(ValueError, match=r"MODEL\.DEEPMASK\.CONTEXT 25: no cell is in the middle"):
        pooling_model([8], m=5, crop=replace(CROP, context=25))
    with pytest.raises(ValueError, match=r"MODEL\.DEEPMASK\.CONTEXT"):
        pooling_model([8], m=5, crop=replace(CROP, context=24))
    image = torch.randint(0, 256, (3, 96, 96)).float()
    row, column = 5, 6
    y, x = row * 8 + 4 - 28, column * 8 + 4 - 28
    patch = image[:, y : y + 56, x : x + 56]
    target = torch.randn(5, 5).sign().to(torch.int8)
    inputs = {
        "patches": torch.stack([patch, patch.flip(2), patch.flip(1)]),
        "patch_masks": torch.stack([target, torch.zeros_like(target), -target]),
        "patch_labels": torch.tensor([1, -1, 1], dtype=torch.int8),
    }
    losses = model.train()([inputs])
    sum(losses.values()).backward()
    # Cells at the border of the 5 x 5 window see the patch's 7 x 7 cells, and the image's alike.
    with torch.no_grad():
        (whole,) = model._maps(image[None])
        patches = [model._maps(p[None])[0] for p in inputs["patches"]]
        assert whole.scores[0, row, column] == pytest.approx(
            patches[0].scores[0, 3, 3].item(), 1e-4
        )
        mask_losses, score_losses = [], []
        for maps, target, label in zip(patches, inputs["patch_masks"], (1, -1, 1), strict=True):
            score_losses.append(math.log1p(math.exp(-label * float(maps.scores[0, 3, 3]))))
            cells = [
                math.log1p(
                    math.exp(
                        -float(target[u, v])
                        * float(maps.masks[0, bin_of(u, 3, 5) * 3 + bin_of(v, 3, 5), 1 + u, 1 + v])
                    )
                )
                for u in range(5)
                for v in range(5)
            ]
            if label > 0:
                mask_losses.append(np.mean(cells))
        for channel in range(9):
            torch.testing.assert_close(
                patches[0].masks[0, channel, 1:6, 1:6],
                whole.masks[0, channel, row - 2 : row + 3, column - 2 : column + 3],
            )
    assert losses["loss_instance_mask"].item() == pytest.approx(np.mean(mask_losses), rel=1e-4)
    assert losses["loss_objectness"].item() == pytest.approx(np.mean(score_losses), rel=1e-4)


def test_patches_without_positives():
    model = pooling_model([8], m=5, reader=False, crop=CROP).train()
    patches = {
        "patches": torch.rand(2, 3, 56, 56) * 255,
        "patch_masks": torch.zeros(2, 5, 5, dtype=torch.int8),
        "patch_labels": -torch.ones(2, dtype=torch.int8),
    }
    losses = model([patches])
    sum(losses.values()).backward()
    assert losses["loss_instance_mask"].item() == 0 < losses["loss_objectness"].item()
    assert all(p.grad is not None for p in model.parameters())
    for name, wrong in (
        ("patches", torch.zeros(2, 3, 48, 48)),
        ("patch_masks", torch.zeros(2, 7, 7)),
    ):
        with pytest.raises(ValueError, match=rf"^{name} must be (56 x 56|5 x 5), not"):
            model([patches | {name: wrong}])
    with pytest.raises(KeyError, match="DeepMaskPatchMapper"):
        model([{"image": torch.zeros(3, 56, 56)}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 160}, r"MODEL\.DEEPMASK\.INPUT_SIZE must be 40 .* 160"),
        ({"gt_size": 112}, r"MODEL\.DEEPMASK\.GT_SIZE must be 5 .* 112"),
        ({"object_size": 0}, r"MODEL\.DEEPMASK\.OBJECT_SIZE must be 30 .* 23"),
        ({"context": 10}, r"MODEL\.DEEPMASK\.CONTEXT 10"),
    ],
)
def test_patches_of_another_geometry_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        pooling_model([8], m=5, crop=replace(CROP, **changes))
    with pytest.raises(ValueError, match=r"MODEL\.INSTANCE_FCN\.IN_FEATURES"):
        pooling_model([8, 16], m=5, crop=CROP)


def test_crop_training_of_the_config_takes_the_mapper_s_patches(tmp_path):
    cfg = vgg_config()
    cfg.MODEL.INSTANCE_FCN.TRAIN_ON = "crop"
    deepmask = cfg.MODEL.DEEPMASK
    deepmask.INPUT_SIZE, deepmask.CONTEXT, deepmask.GT_SIZE = 168, 56, 21
    cfg.INPUT.MAPPER, cfg.INPUT.FORMAT, cfg.INPUT.MASK_FORMAT = (
        "DeepMaskPatchMapper",
        "RGB",
        "bitmask",
    )
    with pytest.raises(ValueError, match=r"MODEL\.DEEPMASK\.OBJECT_SIZE must be 128 .* 96"):
        build_model(cfg)
    deepmask.OBJECT_SIZE, deepmask.DATA.PATCHES_PER_IMAGE = 128, 2
    model = build_model(cfg)
    assert model.center_cell == 13  # centred on pixel 112
    Image.fromarray(np.full((200, 260, 3), 99, dtype=np.uint8)).save(tmp_path / "a.png")
    polygon = [60.0, 50.0, 160.0, 50.0, 160.0, 150.0, 60.0, 150.0]
    record = {
        "file_name": str(tmp_path / "a.png"),
        "image_id": 1,
        "height": 200,
        "width": 260,
        "annotations": [
            {
                "bbox": [60, 50, 160, 150],
                "bbox_mode": 0,
                "segmentation": [polygon],
                "category_id": 0,
                "iscrowd": 0,
            }
        ],
    }
    mapped = build_mapper(cfg, True)(record)
    assert tuple(mapped["patches"].shape[1:]) == (3, 224, 224)
    losses = model([mapped])
    assert all(0 < loss.item() < 2 for loss in losses.values())


def test_every_weight_has_a_gradient_though_maps_are_not_read():
    """Else training in several processes stops."""
    cfg = fpn_config()
    cfg.MODEL.INSTANCE_FCN.IN_FEATURES = ("p2",)
    torch.manual_seed(0)
    model = build_model(cfg)
    empty = batch((60, 90))
    empty[0]["instances"] = make_objects((60, 90), [])
    for inputs in (batch((60, 90)), empty):
        model.zero_grad()
        sum(model(inputs).values()).backward()
        trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
        assert [k for k, p in trained.items() if p.grad is None] == []
        assert not trained["backbone.fpn_output5.weight"].grad.any()
        assert trained["backbone.fpn_output2.weight"].grad.any()


@pytest.mark.parametrize("make_config", [vgg_config, fpn_config])
def test_bad_input(make_config):
    cfg = make_config()
    cfg.MODEL.INSTANCE_FCN.TEST.SHORT_SIDES = (4, 40)
    torch.manual_seed(0)
    model = build_model(cfg)
    inputs = batch((60, 90), (3, 5), (1, 40), (60, 90))
    inputs[0]["instances"] = make_objects((60, 90), [])
    inputs[1]["instances"] = make_objects((3, 5), [(0, 0, 1, 1)])  # too small for any window
    inputs[2]["instances"] = make_objects((1, 40), [(0, 0, 40, 1)])
    inputs[3]["instances"] = make_objects((60, 90), [(0, 0, 30, 30)], empty=(0,))
    inputs[3]["crowd_masks"] = BitMasks(torch.ones((1, 60, 90), dtype=torch.bool))
    losses = model(inputs)
    sum(losses.values()).backward()
    assert set(losses) == {"loss_instance_mask", "loss_objectness"}
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    outputs = model.eval()(inputs)
    for x, output in zip(inputs, outputs, strict=True):
        assert output["proposals"].image_size == tuple(x["image"].shape[1:])
    with torch.no_grad():
        model.head.mask_branch[2].bias.fill_(-50)
    (empty,) = model(inputs[:1])
    assert len(empty["proposals"]) == len(empty["instances"]) == 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("TRAIN_ON", "patch", r"MODEL\.INSTANCE_FCN\.TRAIN_ON must be one of .* 'patch'"),
        ("TEST.SHORT_SIDES", (0, 100), r"MODEL\.INSTANCE_FCN\.TEST\.SHORT_SIDES"),
        ("TEST.MAX_SIZE", 0, r"MODEL\.INSTANCE_FCN\.TEST\.MAX_SIZE"),
        ("TEST.PRE_NMS_TOPK", 0, r"MODEL\.INSTANCE_FCN\.TEST\.PRE_NMS_TOPK"),
        ("TEST.NMS_TYPE", "boxes", "NMS_TYPE"),
        ("IN_FEATURES", ("res4",), r"MODEL\.INSTANCE_FCN\.IN_FEATURES .*conv5.*res4"),
    ],
)
def test_errors_of_the_config_name_the_key(key, value, message):
    cfg = vgg_config()
    cfg.merge_from_list([f"MODEL.INSTANCE_FCN.{key}", value])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_mixed_precision():
    torch.manual_seed(0)
    model = pooling_model([4, 8], m=5, reader=False).train()
    inputs = batch((45, 62), (37, 33))
    plain = model(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(inputs)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(plain[name].item(), rel=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model.eval()(inputs)
    assert outputs[0]["proposals"].objectness_logits.dtype == torch.float32
    assert len(outputs[0]["proposals"]) > 0


def test_windows_of_parts_are_one_list():
    parts = [
        TrainingWindows(*(torch.full((n, *s), float(n)) for s in ((), (), (3, 3), (3, 3), (3, 3))))
        for n in (2, 0, 3)
    ]
    whole = TrainingWindows.cat(parts)
    assert whole.scores.tolist() == [2, 2, 3, 3, 3]
    assert tuple(whole.targets.shape) == (5, 3, 3)
