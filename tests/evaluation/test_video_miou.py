"""The evaluator of frame mIoU: facts, toy data sets, clips drawn and real, several ranks."""

import json
import logging

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from coco_cases import refuse_to_paste_all, windows_of
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from pycocotools import mask as mask_util

from unseg.config import get_cfg
from unseg.data.datasets import register_builtin_datasets
from unseg.evaluation import ClassAgnosticCOCOEvaluator, VideoMIoUEvaluator, build_evaluator
from unseg.evaluation.video_miou import label_map
from unseg.layers.packed_masks import pack_masks
from unseg.structures import GridLabels, WindowMasks, encode_masks

SIZE = (48, 64)
P = 8
FLAVOURS = ("image", "patch-center", "patch-corner", "patch-majority")


def rectangle(y0, y1, x0, x1, size=SIZE):
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


# Two objects of equal area, side by side, on patch borders.
HALVES = [rectangle(8, 40, 8, 32), rectangle(8, 40, 32, 56)]


def record(image_id, masks, size=SIZE, **fields):
    annotations = [
        {
            "bbox": [0, 0, 1, 1],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": n,
            "segmentation": rle,
        }
        for n, rle in enumerate(encode_masks(np.array(masks).reshape(-1, *size)))
    ]
    base = {"file_name": f"{image_id}.jpg", "image_id": image_id}
    return base | {"height": size[0], "width": size[1], "annotations": annotations} | fields


def instances(masks, scores=None, size=SIZE):
    masks = torch.as_tensor(np.array(masks, dtype=bool).reshape(-1, *size))
    result = Instances(size)
    result.pred_masks = masks
    result.scores = torch.as_tensor(scores or [0.5] * len(masks))
    return result


