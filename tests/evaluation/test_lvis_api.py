"""The package lvis: harmless to import, and its numbers from content in memory."""

import copy
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from lvis_cases import (
    annotation,
    lvis_content,
    lvis_numbers,
    random_content,
    random_results,
    rectangle,
)
from pycocotools import mask as mask_util

from unseg.config import get_cfg
from unseg.data.datasets.synthetic import register_synthetic
from unseg.evaluation import build_evaluator
from unseg.evaluation.lvis_api import (
    METRICS,
    category_ids_of_classes,
    evaluate_lvis,
    lvis_ground_truth_of,
    part_of_images,
)

# In a process of its own: lvis may have been imported here, and pytest has handlers.
HARMLESS = """
import itertools, logging, sys
import numpy as np
from unseg.evaluation.lvis_api import import_lvis
root, mine = logging.getLogger(), logging.StreamHandler()
mine.setFormatter(logging.Formatter("%(message)s"))
for lvis_is_first, have_one in itertools.product((False, True), repeat=2):
    for name in [name for name in sys.modules if name.split(".")[0] == "lvis"]:
        del sys.modules[name]
    root.handlers.clear()
    if lvis_is_first:
        import lvis
        assert root.handlers, "lvis sets up the root logger no more: the work-around can go"
    root.setLevel(logging.INFO)
    if have_one:
        root.addHandler(mine)
    before = set(vars(np))
    lvis = import_lvis()
    assert import_lvis() is lvis
    assert root.handlers == ([mine] if have_one else []), (lvis_is_first, root.handlers)
    assert root.level == logging.INFO
    assert not hasattr(np, "float") and set(vars(np)) == before
    assert lvis.eval.np.float is float and lvis.eval.np.linspace is np.linspace
"""


def test_import_leaves_logging_and_numpy_alone():
    child = [sys.executable, "-W", "ignore", "-c", HARMLESS]
    done = subprocess.run(child, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(6))
def test_same_as_the_package_on_files(seed, task, tmp_path):
    content = random_content(seed)
    results = random_results(content, seed)
    kept = copy.deepcopy((content, results))
    ours = evaluate_lvis(content, results, task)
    assert (content, results) == kept
    theirs = lvis_numbers(content, results, task, tmp_path)
    assert tuple(ours) == METRICS
    for metric in METRICS:
        expected = math.nan if theirs[metric] == -1 else 100 * theirs[metric]
        assert ours[metric] == pytest.approx(expected, nan_ok=True, abs=1e-12), metric
    assert 5 < ours["AP"] < 95


def test_average_precision_by_hand():
    """One category, two objects. Found: one of two, after a false alarm: precision 1/2 up to recall
    1/2, which are 51 of 101 points."""
    content = lvis_content(
        [annotation(1, 5, 1, [0, 0, 40, 40]), annotation(2, 6, 1, [9, 9, 40, 40])], (5, 6)
    )
    results = [
        {"image_id": 5, "category_id": 1, "score": 0.5, "bbox": [0.0, 0, 40, 40]},
        {"image_id": 6, "category_id": 1, "score": 0.9, "bbox": [80.0, 60, 40, 40]},
        {"image_id": 6, "category_id": 2, "score": 0.9, "bbox": [80.0, 60, 40, 40]},
    ]
    found = evaluate_lvis(content, results, "bbox")
    assert found["AP"] == pytest.approx(100 * 51 / 101 / 2)
    assert found["APr"] == found["APm"] == found["AP"]
    assert all(math.isnan(found[m]) for m in ("APc", "APf", "APs", "APl"))


def test_sizes_are_of_masks_for_masks():
    """A false alarm of 900 pixels, in a box of 3600, is small: it costs small objects half."""
    content = lvis_content([annotation(1, 5, 1, [0, 0, 30, 30])], (5,))
    results = [
        {"image_id": 5, "category_id": 1, "score": score, "bbox": box, "segmentation": mask}
        for score, box, mask in (
            (0.5, [0.0, 0, 30, 30], rectangle(0, 0, 30, 30)),
            (0.9, [60.0, 60, 60, 60], rectangle(60, 60, 30, 30)),
        )
    ]
    assert evaluate_lvis(content, results, "segm")["APs"] == pytest.approx(50)
    assert evaluate_lvis(content, results, "bbox")["APs"] == pytest.approx(100)


def test_annotation_ids_may_be_0():
    """lvis marks what is matched by its id, so the object 0 would be found again and again."""
    content = lvis_content([annotation(0, 5, 1, [0, 0, 30, 30])], (5,))
    result = {"image_id": 5, "category_id": 1, "score": 1.0, "bbox": [0.0, 0, 30, 30]}
    assert evaluate_lvis(content, [result], "bbox")["AP"] == pytest.approx(100)


def test_nothing_found_and_nothing_to_find():
    content = random_content(0)
    missed = evaluate_lvis(content, [], "segm")
    assert missed["AP"] == missed["AP50"] == 0
    empty = lvis_content([], (5,))
    result = {"image_id": 5, "category_id": 1, "score": 1.0, "bbox": [0.0, 0, 30, 30]}
    for results in ([], [result]):
        assert all(math.isnan(v) for v in evaluate_lvis(empty, results, "bbox").values())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"category_id": -1}, "category -1 "),
        ({"image_id": 99}, "image 99 "),
        ({"bbox": None}, "image 5 has no bbox"),
    ],
)
def test_wrong_results(change, match):
    content = lvis_content([annotation(1, 5, 1, [0, 0, 30, 30])], (5,))
    result = {"image_id": 5, "category_id": 1, "score": 1.0, "bbox": [0.0, 0, 30, 30]} | change
    with pytest.raises(ValueError, match=match):
        evaluate_lvis(content, [result], "bbox")
    with pytest.raises(ValueError, match="task"):
        evaluate_lvis(content, [], "keypoints")


