"""InstanceFCN in the place of an RPN: the contract, and Detectron2's models that use it."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY, build_model
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.structures import Boxes, ImageList, PolygonMasks
from detectron2.utils.events import EventStorage
from instance_fcn_cases import make_head, make_objects, make_reader, random_maps, slow_losses

from unseg.config import get_cfg
from unseg.modeling import InstanceFCNProposalGenerator
from unseg.modeling.proposals.outputs import ProposalSettings

STOCK = """
VERSION: 2
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  DEVICE: cpu
  MASK_ON: True
  BACKBONE: {NAME: build_resnet_fpn_backbone, FREEZE_AT: 0}
  PIXEL_STD: [57.0, 57.0, 57.0]
  RESNETS: {DEPTH: 18, NORM: BN, RES2_OUT_CHANNELS: 64, OUT_FEATURES: [res2, res3, res4, res5]}
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 32}
  PROPOSAL_GENERATOR: {NAME: InstanceFCNProposalGenerator}
  INSTANCE_FCN:
    IN_FEATURES: [p2, p3, p4, p5]
    HIDDEN: 16
    POS_SCALE_OCT: 0.5
    TEST: {PRE_NMS_TOPK: 40, TOPK: 30}
  ROI_HEADS: {NAME: StandardROIHeads, IN_FEATURES: [p2, p3, p4, p5], NUM_CLASSES: 1, BATCH_SIZE_PER_IMAGE: 16, SCORE_THRESH_TEST: 0.0}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 16, POOLER_RESOLUTION: 7}
  ROI_MASK_HEAD: {NAME: MaskRCNNConvUpsampleHead, NUM_CONV: 1, CONV_DIM: 8, POOLER_RESOLUTION: 14}
