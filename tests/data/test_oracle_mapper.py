"""The mapper that shows the annotations to the model, from the data set to the batch."""

import copy

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from unseg.config import get_cfg
from unseg.data import build_mapper, build_test_loader
from unseg.data.sampling import isolated_rng

SIZE = (40, 60)


def make_cfg(mapper="OracleMapper"):
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MAPPER = mapper
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TEST = 20
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


@pytest.fixture
def expected():
    """Two objects; the second lies over the first."""
    index_map = np.zeros(SIZE, np.int32)
    index_map[5:25, 10:30] = 1
    index_map[20:39, 20:49] = 2
    return index_map


@pytest.fixture
def record(tmp_path, expected):
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    base = {"bbox": [1, 1, 5, 5], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
    second = mask_util.encode(np.asfortranarray(expected == 2, dtype=np.uint8))
    return {
        "file_name": str(tmp_path / "a.png"),
        "image_id": 5,
        "height": SIZE[0],
        "width": SIZE[1],
        "annotations": [
            base | {"segmentation": [[10, 5, 30, 5, 30, 25, 10, 25]]},
            base | {"segmentation": second},
            base | {"segmentation": [[0, 0, 60, 0, 60, 40, 0, 40]], "iscrowd": 1},
        ],
    }


def test_the_map_has_the_size_of_the_file(record, expected):
    before = copy.deepcopy(record)
    mapped = build_mapper(make_cfg(), False)(record)
    assert mapped["image"].shape == (3, 20, 30)
    assert mapped["instance_map"].dtype == torch.int32
    np.testing.assert_array_equal(mapped["instance_map"].numpy(), expected)
    assert str(record) == str(before), "the dataset dict was changed"
    del mapped["instance_map"]
    plain = build_mapper(make_cfg("InstanceMapper"), False)(record)
    assert mapped.keys() == plain.keys()
    assert torch.equal(mapped["image"], plain["image"])


def test_dicts_without_a_size(record, expected):
    del record["height"], record["width"]
    mapped = build_mapper(make_cfg(), False)(record)
    np.testing.assert_array_equal(mapped["instance_map"].numpy(), expected)


def test_training_is_that_of_the_default_mapper(record):
    outputs = []
    for name in ("OracleMapper", "InstanceMapper"):
        with isolated_rng(3):
            outputs.append(build_mapper(make_cfg(name), True)(record))
    ours, theirs = outputs
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["image"], theirs["image"])
    assert torch.equal(ours["instances"].gt_masks.tensor, theirs["instances"].gt_masks.tensor)


def test_images_without_objects_are_not_images_without_annotations(record):
    record["annotations"] = []
    assert not build_mapper(make_cfg(), False)(record)["instance_map"].any()
    del record["annotations"]
    with pytest.raises(ValueError, match=r"a\.png: OracleMapper needs 'annotations'"):
        build_mapper(make_cfg(), False)(record)


def test_errors_name_the_file(record):
    del record["annotations"][1]["segmentation"]
    with pytest.raises(ValueError, match=r"a\.png: annotation 1 has no segmentation"):
        build_mapper(make_cfg(), False)(record)


def test_through_the_test_loader(register, record, expected):
    name = register([record], thing_classes=["object"])
    (batch,) = build_test_loader(make_cfg(), name)
    np.testing.assert_array_equal(batch[0]["instance_map"].numpy(), expected)


def test_synthetic_clips():
    """As many numbers as there are objects to be seen, each with its area."""
    for record in DatasetCatalog.get("unseg_synthetic_val_video_frames")[:3]:
        index_map = build_mapper(make_cfg(), False)(record)["instance_map"]
        areas = [annotation["area"] for annotation in record["annotations"]]
        assert torch.bincount(index_map.flatten()).tolist()[1:] == areas
