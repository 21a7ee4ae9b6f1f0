"""The default mapper against Detectron2's, and on the data that Detectron2's cannot take."""

import copy

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from unseg.config import get_cfg
from unseg.data import build_mapper
from unseg.data.image import ImageReadError
from unseg.data.mappers import InstanceMapper, ResizeShortestEdge
from unseg.data.sampling import isolated_rng

SIZE = (40, 60)


def rle(y0, y1, x0, x1):
    mask = np.zeros(SIZE, dtype=np.uint8, order="F")
    mask[y0:y1, x0:x1] = 1
    return mask_util.encode(mask)


@pytest.fixture
def record(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")

    def annotation(box, **others):
        return {
            "bbox": box,
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": 0,
            "iscrowd": 0,
        } | others

    return {
        "file_name": str(tmp_path / "a.png"),
        "height": SIZE[0],
        "width": SIZE[1],
        "image_id": 5,
        "annotations": [
            annotation([10, 5, 20, 10], segmentation=rle(5, 15, 10, 30), score=0.5),
            annotation([0, 0, 60, 40], segmentation=rle(0, 40, 0, 60), iscrowd=1),
            annotation([40, 20, 9, 19], segmentation=rle(20, 39, 40, 49)),
        ],
    }


def make_cfg(**changes):
    cfg = get_cfg()
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.MIN_SIZE_TRAIN = (30, 50, 80)
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_equals_detectron2s_mapper(record, seed, crop):
    cfg = make_cfg(INPUT__CROP__ENABLED=crop)
    before = copy.deepcopy(record)
    with isolated_rng(seed):
        ours = build_mapper(cfg, True)(record)
    assert record == before, "the dataset dict was changed"
    with isolated_rng(seed):
        theirs = DatasetMapper(cfg, True)(record)
    assert torch.equal(ours["image"], theirs["image"])
    assert torch.equal(ours["instances"].gt_masks.tensor, theirs["instances"].gt_masks.tensor)
    assert torch.equal(ours["instances"].gt_classes, theirs["instances"].gt_classes)
    masks = ours["instances"].gt_masks
    assert torch.equal(ours["instances"].gt_boxes.tensor, masks.get_bounding_boxes().tensor)
    assert "annotations" not in ours


def test_testing_keeps_no_annotations(record):
    mapped = build_mapper(make_cfg(INPUT__MIN_SIZE_TEST=20), False)(record)
    assert mapped["image"].shape == (3, 20, 30)
    assert (mapped["height"], mapped["width"], mapped["image_id"]) == (40, 60, 5)
    assert "annotations" not in mapped
    assert "instances" not in mapped


def test_class_agnostic(record):
    record["annotations"][2]["category_id"] = 7
    assert build_mapper(make_cfg(), True)(record)["instances"].gt_classes.tolist() == [0, 7]
    agnostic = build_mapper(make_cfg(INPUT__CLASS_AGNOSTIC=True), True)
    assert agnostic(record)["instances"].gt_classes.tolist() == [0, 0]
    assert record["annotations"][2]["category_id"] == 7


def test_polygons_and_runs_may_be_mixed_whatever_the_mask_format(record):
    record["annotations"][0]["segmentation"] = [[10, 5, 30, 5, 30, 15, 10, 15]]
    uncompressed = {"size": list(SIZE), "counts": [0, 80, 2320]}
    record["annotations"][2]["segmentation"] = mask_util.frPyObjects(uncompressed, *SIZE)
    cfg = make_cfg(
        INPUT__MASK_FORMAT="polygon", INPUT__MIN_SIZE_TRAIN=(40,), INPUT__RANDOM_FLIP="none"
    )
    masks = build_mapper(cfg, True)(record)["instances"].gt_masks.tensor
    assert masks.sum((1, 2)).tolist() == [200, 80]


def test_images_without_objects(record):
    record["annotations"] = record["annotations"][1:2]  # the crowd
    instances = build_mapper(make_cfg(), True)(record)["instances"]
    assert len(instances) == 0
    assert instances.gt_masks.tensor.shape[0] == 0
    assert instances.gt_boxes.tensor.shape == (0, 4)


@pytest.mark.parametrize("seed", range(4))
def test_crowds_are_kept_if_wanted_and_follow_the_image(record, seed):
    crowd, other = record["annotations"][1], copy.deepcopy(record["annotations"][1])
    crowd["segmentation"] = rle(10, 30, 5, 25)
    other["segmentation"] = [[40, 20, 60, 20, 60, 40, 40, 40]]
    record["annotations"].append(other)
    before = copy.deepcopy(record)
    cfg = make_cfg(INPUT__MIN_SIZE_TRAIN=(40,))
    plain = build_mapper(cfg, True)
    cfg.INPUT.KEEP_CROWDS = True
    keeping = build_mapper(cfg, True)
    with isolated_rng(seed):
        without = plain(record)
    with isolated_rng(seed):
        mapped = keeping(record)
    assert record == before
    assert "crowd_masks" not in without
    assert torch.equal(mapped["instances"].gt_masks.tensor, without["instances"].gt_masks.tensor)
    # The first object tells whether the image was flipped.
    flipped = bool(mapped["instances"].gt_boxes.tensor[0, 0] != 10)
    masks = mapped["crowd_masks"].tensor
    expected = torch.zeros((2, *SIZE), dtype=torch.bool)
    expected[0, 10:30, 5:25] = expected[1, 20:40, 40:60] = True
    assert torch.equal(masks, expected.flip(2) if flipped else expected)
    assert "crowd_masks" not in build_mapper(cfg, False)(record)


def test_crowds_out_of_view_and_without_masks(record):
    cfg = make_cfg(INPUT__KEEP_CROWDS=True, INPUT__MIN_SIZE_TRAIN=(40,))
    crowd = record["annotations"][1]
    crowd["segmentation"] = rle(0, 0, 0, 0)
    for annotations in (record["annotations"], record["annotations"][1:2], []):
        masks = build_mapper(cfg, True)(record | {"annotations": annotations})["crowd_masks"]
        assert tuple(masks.tensor.shape) == (0, *SIZE)
    del crowd["segmentation"]
    with pytest.raises(ValueError, match=r"a\.png: a crowd has no 'segmentation'"):
        build_mapper(cfg, True)(record)


def test_boxes_alone(record):
    for annotation in record["annotations"]:
        del annotation["segmentation"]
    with pytest.raises(ValueError, match=r"a\.png: its annotations have no 'segmentation'"):
        build_mapper(make_cfg(), True)(record)
    instances = build_mapper(make_cfg(MODEL__MASK_ON=False), True)(record)["instances"]
    assert len(instances) == 2
    assert not instances.has("gt_masks")


def test_errors_name_the_file(record, tmp_path):
    with pytest.raises(ImageReadError, match=r"none\.png"):
        build_mapper(make_cfg(), True)(record | {"file_name": str(tmp_path / "none.png")})
    with pytest.raises(ValueError, match=r"a\.png"):
        build_mapper(make_cfg(), True)(record | {"height": 7})


def test_unknown_mapper_names_the_known_ones():
    with pytest.raises(KeyError, match="InstanceMapper"):
        build_mapper(make_cfg(INPUT__MAPPER="None"), True)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1)])
