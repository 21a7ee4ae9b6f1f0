"""The evaluator on registered data sets: toy ones, and the shared subsets of real ones."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from coco_cases import official, random_case, refuse_to_paste_all, uncompressed, windows_of
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from pycocotools import mask as mask_util

from unseg.config import get_cfg
from unseg.data.datasets.coco_json import load_class_agnostic_json
from unseg.evaluation import ClassAgnosticCOCOEvaluator, evaluate_class_agnostic
from unseg.evaluation.coco_class_agnostic import RESULTS_FILE, output_folder
from unseg.evaluation.coco_records import to_rle
from unseg.layers.packed_masks import pack_masks
from unseg.structures import encode_masks

HEIGHT, WIDTH = 60, 80


def rectangles(seed=0, count=4):
    """Masks (count, HEIGHT, WIDTH) bool and their boxes (count, 4) XYXY."""
    rng = np.random.default_rng(seed)
    masks = torch.zeros((count, HEIGHT, WIDTH), dtype=torch.bool)
    boxes = torch.zeros((count, 4))
    for n in range(count):
        x, y = int(rng.integers(0, WIDTH - 12)), int(rng.integers(0, HEIGHT - 12))
        w, h = int(rng.integers(5, WIDTH - x)), int(rng.integers(5, HEIGHT - y))
        masks[n, y : y + h, x : x + w] = True
        boxes[n] = torch.tensor([x, y, x + w, y + h])
    return masks, boxes


def record(image_id, seed=0, count=4, form="rle"):
    """A dataset dict as Detectron2 loads it: classes 0, 1, ..., no areas."""
    masks, boxes = rectangles(seed, count)
    annotations = []
    for n, (mask, box) in enumerate(zip(masks.numpy(), boxes.tolist())):
        x0, y0, x1, y1 = box
        segmentation = {
            "rle": encode_masks(mask[None])[0],
            "uncompressed": uncompressed(mask),
            "polygon": [[x0, y0, x1, y0, x1, y1, x0, y1]],
            "box": None,
        }[form]
        annotations.append(
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": n}
            | ({"segmentation": segmentation} if segmentation else {})
        )
    return {
        "file_name": f"{image_id}.jpg",
        "image_id": image_id,
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": annotations,
    }


def perfect(seed=0, count=4, **fields):
    """Predictions equal to the objects of :func:`record`, all of class 0."""
    masks, boxes = rectangles(seed, count)
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_boxes = Boxes(boxes)
    instances.pred_masks = masks
    instances.scores = torch.linspace(0.9, 0.5, count)
    instances.pred_classes = torch.zeros(count, dtype=torch.int64)
    for name, value in fields.items():
        instances.set(name, value)
    return {"instances": instances}


def run(evaluator, predictions, records):
    evaluator.reset()
    for r, p in zip(records, predictions):
        evaluator.process([r], [p])
    return evaluator.evaluate()


@pytest.mark.parametrize("form", ["rle", "uncompressed", "polygon"])
def test_ground_truth_as_prediction(register, form):
    records = [record(n, seed=n, form=form) for n in (5, 3, 9)]
    evaluator = ClassAgnosticCOCOEvaluator(register(records))
    results = run(evaluator, [perfect(n) for n in (5, 3, 9)], records)
    assert list(results) == ["bbox", "segm"]
    for numbers in results.values():
        assert numbers["AP"] == pytest.approx(100, abs=1e-9)
        assert numbers["AR@100"] == pytest.approx(100, abs=1e-9)
        assert numbers["AR@1"] == pytest.approx(25)


def test_equals_pycocotools_on_a_class_aware_json(tmp_path, register):
    """Through Detectron2's own registration, which drops the areas, and with string counts."""
    for seed in (1, 2, 3):
        coco_gt, detections = random_case(seed)
        path = tmp_path / f"{seed}.json"
        for image in coco_gt["images"]:
            image["file_name"] = f"{image['id']}.jpg"
        path.write_text(json.dumps(coco_gt))
        name = f"toy_json_{seed}"
        register_coco_instances(name, {}, str(path), str(tmp_path))
        try:
            evaluator = ClassAgnosticCOCOEvaluator(name, output_dir=str(tmp_path))
            numbers = run(evaluator, *as_outputs(detections, coco_gt["images"]))
        finally:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        written = json.loads((tmp_path / RESULTS_FILE).read_text())
        assert {r["category_id"] for r in written} == {1}
        assert len(written) == len(detections)
        for task in ("bbox", "segm"):
            # What was written has the float32 of tensors; the reference must see the same numbers.
            known = [r | {"category_id": coco_gt["categories"][0]["id"]} for r in written]
            expected = official(coco_gt, known, task)
            np.testing.assert_allclose(
                list(numbers[task].values()), list(expected.values()), rtol=0, atol=1e-9
            )


