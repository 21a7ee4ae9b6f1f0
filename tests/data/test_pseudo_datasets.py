"""Pseudo-mask files as Detectron2 data sets."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from unseg.config import get_cfg
from unseg.data import (
    register_datasets_in_config,
    register_if_file,
    register_pseudo_masks,
)
from unseg.discovery import write_pseudo_masks
from unseg.structures import ImageRecord, PseudoMask


@pytest.fixture
def masks_file(tmp_path):
    pixels = np.zeros((10, 20), dtype=np.uint8, order="F")
    pixels[2:5, 4:12] = 1
    mask = PseudoMask(mask_util.encode(pixels), 0.75, np.array([1.0, 2.0]))
    path = tmp_path / "x.json"
    write_pseudo_masks(
        path, [ImageRecord("sub/a.jpg", 10, 20, 3, [mask]), ImageRecord("b.jpg", 5, 5, 4)]
    )
    return path


@pytest.fixture
def forget():
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.usefixtures("forget")
def test_names_in_the_config_are_registered(masks_file):
    cfg = get_cfg()
    name = f"{masks_file}@/images/"
    cfg.DATASETS.TRAIN = (name, "unseg_synthetic_train")
    for _ in range(2):  # every process does it; twice in one is fine
        register_datasets_in_config(cfg)
    first, second = DatasetCatalog.get(name)
    assert first["file_name"] == "/images/sub/a.jpg"
    assert (first["image_id"], first["height"], first["width"]) == (3, 10, 20)
    (annotation,) = first["annotations"]
    assert annotation["bbox"] == [4, 2, 8, 3]
    assert annotation["bbox_mode"] == BoxMode.XYWH_ABS
    assert (annotation["category_id"], annotation["iscrowd"], annotation["area"]) == (0, 0, 24)
    assert annotation["score"] == 0.75
    np.testing.assert_array_equal(annotation["embedding"], [1, 2])
    assert second["annotations"] == []
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["object"]
    assert metadata.evaluator_type == "coco_class_agnostic"


@pytest.mark.usefixtures("forget")
def test_images_of_a_registered_data_set(masks_file):
    register_pseudo_masks("pm", str(masks_file), "unseg_synthetic_val")
    assert DatasetCatalog.get("pm")[1]["file_name"] == "unseg-synthetic://val/b.jpg"
    MetadataCatalog.get("no_root").set(thing_classes=["x"])
    DatasetCatalog.register("no_root", lambda: [])
    with pytest.raises(ValueError, match="the data set no_root does not say where its images are"):
        register_pseudo_masks("pm2", str(masks_file), "no_root")


@pytest.mark.usefixtures("forget")
def test_annotation_files_keep_crowds_areas_and_boxes(tmp_path):
    """No annotation has a score: this is ground truth, not what something found."""
    pixels = np.zeros((10, 20), dtype=np.uint8, order="F")
    pixels[2:5, 4:12] = 1
    crowd = mask_util.encode(pixels)
    crowd["counts"] = crowd["counts"].decode()
    common = {"image_id": 3, "bbox": [4, 2, 8, 3]}
    polygon = [[4, 2, 12, 2, 12, 5, 4, 5]]
    content = {
        "images": [{"id": 3, "height": 10, "width": 20, "file_name": "a.jpg"}],
        "annotations": [
            common
            | {"id": 1, "category_id": 5, "iscrowd": 0, "area": 23.5, "segmentation": polygon},
            common | {"id": 2, "category_id": 9, "iscrowd": 1, "area": 24, "segmentation": crowd},
        ],
    }
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(content))
    (record,) = DatasetCatalog.get(register_if_file(f"{path}@/images"))
    assert record["file_name"] == "/images/a.jpg"
    assert [a["iscrowd"] for a in record["annotations"]] == [0, 1]
    assert [a["area"] for a in record["annotations"]] == [23.5, 24]
    assert [a["category_id"] for a in record["annotations"]] == [0, 0]
    # With a score they are somebody's masks: areas are theirs, crowds are none.
    content["annotations"][0]["score"] = 0.5
    (tmp_path / "found.json").write_text(json.dumps(content))
    (record,) = DatasetCatalog.get(register_if_file(f"{tmp_path}/found.json@/images"))
    (annotation,) = record["annotations"]
    assert annotation["score"] == 0.5
    assert annotation["area"] == 24


def test_missing_folder():
    cfg = get_cfg()
    cfg.DATASETS.TEST = ("x.json@",)
    with pytest.raises(ValueError, match=r"write x\.json@DIR"):
        register_datasets_in_config(cfg)