def patches(masks, patch=P):
    """Labels of whole patches by the pixel in the middle, and the part that they cover."""
    size = np.shape(masks)[1:] if len(masks) else SIZE
    h, w = size[0] // patch, size[1] // patch
    labels = np.zeros((h, w), np.int64)
    for n, mask in enumerate(masks):
        labels[mask[: h * patch, : w * patch][patch // 2 :: patch, patch // 2 :: patch]] = n + 1
    return GridLabels(torch.from_numpy(labels), (h * patch / size[0], w * patch / size[1]))


def run(evaluator, records, outputs):
    for inputs, output in zip(records, outputs, strict=True):
        evaluator.process([inputs], [output])
    return evaluator.evaluate()["video_miou"]


def both(masks):
    return {"instances": instances(masks), "grid_labels": patches(masks)}


@pytest.mark.parametrize(
    ("pred", "miou", "f_score"),
    [
        (HALVES, 100, 100),
        (HALVES[::-1], 100, 100),
        ([HALVES[0] | HALVES[1]], 25, 100),
        (HALVES[:1], 50, 200 / 3),
        ([*HALVES, rectangle(0, 8, 0, 64)], 100, 100 * 2 * 1536 / (1536 + 2048)),
        ([], 0, 0),
    ],
)
def test_facts(register, pred, miou, f_score):
    records = [record(1, HALVES)]
    numbers = run(VideoMIoUEvaluator(register(records)), records, [both(pred)])
    for flavour in FLAVOURS:
        assert numbers[f"mIoU-{flavour}"] == pytest.approx(miou)
        assert numbers[f"F-{flavour}"] == pytest.approx(f_score)
        assert numbers[f"K-{flavour}"] == len(pred)
        assert numbers[f"K-true-{flavour}"] == 2
        assert numbers[f"skipped-{flavour}"] == 0
    assert (numbers["frames"], numbers["oracle-K"]) == (1, 0)
    assert not any("by-video" in key for key in numbers)
    assert all(type(value) is float for value in numbers.values())


def test_means_over_frames_and_over_videos(register):
    """Video 1: 100, 25, a frame without objects; video 2: 50."""
    records = [
        record(10, HALVES, video_id=1),
        record(11, HALVES, video_id=1),
        record(12, [], video_id=1),
        record(20, HALVES, video_id=2),
    ]
    outputs = [both(HALVES), both([HALVES[0] | HALVES[1]]), both(HALVES), both(HALVES[:1])]
    numbers = run(VideoMIoUEvaluator(register(records)), records, outputs)
    for flavour in FLAVOURS:
        assert numbers[f"mIoU-{flavour}"] == pytest.approx(175 / 3)
        assert numbers[f"mIoU-{flavour}-by-video"] == pytest.approx((62.5 + 50) / 2)
        assert numbers[f"F-{flavour}"] == pytest.approx((100 + 100 + 200 / 3) / 3)
        assert numbers[f"K-{flavour}"] == pytest.approx(4 / 3)
        assert numbers[f"skipped-{flavour}"] == 1
    assert numbers["frames"] == 4


def test_flavours_of_the_grid(register):
    """Objects whose corner, middle and most frequent pixels differ; the map is cropped."""
    size = (2 * P + 5, 2 * P + 3)
    truth = rectangle(1, P, 0, P, size)  # all of the first patch but its first row
    truth |= rectangle(2 * P, 2 * P + 5, 0, 2 * P + 3, size)  # below the grid
    records = [record(1, [truth], size)]
    grid = GridLabels(torch.tensor([[1, 0], [0, 0]]), (2 * P / size[0], 2 * P / size[1]))
    evaluator = VideoMIoUEvaluator(register(records))
    numbers = run(evaluator, records, [{"grid_labels": grid}])
    assert numbers["mIoU-patch-center"] == numbers["mIoU-patch-majority"] == 100
    assert np.isnan(numbers["mIoU-patch-corner"])
    assert (numbers["skipped-patch-corner"], numbers["skipped-patch-center"]) == (1, 0)
    assert "mIoU-image" not in numbers


def test_a_perfect_label_per_patch_is_perfect_at_the_centre_only(register):
    """specs/README.md: the flavour of the ground truth matters. Objects of any outline."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:90, :130]
    records, outputs = [], []
    for image_id in range(20):
        centres, radii = rng.uniform((10, 10), (80, 120), (3, 2)), rng.uniform(12, 25, 3)
        masks = [np.hypot(y - cy, x - cx) < r for (cy, cx), r in zip(centres, radii)]
        records.append(record(image_id, masks, (90, 130)))
        outputs.append({"grid_labels": patches(masks, 16)})
    numbers = run(VideoMIoUEvaluator(register(records)), records, outputs)
    assert numbers["mIoU-patch-center"] == 100
    assert numbers["mIoU-patch-corner"] < 80
    assert numbers["mIoU-patch-corner"] + 5 < numbers["mIoU-patch-majority"] < 100


def test_where_masks_overlap_the_higher_score_wins():
    first, second, third = rectangle(0, 4, 0, 8), rectangle(2, 6, 0, 8), rectangle(3, 8, 4, 8)
    found = label_map(instances([first, second, third], [0.5, 0.9, 0.5]))
    expected = np.where(second, 2, np.where(first, 1, np.where(third, 3, 0)))
    np.testing.assert_array_equal(found, expected)
    scores = [0.9, 0.1, 0.5]
    found = label_map(instances([first, second, third], scores))
    np.testing.assert_array_equal(found, np.where(first, 1, np.where(third, 3, 2 * second)))


def test_every_form_of_masks(monkeypatch):
    expected = label_map(instances(HALVES))
    dense = instances(HALVES).pred_masks
    windows = windows_of(dense)
    for masks in (BitMasks(dense), pack_masks(dense), encode_masks(dense), dense.byte()):
        output = instances(HALVES)
        output.remove("pred_masks")
        output.pred_masks = masks
        np.testing.assert_array_equal(label_map(output), expected)
    refuse_to_paste_all(monkeypatch)
    output.pred_masks = windows
    np.testing.assert_array_equal(label_map(output), expected)
    output.remove("pred_masks")
    output.pred_masks = WindowMasks(windows.probabilities, windows.boxes, (5, 5))
    with pytest.raises(ValueError, match=r"pred_masks are \(5, 5\)"):
        label_map(output)
    empty = instances([])
    empty.remove("pred_masks")
    empty.pred_masks = []
    assert not label_map(empty).any()


def test_true_objects_in_the_rear_count_if_something_of_them_is_seen(register):
    """The later annotation wins; crowds are background."""
    below, above = rectangle(0, 16, 0, 16), rectangle(0, 16, 8, 24)
    hidden = rectangle(0, 8, 8, 16)
    records = [record(1, [hidden, below, above, rectangle(32, 48, 0, 64)])]
    records[0]["annotations"][3]["iscrowd"] = 1
    numbers = run(VideoMIoUEvaluator(register(records)), records, [both([below & ~above, above])])
    for flavour in FLAVOURS:
        assert numbers[f"mIoU-{flavour}"] == numbers[f"F-{flavour}"] == 100
        assert numbers[f"K-true-{flavour}"] == 2


def test_an_output_that_only_some_frames_have(register, caplog):
    records = [record(1, HALVES), record(2, HALVES)]
    outputs = [both(HALVES), {"instances": instances(HALVES)}]
    numbers = run(VideoMIoUEvaluator(register(records)), records, outputs)
    assert numbers["mIoU-image"] == 100
    assert not any("patch" in key for key in numbers)
    assert "not all 2 frames have these outputs: {'patch-center': 1" in caplog.text


def test_frames_twice_and_frames_left_out(register, caplog):
    records = [record(1, HALVES), record(2, HALVES), record(3, HALVES)]
    evaluator = VideoMIoUEvaluator(register(records))
    evaluator.process(
        [records[1], records[0], records[1]], [both(HALVES[:1]), both(HALVES), both(HALVES[:1])]
    )
    numbers = evaluator.evaluate()["video_miou"]
    assert (numbers["mIoU-image"], numbers["frames"]) == (75, 2)
    assert "1 of 3 images of toy were not processed" in caplog.text
    evaluator.reset()
    assert evaluator.evaluate() == {"video_miou": {"frames": 0, "oracle-K": 0}}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"sem_seg": 0}, "image 1: the output has neither .*sem_seg"),
        ({"instances": Instances(SIZE)}, "image 1: the output has neither"),
        ({"instances": Instances((4, 4), pred_masks=[])}, r"image 1: .*\(4, 4\), .*\(48, 64\)"),
        ({"instances": instances(HALVES, [0.5, float("nan")])}, "image 1: scores are missing or"),
        (
            {"instances": Instances(SIZE, pred_masks=torch.zeros((1, *SIZE)).bool())},
            "image 1: scores are missing or NaN",
        ),
        (
            {
                "instances": Instances(
                    SIZE, scores=torch.ones(1), pred_masks=torch.zeros((1, 48, 63)).bool()
                )
            },
            r"image 1: pred_masks must be bool .*\(1, 48, 63\)",
        ),
        (
            {
                "instances": Instances(
                    SIZE, scores=torch.ones(1), pred_masks=torch.zeros((1, *SIZE))
                )
            },
            "image 1: pred_masks must be bool .*float32",
        ),
    ],
)
def test_bad_outputs(register, output, message):
    evaluator = VideoMIoUEvaluator(register([record(1, HALVES)]))
    with pytest.raises(ValueError, match=message):
        evaluator.process([{"image_id": 1}], [output])


def test_bad_data_sets(register):
    with pytest.raises(KeyError, match="'no such data set' is not registered"):
        VideoMIoUEvaluator("no such data set")
    with pytest.raises(ValueError, match="empty has no annotated objects"):
        VideoMIoUEvaluator(register([record(1, [])], "empty"))
    with pytest.raises(ValueError, match="twice are not unique"):
        VideoMIoUEvaluator(register([record(1, HALVES), record(1, HALVES)], "twice"))
    boxes = record(1, HALVES)
    del boxes["annotations"][1]["segmentation"]
    with pytest.raises(ValueError, match="1 of 2 objects of boxes have no mask"):
        VideoMIoUEvaluator(register([boxes], "boxes"))
    evaluator = VideoMIoUEvaluator(register([record(1, HALVES)]))
    with pytest.raises(ValueError, match="image 2 is not in toy"):
        evaluator.process([{"image_id": 2}], [both(HALVES)])


@pytest.mark.parametrize(
    ("architecture", "mode", "oracle"),
    [
        ("DeepSpectral", "oracle", 1),
        ("DeepSpectral", "auto", 0),
        ("DeepSpectral", None, 0),
        ("GeneralizedRCNN", "oracle", 0),
    ],
)
def test_from_config(register, architecture, mode, oracle):
    """Also where the config has no such node."""
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.pop("DEEP_SPECTRAL", None)
    if mode is not None:
        cfg.MODEL.DEEP_SPECTRAL = CfgNode({"CLUSTERS": {"MODE": mode}})
    cfg.TEST.EVALUATORS = ("VideoMIoUEvaluator",)
    records = [record(1, HALVES)]
    evaluator = build_evaluator(cfg, register(records))
    assert isinstance(evaluator, VideoMIoUEvaluator)
    assert run(evaluator, records, [both(HALVES)])["oracle-K"] == oracle


def test_beside_average_precision(register):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = ""
    cfg.TEST.EVALUATORS = ("ClassAgnosticCOCOEvaluator", "VideoMIoUEvaluator")
    records = [record(1, HALVES)]
    evaluators = build_evaluator(cfg, register(records, evaluator_type="coco_class_agnostic"))
    for evaluator in evaluators._evaluators:
        if isinstance(evaluator, ClassAgnosticCOCOEvaluator):
            evaluator._output_dir = None
    evaluators.reset()
    evaluators.process(records, [both(HALVES)])
    results = evaluators.evaluate()
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["video_miou"]["mIoU-image"] == 100


def test_one_table_that_says_what_it_is(register, caplog):
    caplog.set_level(logging.INFO)
    records = [record(1, HALVES, video_id=1), record(2, [], video_id=1)]
    name = register(records, annotation_file="gt.json")
    run(VideoMIoUEvaluator(name, oracle_k=True), records, [both(HALVES), both([])])
    tables = [r.getMessage() for r in caplog.records if "|" in r.getMessage()]
    assert len(tables) == 1
    first, header, _, *rows = tables[0].splitlines()
    assert first == (
        "Frame mIoU on toy (gt.json): 2 frames; "
        "the number of clusters is the annotated one (oracle)"
    )
    columns = [cell.strip() for cell in header.split("|")[1:-1]]
    names = ["resolution", "mIoU", "by video", "F", "K", "true K", "frames skipped"]
    assert columns == names
    assert len(rows) == 4
    cells = [cell.strip() for cell in rows[0].split("|")[1:-1]]
    assert cells == ["image", "100.00", "100.00", "100.00", "2.00", "2.00", "1.00"]


def test_synthetic_clips():
    """Drawn clips hold all that the evaluator reads; objects of a clip do not overlap."""
    name = "unseg_synthetic_val_video_frames"
    records = DatasetCatalog.get(name)
    evaluator = VideoMIoUEvaluator(name)
    sample = records[:12:4] + records[12:24:4]
    outputs = []
    for r in sample:
        masks = [mask_util.decode(a["segmentation"]).astype(bool) for a in r["annotations"]]
        size = (r["height"], r["width"])
        grid = patches(np.array(masks).reshape(-1, *size))
        outputs.append({"instances": instances(masks, size=size), "grid_labels": grid})
    numbers = run(evaluator, sample, outputs)
    for flavour in ("image", "patch-center"):
        assert numbers[f"mIoU-{flavour}"] == numbers[f"F-{flavour}"] == 100
        assert numbers[f"mIoU-{flavour}-by-video"] == 100
    assert numbers["K-true-image"] == np.mean([len(r["annotations"]) for r in sample])
    assert numbers["mIoU-patch-corner"] < numbers["mIoU-patch-majority"] < 100


def test_shared_clips(shared_datasets):
    """The real clips, one object each: boxes in its stead score their IoU with it."""
    register_builtin_datasets(shared_datasets)
    try:
        name = "unseg_ytvis_2019_train_frames_cls_agnostic"
        records = DatasetCatalog.get(name)
        evaluator = VideoMIoUEvaluator(name)
    finally:
        register_builtin_datasets()
    outputs, ious, f_scores = [], [], []
    for r in records:
        size = (r["height"], r["width"])
        boxes = []
        for a in r["annotations"]:
            x, y, w, h = map(int, a["bbox"])
            boxes.append(rectangle(y, y + h, x, x + w, size))
            ious.append(a["area"] / (w * h))
            f_scores.append(2 * a["area"] / (w * h + a["area"]))
        found = instances(boxes, size=size)
        found.pred_boxes = Boxes(torch.zeros(len(boxes), 4))
        outputs.append({"instances": found})
    numbers = run(evaluator, records, outputs)
    assert len(ious) == 29
    assert (numbers["frames"], numbers["skipped-image"]) == (30, 1)
    assert numbers["mIoU-image"] == pytest.approx(100 * np.mean(ious))
    assert numbers["F-image"] == pytest.approx(100 * np.mean(f_scores))


def ranked_records():
    """Seven frames of three videos, and predictions of any quality."""
    rng = np.random.default_rng(5)
    records, outputs = [], []
    for n in range(7):
        corners = rng.integers(0, 30, (4, 2))
        masks = [rectangle(y, y + 18, x, x + 24) for y, x in corners.tolist()]
        records.append(record(n, masks[: n % 3 + (n > 3)], video_id=n // 3))
        outputs.append(both(masks[1 : 2 + n % 3]))
    return records, outputs


def evaluate_frames(mine):
    records, outputs = ranked_records()
    DatasetCatalog.register("toy_ranks", lambda: records)
    evaluator = VideoMIoUEvaluator("toy_ranks")
    for n in mine:
        evaluator.process([records[n]], [outputs[n]])
    results = evaluator.evaluate()
    DatasetCatalog.remove("toy_ranks")
    return results


def evaluate_on_rank(rank, folder):
    """One of two processes; the frame in the middle goes to both."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    results = evaluate_frames((range(3, 7), range(4))[rank])
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(results, file)
    torch.distributed.destroy_process_group()


def test_ranks(tmp_path):
    """Two processes give what one gives; only the main one has numbers."""
    expected = evaluate_frames(range(7))
    assert 0 < expected["video_miou"]["mIoU-image"] < 100
    assert expected["video_miou"]["skipped-image"] == 2
    mp.start_processes(evaluate_on_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    assert (tmp_path / "0.json").read_text() == json.dumps(expected)
    assert (tmp_path / "1.json").read_text() == "{}"