"""  # noqa: E501


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "stock.yaml").write_text(STOCK)
    config = get_cfg()
    config.merge_from_file(str(tmp_path / "stock.yaml"))
    return config


def inputs():
    generator = torch.Generator().manual_seed(0)
    found = []
    for size, boxes in (
        ((96, 128), [(10, 12, 70, 60), (60, 20, 120, 90)]),
        ((75, 90), [(20, 20, 60, 70)]),
        ((64, 64), []),
    ):
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        found.append({"image": image, "instances": make_objects(size, boxes)})
    return found


def test_a_stock_rcnn_trains_and_infers(cfg):
    torch.manual_seed(0)
    model = build_model(cfg)
    assert isinstance(model.proposal_generator, InstanceFCNProposalGenerator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    names = {"loss_cls", "loss_box_reg", "loss_mask", "loss_instance_mask", "loss_objectness"}
    seen = []
    with EventStorage():
        for _ in range(2):
            losses = model(inputs())
            assert set(losses) == names
            assert all(loss.isfinite() for loss in losses.values())
            optimizer.zero_grad()
            sum(losses.values()).backward()
            head = model.proposal_generator.head
            assert all(p.grad is not None and p.grad.any() for p in head.parameters())
            optimizer.step()
            seen.append(losses["loss_objectness"].item())
    assert seen[0] != seen[1]
    outputs = model.eval()([x | {"height": 50, "width": 60} for x in inputs()])
    assert len(outputs) == 3
    for output in outputs:
        assert output["instances"].image_size == (50, 60)
        assert output["instances"].has("pred_masks")
    assert sum(len(output["instances"]) for output in outputs) > 0


def test_a_proposal_network_gives_its_proposals(cfg):
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    outputs = build_model(cfg).eval()([x | {"height": 48, "width": 64} for x in inputs()])
    for output in outputs:
        boxes = output["proposals"].proposal_boxes.tensor
        assert 0 < len(boxes) <= 30
        assert output["proposals"].image_size == (48, 64)
        assert boxes.amin() >= 0
        assert (boxes <= torch.tensor([64.0, 48.0, 64.0, 48.0])).all()


def make_generator(strides=(8,), reader=True, **others):
    head = make_head(list(strides), m=11, **others)
    if reader:
        make_reader(head)
    settings = ProposalSettings(nms_type="box", topk=100)
    return InstanceFCNProposalGenerator(head=head, proposals=settings, pre_nms_topk=20)


def test_boxes_are_around_the_masks_in_each_image_of_a_padded_batch():
    generator = make_generator().eval()
    sizes = [(64, 96), (50, 70)]
    features = torch.zeros(2, 3, 8, 12)
    features[0, 0, 2:5, 4:9] = 1  # the object
    features[0, 1, 3, 6] = 1  # its mark
    features[1, 0, 2:, 4:] = 1  # reaches into the padding
    features[1, 1, 4, 6] = 1
    features[1, 1, 7:, 9:] = 2
    images = ImageList(torch.zeros(2, 3, 64, 96), sizes)
    proposals, losses = generator(images, {"p0": features})
    assert losses == {}
    boxes = ([32, 16, 72, 40], [32, 16, 70, 50])
    for found, size, box in zip(proposals, sizes, boxes, strict=True):
        assert found.image_size == size
        assert set(found.get_fields()) == {"proposal_boxes", "objectness_logits"}
        assert isinstance(found.proposal_boxes, Boxes)
        assert found.proposal_boxes.tensor[0].tolist() == box
        assert found.objectness_logits[0] == 10
        assert (found.objectness_logits.diff() <= 0).all()
    assert proposals[0].proposal_boxes.tensor.dtype == torch.float32


def test_half_a_stride_off_is_another_box():
    generator = make_generator(cell_offset=8.0).eval()
    features = torch.zeros(1, 3, 8, 12)
    features[0, 0, 2:5, 4:9] = features[0, 1, 3, 6] = 1
    ((found,), _) = generator(ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)]), {"p0": features})
    assert found.proposal_boxes.tensor[0].tolist() == [36, 20, 76, 44]


def test_training_gives_losses_and_proposals_without_gradients():
    generator = make_generator((4, 8), reader=False, training={"pos_shift": 24, "neg_shift": 33})
    sizes = [(45, 62), (64, 64)]
    objects = [make_objects(sizes[0], [(2, 2, 38, 40)]), make_objects(sizes[1], [(5, 9, 70, 60)])]
    features = {
        "p0": torch.randn(2, 3, 16, 16, requires_grad=True),
        "p1": torch.randn(2, 3, 8, 8, requires_grad=True),
    }
    images = ImageList(torch.zeros(2, 3, 64, 64), sizes)
    proposals, losses = generator(images, features, objects)
    with torch.no_grad():
        maps = generator.head(features)
    expected = slow_losses(generator.head, maps, sizes, objects)
    for name, value in expected.items():
        assert value > 0
        assert losses[name].item() == pytest.approx(value, rel=1e-5)
    assert all(loss.requires_grad for loss in losses.values())
    for found in proposals:
        assert not found.objectness_logits.requires_grad
        assert not found.proposal_boxes.tensor.requires_grad
    with_truth = add_ground_truth_to_proposals(objects, proposals)
    assert [len(x) for x in with_truth] == [len(x) + 1 for x in proposals]
    with pytest.raises(ValueError, match="needs gt_instances in training"):
        generator(images, features)


def test_numbers_that_are_not_finite_stop_training_and_are_left_out_in_testing():
    generator = make_generator((8,), reader=False)
    images = ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)])
    features = torch.randn(1, 3, 8, 8)
    features[0, :, :, :2] = torch.nan
    with pytest.raises(FloatingPointError, match="Training has diverged"):
        generator(images, {"p0": features}, [make_objects((64, 64), [])])
    ((found,), _) = generator.eval()(images, {"p0": features * torch.nan})
    assert len(found) == 0
    features[0, :, :, :2] = 0
    ((found,), _) = generator(images, {"p0": features})
    assert len(found) > 0


def test_polygons_train_like_bitmasks():
    generator = make_generator((8,), reader=False)
    size, (x0, y0, x1, y1) = (64, 64), (1, 8, 61, 56)
    maps = random_maps(generator.head, 1, [(8, 8)])
    results = []
    for polygons in (False, True):
        objects = make_objects(size, [(x0, y0, x1, y1)])
        if polygons:
            corners = torch.tensor([x0, y0, x1, y0, x1, y1, x0, y1], dtype=torch.float64)
            objects.gt_masks = PolygonMasks([[corners]])
        torch.manual_seed(0)  # draws the same order
        windows = generator.head.training_windows(maps, [size], [objects])
        assert windows.labels.any()
        results.append(windows)
    assert torch.equal(results[0].labels, results[1].labels)
    assert torch.equal(results[0].scores, results[1].scores)
    # A polygon's border and a bitmask's may differ by a pixel.
    assert (results[0].targets != results[1].targets).float().mean() < 0.05


def test_it_is_registered_and_its_errors_name_the_key(cfg):
    assert PROPOSAL_GENERATOR_REGISTRY.get("InstanceFCNProposalGenerator")
    shapes = {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in range(2, 7)}
    generator = build_proposal_generator(cfg, shapes)
    assert [level.stride for level in generator.head.levels] == [4, 8, 16, 32]
    assert (generator.pre_nms_topk, generator.proposals.topk) == (40, 30)
    with pytest.raises(ValueError, match=r"MODEL\.INSTANCE_FCN\.IN_FEATURES"):
        build_proposal_generator(cfg, {"res4": shapes["p4"]})
    cfg.MODEL.INSTANCE_FCN.TRAIN_ON = "crop"
    with pytest.raises(ValueError, match=r"MODEL\.INSTANCE_FCN\.TRAIN_ON must be 'image' .*'crop'"):
        build_proposal_generator(cfg, shapes)
    cfg.MODEL.INSTANCE_FCN.TRAIN_ON = "image"
    cfg.MODEL.INSTANCE_FCN.TEST.PRE_NMS_TOPK = 0
    with pytest.raises(ValueError, match=r"MODEL\.INSTANCE_FCN\.TEST\.PRE_NMS_TOPK"):
        build_proposal_generator(cfg, shapes)
