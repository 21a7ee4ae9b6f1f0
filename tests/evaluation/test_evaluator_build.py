"""Evaluators by name and by the kind of the dataset."""

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.structures import Boxes, BoxMode, Instances

from unseg.config import get_cfg
from unseg.evaluation import EVALUATORS, ClassAgnosticCOCOEvaluator, build_evaluator


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    return cfg


@pytest.fixture
def dataset():
    """A two-class data set of one image with one object, of a kind to be set."""
    name = "toy_build"
    annotation = {
        "bbox": [10, 10, 50, 40],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 1,
        "segmentation": [[10, 10, 50, 10, 50, 40, 10, 40]],
        "iscrowd": 0,
    }
    record = {
        "file_name": "1.jpg",
        "image_id": 1,
        "height": 60,
        "width": 80,
        "annotations": [annotation],
    }
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(thing_classes=["cat", "dog"])
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.parametrize("kind", ["coco", "coco_class_agnostic", "lvis", "pascal_voc"])
def test_default_is_class_agnostic(cfg, dataset, kind):
    MetadataCatalog.get(dataset).evaluator_type = kind
    assert isinstance(build_evaluator(cfg, dataset), ClassAgnosticCOCOEvaluator)


def test_unknown_kinds_and_names(cfg, dataset):
    with pytest.raises(ValueError, match="evaluator_type None.*ClassAgnosticCOCOEvaluator"):
        build_evaluator(cfg, dataset)
    cfg.TEST.EVALUATORS = ("NoSuchEvaluator",)
    with pytest.raises(KeyError, match="NoSuchEvaluator.*there are: .*COCOEvaluator"):
        build_evaluator(cfg, dataset)


def test_several(cfg, dataset):
    class Other(DatasetEvaluator):
        def __init__(self, cfg, dataset_name):
            self.name = dataset_name

        def evaluate(self):
            return {"other": {"name": self.name}}

    if "Other" not in EVALUATORS:
        EVALUATORS.register(Other)
    cfg.TEST.EVALUATORS = ("ClassAgnosticCOCOEvaluator", "Other")
    evaluator = build_evaluator(cfg, dataset)
    assert isinstance(evaluator, DatasetEvaluators)
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [prediction()])
    results = evaluator.evaluate()
    assert results["other"] == {"name": dataset}
    assert results["segm"]["AP"] == pytest.approx(100)
    cfg.TEST.EVALUATORS = ("ClassAgnosticCOCOEvaluator", "COCOEvaluator")
    with pytest.raises(ValueError, match="same keys"):
        build_evaluator(cfg, dataset)


def prediction():
    instances = Instances((60, 80))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 10, 50, 40]]))
    instances.pred_masks = torch.zeros((1, 60, 80), dtype=torch.bool)
    instances.pred_masks[:, 10:40, 10:50] = True
    instances.scores = torch.ones(1)
    instances.pred_classes = torch.ones(1, dtype=torch.int64)
    return {"instances": instances}


def test_class_aware_by_name(cfg, dataset):
    """Detectron2's evaluator must survive a prediction, also without the C++ extension."""
    MetadataCatalog.get(dataset).evaluator_type = "coco"
    cfg.TEST.EVALUATORS = ("COCOEvaluator",)
    evaluator = build_evaluator(cfg, dataset)
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [prediction()])
    results = evaluator.evaluate()
    assert results["segm"]["AP"] == pytest.approx(100)
    assert "AP-dog" in results["bbox"]


def test_class_aware_ground_truth_is_not_that_of_an_earlier_run(cfg, dataset):
    """Detectron2 writes the data set to the output folder and would find the old file there."""
    cfg.TEST.EVALUATORS = ("COCOEvaluator",)
    cfg.DATASETS.TEST = (dataset,)
    annotation = DatasetCatalog.get(dataset)[0]["annotations"][0]
    for shift, expected in ((0, 100), (25, 0)):
        annotation["bbox"] = [10 + shift, 10, 50 + shift, 40]
        evaluator = build_evaluator(cfg, dataset)
        evaluator.reset()
        evaluator.process([{"image_id": 1}], [prediction()])
        assert evaluator.evaluate()["bbox"]["AP50"] == pytest.approx(expected)
        # Others would take the categories of that file for the data set's.
        assert MetadataCatalog.get(dataset).get("json_file") is None


def test_class_aware_files_stay_in_the_output_folder(cfg, dataset, tmp_path):
    name = str(tmp_path / "elsewhere/x.json@imgs")
    DatasetCatalog.register(name, lambda: DatasetCatalog.get(dataset))
    MetadataCatalog.get(name).set(thing_classes=["cat", "dog"])
    try:
        cfg.OUTPUT_DIR = str(tmp_path / "out")
        cfg.DATASETS.TEST = (name, dataset)
        cfg.TEST.EVALUATORS = ("COCOEvaluator",)
        build_evaluator(cfg, name)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert len(list(tmp_path.glob("out/inference/*/*_coco_format.json"))) == 1


@pytest.mark.parametrize("name", ["COCOEvaluator", "LVISEvaluator"])
def test_class_aware_is_refused_for_one_class_models(cfg, dataset, name):
    cfg.TEST.EVALUATORS = (name,)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    with pytest.raises(ValueError, match="one-class model.*'cat'"):
        build_evaluator(cfg, dataset)