@pytest.mark.parametrize("is_train", [False, True])
def test_very_thin_images(tmp_path, size, is_train):
    Image.fromarray(np.full((*size, 3), 9, np.uint8)).save(tmp_path / "thin.png")
    mask = np.asfortranarray(np.ones(size, np.uint8))
    annotation = {
        "bbox": [0, 0, size[1], size[0]],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "segmentation": mask_util.encode(mask),
    }
    record = {
        "file_name": str(tmp_path / "thin.png"),
        "height": size[0],
        "width": size[1],
        "annotations": [annotation],
    }
    cfg = make_cfg(INPUT__MIN_SIZE_TRAIN=(800,), INPUT__MAX_SIZE_TRAIN=1000)
    cfg.INPUT.MAX_SIZE_TEST = 1000
    expected = tuple(max(1, side // 3) for side in size)
    for seed in range(6):  # flipped and not
        with isolated_rng(seed):
            mapped = build_mapper(cfg, is_train)(record)
        assert mapped["image"].shape == (3, *expected)
        if is_train:
            assert mapped["instances"].gt_masks.tensor.shape == (1, *expected)
            assert mapped["instances"].gt_masks.tensor.all()


def test_resizing_is_detectron2s_for_other_images():
    rng = np.random.default_rng(0)
    ours, theirs = (
        kind((100, 200, 350), 500, "choice") for kind in (ResizeShortestEdge, T.ResizeShortestEdge)
    )
    assert repr(ours) == repr(theirs)
    for size in rng.integers(20, 700, (30, 2)):
        image = np.zeros((*size, 3), np.uint8)
        shapes = []
        for augmentation in (ours, theirs):
            with isolated_rng(*size):
                shapes.append(augmentation.get_transform(image).apply_image(image).shape)
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("is_train", [False, True])
def test_proposals_follow_the_image(record, is_train):
    record |= {
        "proposal_boxes": np.array([[10.0, 5.0, 30.0, 15.0], [0, 0, 60, 40], [5, 5, 9, 9]]),
        "proposal_objectness_logits": np.array([2.0, 1.0, 0.5]),
        "proposal_bbox_mode": BoxMode.XYXY_ABS,
    }
    before = copy.deepcopy(record)
    cfg = make_cfg(MODEL__LOAD_PROPOSALS=True, INPUT__MIN_SIZE_TRAIN=(80,))
    cfg.INPUT.MIN_SIZE_TEST = 80
    cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN = cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST = 2
    with isolated_rng(1):
        ours = build_mapper(cfg, is_train)(record)
    np.testing.assert_equal(record, before)
    with isolated_rng(1):
        theirs = DatasetMapper(cfg, is_train)(record)
    assert not any(key.startswith("proposal_") for key in ours)
    found, expected = ours["proposals"], theirs["proposals"]
    assert len(found) == 2
    assert found.image_size == (80, 120)
    assert torch.equal(found.proposal_boxes.tensor, expected.proposal_boxes.tensor)
    assert torch.equal(found.objectness_logits, expected.objectness_logits)
    if is_train:  # the first proposal is the box of the first object
        box = ours["instances"].gt_boxes.tensor[0]
        torch.testing.assert_close(found.proposal_boxes.tensor[0], box)


def test_semantic_segmentation_follows_the_image(record, tmp_path):
    labels = np.zeros(SIZE, np.uint8)
    labels[5:15, 10:30] = 255
    labels[20:39, 40:49] = 3
    Image.fromarray(labels).save(tmp_path / "labels.png")
    record["sem_seg_file_name"] = str(tmp_path / "labels.png")
    for seed in range(3):
        with isolated_rng(seed):
            ours = build_mapper(make_cfg(INPUT__CROP__ENABLED=True), True)(record)
        with isolated_rng(seed):
            theirs = DatasetMapper(make_cfg(INPUT__CROP__ENABLED=True), True)(record)
        assert torch.equal(ours["sem_seg"], theirs["sem_seg"])
        assert ours["sem_seg"].dtype == torch.int64
    Image.fromarray(labels[:-1]).save(tmp_path / "labels.png")
    with pytest.raises(ValueError, match=r"labels\.png: its size is \(39, 60\)"):
        build_mapper(make_cfg(), True)(record)
    (tmp_path / "labels.png").write_bytes(b"")
    with pytest.raises(ImageReadError, match=r"labels\.png: cannot be read"):
        build_mapper(make_cfg(), True)(record)


def test_keypoints_are_refused():
    with pytest.raises(ValueError, match="MODEL.KEYPOINT_ON"):
        InstanceMapper(make_cfg(MODEL__KEYPOINT_ON=True), True)