def as_outputs(results, images):
    """Model outputs and inputs for results in COCO's form; masks stay encoded."""
    outputs, inputs = [], []
    for image in images:
        own = [r for r in results if r["image_id"] == image["id"]]
        boxes = torch.tensor([r["bbox"] for r in own], dtype=torch.float64).reshape(-1, 4)
        instances = Instances((image["height"], image["width"]))
        instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        instances.scores = torch.tensor([r["score"] for r in own], dtype=torch.float64)
        instances.pred_masks = [r["segmentation"] for r in own]
        instances.pred_classes = torch.tensor([r["category_id"] for r in own]).long()
        outputs.append({"instances": instances})
        inputs.append({"image_id": image["id"]})
    return outputs, inputs


def test_masks_may_be_tensors_bitmasks_or_encodings(register):
    records = [record(1)]
    evaluator = ClassAgnosticCOCOEvaluator(register(records))
    masks, _ = rectangles()
    expected = run(evaluator, [perfect()], records)
    forms = (BitMasks(masks), masks.byte(), encode_masks(masks), masks.numpy(), pack_masks(masks))
    for form in forms:
        got = run(evaluator, [perfect(pred_masks=form)], records)
        assert str(got) == str(expected)  # NaN is not equal to itself


def test_masks_of_windows(register, monkeypatch):
    records = [record(1)]
    evaluator = ClassAgnosticCOCOEvaluator(register(records))
    expected = run(evaluator, [perfect()], records)
    windows = windows_of(rectangles()[0])
    refuse_to_paste_all(monkeypatch)
    assert str(run(evaluator, [perfect(pred_masks=windows)], records)) == str(expected)


def test_masks_without_boxes(register):
    records = [record(1)]
    output = perfect()
    output["instances"].remove("pred_boxes")
    results = run(ClassAgnosticCOCOEvaluator(register(records)), [output], records)
    assert results["bbox"]["AP"] == pytest.approx(100)


def test_proposals_are_boxes(register):
    records = [record(1)]
    proposals = Instances((HEIGHT, WIDTH))
    proposals.proposal_boxes = Boxes(rectangles()[1])
    proposals.objectness_logits = torch.tensor([-3.0, 2.0, 0.0, 11.0])
    results = run(
        ClassAgnosticCOCOEvaluator(register(records)), [{"proposals": proposals}], records
    )
    assert list(results) == ["bbox"]
    assert results["bbox"]["AP"] == pytest.approx(100)


def test_boxes_only_ground_truth(register, caplog):
    records = [record("000005", form="box"), record("000007", seed=1, form="box")]
    name = register(records)
    results = run(ClassAgnosticCOCOEvaluator(name), [perfect(), perfect(1)], records)
    assert list(results) == ["bbox"]
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert "8 of 8 objects of toy have boxes only" in caplog.text
    with pytest.raises(ValueError, match="no segmentation"):
        run(ClassAgnosticCOCOEvaluator(name, tasks=("segm",)), [perfect(), perfect(1)], records)


def test_crowds_are_kept(register):
    records = [record(1)]
    records[0]["annotations"][2]["iscrowd"] = 1
    name = register(records)
    masks, boxes = rectangles()
    crowd = masks[2:3] & ~masks[0:1] & ~masks[1:2] & ~masks[3:4]
    inside = {
        "pred_masks": torch.cat([masks, crowd, crowd]),
        "pred_boxes": Boxes(torch.cat([boxes, boxes[2:3], boxes[2:3]])),
        "scores": torch.tensor([0.5, 0.5, 0.5, 0.5, 0.9, 0.9]),
        "pred_classes": torch.zeros(6),
    }
    output = Instances((HEIGHT, WIDTH), **inside)
    results = run(ClassAgnosticCOCOEvaluator(name), [{"instances": output}], records)
    assert results["segm"]["AP"] == pytest.approx(100)
    records[0]["annotations"][2]["iscrowd"] = 0
    results = run(ClassAgnosticCOCOEvaluator(name), [{"instances": output}], records)
    assert results["segm"]["AP"] < 90


