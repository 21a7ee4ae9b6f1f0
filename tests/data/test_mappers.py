"""The default mapper against Detectron2's, and on the data that Detectron2's cannot take."""

import copy

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from unseg.config import get_cfg
from unseg.data import build_mapper
from unseg.data.image import ImageReadError
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