def test_part_of_images():
    content = random_content(1)
    part = part_of_images(content, {4, 7})
    assert [image["id"] for image in part["images"]] == [4, 7]
    assert part["annotations"] == [a for a in content["annotations"] if a["image_id"] in (4, 7)]
    assert part["categories"] == content["categories"]


def register_file(register, tmp_path, content, **metadata):
    file = tmp_path / "lvis.json"
    file.write_text(json.dumps(content))
    return register([], json_file=str(file), **metadata)


def test_ground_truth_of_a_file(register, tmp_path):
    content = random_content(2)
    name = register_file(register, tmp_path, content)
    assert lvis_ground_truth_of(name) == (content, str(tmp_path / "lvis.json"))
    assert category_ids_of_classes(name, content) == {c: c + 1 for c in range(6)}


def test_categories_numbered_by_the_metadata(register, tmp_path):
    content = random_content(2)
    numbers = {6: 0, 5: 1, 4: 2, 3: 3, 2: 4, 1: 5}
    name = register_file(register, tmp_path, content, thing_dataset_id_to_contiguous_id=numbers)
    assert category_ids_of_classes(name, content) == {c: 6 - c for c in range(6)}
    numbers.pop(4)
    with pytest.raises(ValueError, match="lacks the category 4"):
        category_ids_of_classes(name, content)


@pytest.mark.parametrize("version", ["v0.5", "v1"])
def test_ground_truth_of_detectron2s_registrations(version, monkeypatch, tmp_path, register):
    """Both versions number their categories 1 ... C, and thing_classes are in that order."""
    name = f"lvis_{version}_val"
    classes = MetadataCatalog.get(name).thing_classes
    assert len(classes) == {"v0.5": 1230, "v1": 1203}[version]
    content = lvis_content([annotation(1, 5, 1, [0, 0, 30, 30])], (5,), len(classes))
    assert category_ids_of_classes(name, content) == {c: c + 1 for c in range(len(classes))}


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda c: c["images"][0].pop("neg_category_ids"), "not an LVIS file.*neg_category_ids"),
        (lambda c: c["categories"][0].pop("frequency"), "not an LVIS file.*frequency"),
        (lambda c: c["annotations"].clear(), "has no annotations"),
        (lambda c: c["annotations"][0].update(image_id=77), "image_id 77"),
        (lambda c: c["annotations"][0].update(category_id=0), "category_id 0"),
    ],
)
def test_files_that_cannot_be_evaluated_on(register, tmp_path, spoil, match):
    content = random_content(3)
    spoil(content)
    with pytest.raises(ValueError, match=match):
        lvis_ground_truth_of(register_file(register, tmp_path, content))


def test_data_sets_without_a_file(register):
    name = register([])
    with pytest.raises(ValueError, match="'toy' has no LVIS ground truth"):
        lvis_ground_truth_of(name)
    with pytest.raises(ValueError, match="'unseg_synthetic_val_single' has no LVIS.*needs style"):
        lvis_ground_truth_of("unseg_synthetic_val_single")
    with pytest.raises(KeyError, match="not registered"):
        lvis_ground_truth_of("nowhere")


def perfect_prediction(record) -> Instances:
    """The dataset dict's objects as an output of a class-aware model."""
    found = Instances((record["height"], record["width"]))
    objects = record["annotations"]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    found.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    found.scores = torch.ones(len(objects))
    found.pred_classes = torch.tensor([a["category_id"] for a in objects], dtype=torch.int64)
    masks = [mask_util.decode(a["segmentation"]) for a in objects]
    found.pred_masks = torch.from_numpy(np.array(masks)).bool()
    return found


def test_stock_evaluator_on_synthetic_scenes(tmp_path):
    name = "stock_lvis"
    register_synthetic(name, "lvis", seed=9, count=40)
    cfg = get_cfg()
    cfg.TEST.EVALUATORS = ("LVISEvaluator",)
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.DATASETS.TEST = (name,)
    evaluator = build_evaluator(cfg, name)
    assert MetadataCatalog.get(name).get("json_file") is None
    assert [p.name for p in tmp_path.glob("inference/*")] == [f"{name}_lvis_format.json"]
    evaluator.reset()
    for record in DatasetCatalog.get(name)[:15]:
        evaluator.process([record], [{"instances": perfect_prediction(record)}])
    results = evaluator.evaluate()
    assert 5 < results["segm"]["AP"] < 95  # the other images' objects are missed
    # And by the other road.
    content, _ = lvis_ground_truth_of(name)
    file = json.loads((tmp_path / "inference/lvis_instances_results.json").read_text())
    for task in ("bbox", "segm"):
        expected = evaluate_lvis(content, file, task)
        found = {m: math.nan if v == -100 else v for m, v in results[task].items()}
        assert found == pytest.approx(expected, nan_ok=True)
    part = part_of_images(content, {r["image_id"] for r in file})
    assert evaluate_lvis(part, file, "segm")["AP"] == pytest.approx(100)