def test_no_predictions(register, caplog):
    records = [record(1), record(2, count=0)]
    results = run(
        ClassAgnosticCOCOEvaluator(register(records)),
        [perfect(count=0), perfect(count=0)],
        records,
    )
    assert results["bbox"]["AP"] == results["segm"]["AP"] == results["segm"]["AR@10"] == 0
    assert "no predictions at all on toy: AP is 0" in caplog.text
    assert "not processed" not in caplog.text


def test_missing_images_are_said(register, caplog):
    records = [record(1), record(2, seed=1)]
    results = run(ClassAgnosticCOCOEvaluator(register(records)), [perfect()], records[:1])
    assert 0 < results["segm"]["AP"] < 60
    assert "1 of 2 images of toy were not processed" in caplog.text


def square_annotation(number, image_id, x, **fields):
    """A square of 20 pixels' side as in a COCO file; its area is 5000, so that it is medium."""
    return {
        "id": number,
        "image_id": image_id,
        "category_id": 1,
        "iscrowd": 0,
        "bbox": [x, 0, 20, 20],
        "area": 5000.0,
        "segmentation": [[x, 0, x + 20, 0, x + 20, 20, x, 20]],
    } | fields


def square_output(*columns):
    """Predictions equal to squares of :func:`square_annotation`."""
    masks = torch.zeros((len(columns), HEIGHT, WIDTH), dtype=torch.bool)
    for mask, x in zip(masks, columns):
        mask[:20, x : x + 20] = True
    boxes = torch.tensor([[x, 0, x + 20.0, 20] for x in columns])
    return perfect(count=len(columns), pred_masks=masks, pred_boxes=Boxes(boxes))


def write_squares(path, *annotations):
    images = [{"id": n, "file_name": f"{n}.jpg", "height": HEIGHT, "width": WIDTH} for n in (1, 2)]
    content = {"info": {}, "images": images, "annotations": annotations}
    path.write_text(json.dumps(content | {"categories": [{"id": 1, "name": "square"}]}))
    return load_coco_json(str(path), "")


def test_dicts_are_the_ground_truth_and_the_file_knows_areas(tmp_path, register, caplog):
    """A registration may hold fewer images and objects than its json_file."""
    path = tmp_path / "all.json"
    boxes = (10, 10, 40)  # two of one box: the second is small
    annotations = [square_annotation(n, 1, x) for n, x in enumerate(boxes, 1)]
    annotations[1]["area"] = 99.0
    first, _ = write_squares(path, *annotations, square_annotation(4, 2, 30))
    del first["annotations"][2]
    name = register([first], json_file=str(path))
    results = run(ClassAgnosticCOCOEvaluator(name), [square_output(10, 10)], [first])
    for task in ("bbox", "segm"):
        assert results[task]["AP"] == pytest.approx(100)  # nothing of the rest is missed
        assert results[task]["APm"] == pytest.approx(100)  # by the file's areas, not by pixels
        assert results[task]["APs"] == pytest.approx(100)
    assert "have no area" not in caplog.text
    # Boxes that went through corners are still known, other objects have their own sizes.
    del first["annotations"][1]
    (annotation,) = first["annotations"]
    annotation |= {"bbox": [10 + 1e-6, 0, 30, 20], "bbox_mode": BoxMode.XYXY_ABS}
    results = run(ClassAgnosticCOCOEvaluator(name), [square_output(10)], [first])
    assert results["segm"]["APm"] == pytest.approx(100)
    assert "have no area" not in caplog.text
    annotation["bbox"] = [11, 0, 30, 20]
    results = run(ClassAgnosticCOCOEvaluator(name), [square_output(10)], [first])
    assert results["segm"]["APs"] == pytest.approx(100)
    assert np.isnan(results["segm"]["APm"])
    assert "1 of 1 objects have no area" in caplog.text


def test_objects_of_invalid_polygons_are_left_out_whoever_loads_the_file(tmp_path, register):
    """Detectron2's registration and ours give one answer."""
    path = tmp_path / "file.json"
    annotations = (
        square_annotation(1, 1, 0),
        square_annotation(2, 1, 30, segmentation=[[1, 2, 3, 4]]),
        square_annotation(3, 1, 50, segmentation=[[50, 0, 70, 0], [50, 0, 70, 0, 70, 20, 50, 20]]),
    )
    theirs = write_squares(path, *annotations)
    numbers = []
    for dicts, metadata in (
        (theirs, {"json_file": str(path)}),
        (load_class_agnostic_json(path, ""), {"annotation_file": str(path)}),
    ):
        name = register(dicts, f"toy_{len(numbers)}", **metadata)
        evaluator = ClassAgnosticCOCOEvaluator(name)
        numbers.append(str(run(evaluator, [square_output(0), square_output()], dicts)))
        assert len(evaluator._ground_truth["annotations"]) == 2
    assert numbers[0] == numbers[1]


