"""datasets/prepare_*.py."""

import importlib.util
import json
from pathlib import Path

import pytest

from unseg.evaluation import evaluate_class_agnostic

DATASETS = Path(__file__).resolve().parents[2] / "datasets"


def script(name):
    spec = importlib.util.spec_from_file_location(name, DATASETS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def instances(tmp_path):
    """A file with three images; the first has objects of two classes and a crowd."""
    square = [[10, 10, 30, 10, 30, 30, 10, 30]]
    fields = {"image_id": 1, "bbox": [10, 10, 20, 20], "area": 400.0, "segmentation": square}
    content = {
        "info": {"year": 2014},
        "licenses": [{"id": 1}],
        "images": [
            {
                "id": n,
                "file_name": f"COCO_train2014_{n}.jpg",
                "coco_url": f"http://images.cocodataset.org/train2017/{n}.jpg",
                "height": 50,
                "width": 50,
                "neg_category_ids": [4],
            }
            for n in (1, 2, 3)
        ],
        "annotations": [
            fields | {"id": 0, "category_id": 9, "iscrowd": 0},
            fields | {"id": 1, "category_id": 2, "iscrowd": 1},
            fields | {"id": 2, "category_id": 2, "image_id": 3},
        ],
        "categories": [{"id": 2, "name": "cat"}, {"id": 9, "name": "dog"}],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("prefix", ["", "train2014/"])
def test_coco20k(instances, tmp_path, caplog, prefix):
    names = tmp_path / "names.txt"
    names.write_text(f"{prefix}COCO_train2014_3.jpg\n{prefix}COCO_train2014_2.jpg\n\n")
    output = tmp_path / "new/instances_coco20k.json"
    arguments = ["--names", str(names), "--instances", str(instances), "--output", str(output)]
    script("prepare_coco20k").main(arguments)
    content = json.loads(output.read_text())
    assert [image["id"] for image in content["images"]] == [2, 3]
    assert [annotation["id"] for annotation in content["annotations"]] == [2]
    assert content["info"] == {"year": 2014}
    assert len(content["categories"]) == 2
    assert "has 2 names, COCO-20k has 19817" in caplog.text


def test_coco20k_with_unknown_names(instances, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("COCO_train2014_3.jpg\nCOCO_val2014_9.jpg\n")
    output = tmp_path / "instances_coco20k.json"
    arguments = ["--names", str(names), "--instances", str(instances), "--output", str(output)]
    with pytest.raises(ValueError, match=r"1 of 2 images are not there: COCO_val2014_9.jpg"):
        script("prepare_coco20k").main(arguments)
    assert not output.exists()


def test_class_agnostic(instances, tmp_path):
    output = tmp_path / "class_agnostic.json"
    script("prepare_class_agnostic").main([str(instances), str(output)])
    content = json.loads(output.read_text())
    assert content["categories"] == [{"id": 1, "name": "object", "supercategory": "object"}]
    assert [a["id"] for a in content["annotations"]] == [1, 2, 3]
    assert [a["iscrowd"] for a in content["annotations"]] == [1, 0, 0]
    assert {a["category_id"] for a in content["annotations"]} == {1}
    assert "instances.json" in content["info"]["description"]
    assert content["licenses"] == [{"id": 1}]
    assert content["images"][0]["file_name"] == "COCO_train2014_1.jpg"
    assert "neg_category_ids" not in content["images"][0]
    # The derived file gives the numbers of the official one.
    results = [{"image_id": n, "bbox": [10, 10, 20 - n, 20], "score": 1.0} for n in (1, 1, 2, 3)]
    official = json.loads(instances.read_text())
    numbers = [evaluate_class_agnostic(c, results, "bbox") for c in (official, content)]
    assert str(numbers[0]) == str(numbers[1])
    assert 0 < numbers[0]["AP"] < 100


def test_class_agnostic_from_lvis(instances, tmp_path):
    output = tmp_path / "class_agnostic.json"
    script("prepare_class_agnostic").main([str(instances), str(output), "--file-name-from-url"])
    content = json.loads(output.read_text())
    assert content["images"][0]["file_name"] == "train2017/1.jpg"