def test_short_polygons_have_no_pixels():
    """pycocotools takes all polygons for boxes if the first has four numbers, and fails."""
    long = [1, 1, 5, 1, 5, 5]
    assert mask_util.area(to_rle([[1, 2, 3, 4], long], 9, 9, "x")) == 6
    for order in ([long], [long, [1, 2, 3, 4]]):
        merged = mask_util.merge(mask_util.frPyObjects(order, 9, 9))
        assert to_rle(order, 9, 9, "x") == merged
        assert mask_util.area(merged) == 6
    with pytest.raises(ValueError, match="annotation 7: no polygon has three points"):
        to_rle([[1, 2, 3, 4]], 9, 9, "annotation 7")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"instances": None}, "image 1: the output has neither"),
        ({"sem_seg": 0}, "neither 'instances' nor 'proposals'.*sem_seg"),
        (perfect(scores=torch.tensor([1, float("nan"), 1, 1])), "image 1: 1 scores are NaN/inf"),
        (
            perfect(pred_boxes=Boxes(torch.full((4, 4), float("inf")))),
            "image 1: boxes are NaN/inf",
        ),
        (perfect(pred_masks=rectangles()[0].float()), "image 1: pred_masks must be bool"),
        (perfect(pred_masks=rectangles()[0][:, None]), "image 1: pred_masks must be bool"),
        (perfect(pred_masks=[0, 1, 2, 3]), "image 1: pred_masks are neither"),
        ({"instances": Instances((HEIGHT, WIDTH), scores=torch.ones(2))}, "image 1: predictions"),
    ],
)
def test_bad_outputs(register, output, message):
    evaluator = ClassAgnosticCOCOEvaluator(register([record(1)]))
    with pytest.raises(ValueError, match=message):
        evaluator.process([{"image_id": 1}], [output])


def test_masks_of_another_size_than_the_image(register):
    records = [record(1)]
    output = perfect(pred_masks=rectangles()[0][:, ::2])
    with pytest.raises(ValueError, match=r"image 1: the mask is \[30, 80\]"):
        run(ClassAgnosticCOCOEvaluator(register(records)), [output], records)


def test_bad_arguments(register):
    name = register([record(1)])
    with pytest.raises(KeyError, match="not registered"):
        ClassAgnosticCOCOEvaluator("no such data set")
    with pytest.raises(ValueError, match="tasks"):
        ClassAgnosticCOCOEvaluator(name, tasks=("keypoints",))
    with pytest.raises(ValueError, match="max_dets"):
        ClassAgnosticCOCOEvaluator(name, max_dets=(0,))


def test_results_file_is_whole_or_absent(register, tmp_path, monkeypatch):
    records = [record(1)]
    evaluator = ClassAgnosticCOCOEvaluator(register(records), output_dir=str(tmp_path / "out"))
    numbers = run(evaluator, [perfect()], records)
    path = tmp_path / "out" / RESULTS_FILE
    before = path.read_bytes()
    again = evaluate_class_agnostic(evaluator._ground_truth, json.loads(before), "segm")
    assert str(again) == str(numbers["segm"])  # NaN is not equal to itself
    assert [p.name for p in path.parent.iterdir()] == [RESULTS_FILE]

    def fail(content, file):
        file.write("[")
        raise OSError("disk full")

    monkeypatch.setattr(json, "dump", fail)
    with pytest.raises(OSError, match="disk full"):
        evaluator.evaluate()
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [RESULTS_FILE]


def test_one_table_that_says_what_it_is(register, caplog):
    caplog.set_level(logging.INFO)
    records = [record(1)]
    records[0]["annotations"][0]["iscrowd"] = 1
    name = register(records, thing_classes=["cat", "dog", "cow", "hen"], annotation_file="gt.json")
    run(ClassAgnosticCOCOEvaluator(name), [perfect()], records)
    tables = [r.getMessage() for r in caplog.records if "|" in r.getMessage()]
    assert len(tables) == 1
    assert "of toy (gt.json): 1 images, 3 objects, 1 crowd regions" in tables[0]
    assert not any(word in tables[0] for word in ("cat", "dog", "Per-category"))
    assert tables[0].count("\n") == 4  # header, rule, bbox, segm


def test_from_config(register, caplog):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = "/some/where"
    cfg.TEST.CLASS_AGNOSTIC.MAX_DETS = (1, 300)
    records = [record(1)]
    evaluator = ClassAgnosticCOCOEvaluator(cfg, register(records))
    assert "TEST.DETECTIONS_PER_IMAGE 100 is below" in caplog.text
    assert evaluator._output_dir == "/some/where/inference"
    evaluator._output_dir = None
    keys = list(run(evaluator, [perfect()], records)["segm"])
    assert [k for k in keys if k.startswith("AR@")] == ["AR@1", "AR@100", "AR@300"]
    cfg.DATASETS.TEST = ("a", "b")
    assert output_folder(cfg, "b") == "/some/where/inference/b"


def test_folders_of_data_sets_that_are_paths(tmp_path):
    """Names of pseudo-mask files must not lead out of the output folder."""
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    names = (
        "/data/x.json@/data/imgs",
        "/data/x.json@/data_imgs",
        "../../x.json@y",
        "..",
        "a" * 300,
    )
    cfg.DATASETS.TEST = names
    folders = {output_folder(cfg, name) for name in names}
    assert len(folders) == len(names)
    for folder in map(Path, folders):
        assert folder.resolve().parent == tmp_path / "inference"
        folder.mkdir(parents=True)  # its name is none too long


def evaluate_images(mine, folder):
    """Results of a process that sees some of seven images."""
    records = [record(n, seed=n, count=n % 4) for n in range(7)]
    DatasetCatalog.register("toy_ranks", lambda: records)
    evaluator = ClassAgnosticCOCOEvaluator("toy_ranks", output_dir=folder)
    for n in mine:
        evaluator.process([records[n]], [perfect(n + (n == 5), n % 4)])
    results = evaluator.evaluate()
    DatasetCatalog.remove("toy_ranks")
    return results


def evaluate_on_rank(rank, folder):
    """One of two processes; the image in the middle goes to both."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    results = evaluate_images((range(4), range(3, 7))[rank], f"{folder}/ranks")
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(results, file)
    torch.distributed.destroy_process_group()


def test_ranks(tmp_path):
    """Two processes give what one gives, numbers and file; only the main one has numbers."""
    expected = evaluate_images(range(7), str(tmp_path / "one"))
    assert expected["segm"]["AP"] < 100
    mp.start_processes(evaluate_on_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    assert (tmp_path / "0.json").read_text() == json.dumps(expected)
    assert (tmp_path / "1.json").read_text() == "{}"
    files = [(tmp_path / folder / RESULTS_FILE).read_bytes() for folder in ("one", "ranks")]
    assert files[0] == files[1]


def objects_as_outputs(dicts):
    """The objects (not the crowds) of dataset dicts as predictions of class 0."""
    for r in dicts:
        objects = [a for a in r["annotations"] if not a.get("iscrowd", 0)]
        rles = []
        for a in objects:
            mask = a["segmentation"]
            if isinstance(mask, list):
                mask = mask_util.merge(mask_util.frPyObjects(mask, r["height"], r["width"]))
            rles.append(mask)
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float64).reshape(-1, 4)
        instances = Instances((r["height"], r["width"]))
        instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        instances.scores = torch.ones(len(objects))
        instances.pred_masks = rles
        instances.pred_classes = torch.zeros(len(objects))
        yield {"instances": instances}


def test_shared_coco_subset(shared_datasets, register):
    """The numbers of specs/evaluation.md, from the class-aware file and from ours."""
    path = shared_datasets / "coco/annotations/instances_val2017.json"
    name = "toy_shared_val"
    register_coco_instances(name, {}, str(path), str(shared_datasets / "coco/val2017"))
    try:
        dicts = DatasetCatalog.get(name)
        aware = run(ClassAgnosticCOCOEvaluator(name), objects_as_outputs(dicts), dicts)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    for numbers in aware.values():
        assert numbers["AP"] == pytest.approx(100, abs=1e-9)
        assert numbers["AR@1"] == pytest.approx(10.9, abs=0.05)
        assert numbers["AR@10"] == pytest.approx(70.3, abs=0.05)
        assert numbers["AR@100"] == pytest.approx(100, abs=1e-9)
    merged = load_class_agnostic_json(path, shared_datasets / "coco/val2017")
    agnostic = run(
        ClassAgnosticCOCOEvaluator(register(lambda: merged)), objects_as_outputs(merged), merged
    )
    assert agnostic == aware
