"""The command-line tools, as users run them."""

import copy
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from unseg.discovery import write_pseudo_masks
from unseg.structures import ImageRecord, PseudoMask
from unseg.tools import evaluate_masks
from unseg.tools.evaluate_masks import evaluate_file, match_images
from unseg.tools.visualize import choose_records, draw_record


def run(module, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def scenes():
    return DatasetCatalog.get("unseg_synthetic_val")


def ground_truth_records(scenes, rename=lambda name: name):
    return [
        ImageRecord(
            rename(d["file_name"].removeprefix("unseg-synthetic://val/")),
            d["height"],
            d["width"],
            d["image_id"],
            [PseudoMask(a["segmentation"], 0.5) for a in d["annotations"]],
        )
        for d in scenes
    ]


def test_collect_env():
    out = run("unseg.tools.collect_env")
    for word in ("unseg", "torch", "Detectron2", "compiled ops", "pycocotools"):
        assert word in out
    assert torch.__version__ in out


def test_evaluate_masks_on_the_ground_truth(tmp_path, scenes):
    write_pseudo_masks(tmp_path / "x.json", ground_truth_records(scenes))
    out = run("unseg.tools.evaluate_masks", tmp_path / "x.json", "--dataset", "unseg_synthetic_val",
              "--max-dets", 5, 100, "--output", tmp_path / "m.json")  # fmt: skip
    assert "200 images" in out
    numbers = json.loads((tmp_path / "m.json").read_text())
    for task in ("bbox", "segm"):
        assert numbers[task]["AP"] == pytest.approx(100)
        assert numbers[task]["AR@100"] == pytest.approx(100)
        assert numbers[task]["AR@5"] < 100


def test_images_missing_from_the_file_count_as_missed(tmp_path, scenes):
    records = ground_truth_records(scenes)
    write_pseudo_masks(tmp_path / "x.json", records[:100])
    numbers = evaluate_file(str(tmp_path / "x.json"), "unseg_synthetic_val")
    objects = [len(r.masks) for r in records]
    assert numbers["segm"]["AR@100"] == pytest.approx(100 * sum(objects[:100]) / sum(objects))


def record(name, image_id=1, size=(4, 6)):
    return ImageRecord(name, *size, image_id)


def image(name, image_id=1, size=(4, 6)):
    return {"file_name": name, "id": image_id, "height": size[0], "width": size[1]}


def test_matching_of_images():
    images = [image("/data/a/1.jpg", 10), image("/data/b/1.jpg", 11), image("/data/b/2.jpg", 12)]
    matched = match_images([record("b/1.jpg", 99), record("2.jpg", 98), record("x.jpg")], images)
    assert {k: r.image_id for k, r in matched.items()} == {11: 99, 12: 98}
    # the name alone is ambiguous, the id decides
    assert set(match_images([record("1.jpg", 11)], images)) == {11}
    # a record with the longer path
    assert set(match_images([record("root/data/b/2.jpg")], [image("b/2.jpg", 12)])) == {12}
    with pytest.raises(ValueError, match="none of the 1 images"):
        match_images([record("other.jpg")], images)
    with pytest.raises(ValueError, match=r"2\.jpg is \(5, 6\)"):
        match_images([record("2.jpg", size=(5, 6))], images)
    with pytest.raises(ValueError, match=r"^2\.jpg and b/2\.jpg .* both taken for /data/b/2\.jpg"):
        match_images([record("2.jpg"), record("b/2.jpg", 2)], images)


def small_file(path, scenes, count=3):
    """A pseudo-mask file with the true masks of some scenes, and the scenes' dataset dicts."""
    write_pseudo_masks(path, ground_truth_records(scenes[:count]))
    return copy.deepcopy(scenes[:count])


def test_masks_of_some_objects_are_not_evaluated(tmp_path, scenes, register, caplog):
    dicts = small_file(tmp_path / "x.json", scenes)
    del dicts[1]["annotations"][0]["segmentation"]
    objects = sum(len(d["annotations"]) for d in dicts)
    numbers = evaluate_file(str(tmp_path / "x.json"), register(dicts))
    assert list(numbers) == ["bbox"]
    assert numbers["bbox"]["AP"] == pytest.approx(100)
    assert f"masks are not evaluated: 1 of {objects} objects of toy" in caplog.text


def test_masks_against_a_file_that_is_not_registered(tmp_path, scenes):
    small_file(tmp_path / "x.json", scenes)
    for name in (f"{tmp_path}/x.json@unseg-synthetic://val", f"{tmp_path}/x.json@anywhere"):
        numbers = evaluate_file(str(tmp_path / "x.json"), name)
        assert numbers["segm"]["AP"] == pytest.approx(100)


def test_masks_against_images_without_annotations(tmp_path, scenes, register):
    dicts = small_file(tmp_path / "x.json", scenes)
    name = register([d | {"annotations": []} for d in dicts])
    with pytest.raises(ValueError, match="'toy'.* has no annotations"):
        evaluate_file(str(tmp_path / "x.json"), name)


def test_numbers_that_are_not_there_are_null(tmp_path, scenes, register, monkeypatch):
    """Files with a bare NaN are not JSON: other programs refuse them."""
    dicts = small_file(tmp_path / "x.json", scenes, 1)
    for annotation in dicts[0]["annotations"]:
        annotation["area"] = 10_000_000  # no small objects
    arguments = ["", tmp_path / "x.json", "--dataset", register(dicts), "--output"]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments), str(tmp_path / "m.json")])
    loggers = [logging.getLogger(name) for name in ("unseg", None)]
    before = [(log, log.level, log.propagate, log.handlers[:]) for log in loggers]
    evaluate_masks.main()
    for log, level, propagate, handlers in before:
        log.level, log.propagate, log.handlers[:] = level, propagate, handlers

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    numbers = json.loads((tmp_path / "m.json").read_text(), parse_constant=refuse)
    assert numbers["segm"]["APs"] is None
    assert numbers["segm"]["AP"] == pytest.approx(100)


def test_convert_weights(tmp_path):
    model = torchvision.models.resnet18(weights=None)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "in.pth")
    run("unseg.tools.convert_weights", "densecl", tmp_path / "in.pth", tmp_path / "out.pth")
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    torch.testing.assert_close(content["model"]["stem.conv1.weight"], model.conv1.weight.data)


def test_visualize(tmp_path, scenes):
    records = ground_truth_records(scenes[:6])
    write_pseudo_masks(tmp_path / "x.json", records)
    run("unseg.tools.visualize", f"{tmp_path}/x.json@unseg-synthetic://val", "--output",
        tmp_path / "out", "--count", 3)  # fmt: skip
    pictures = sorted((tmp_path / "out").iterdir())
    assert [p.name for p in pictures] == [f"{i:06d}_{i:06d}.png" for i in (0, 2, 5)]
    with Image.open(pictures[1]) as picture:
        pixels = np.asarray(picture).astype(int)
    plain, drawn = pixels[:, :160], pixels[:, -160:]
    changed = (plain != drawn).any(2)
    masks = mask_util.decode([m.rle for m in records[2].masks]).any(2)
    assert changed[masks].mean() > 0.9  # the fill
    assert changed[~masks].mean() < 0.1  # outlines reach a little over


def test_boxes_are_drawn_where_there_are_no_masks():
    dicts = DatasetCatalog.get("unseg_synthetic_val")[:1]
    annotation = dicts[0]["annotations"][0]
    del annotation["segmentation"]
    annotation |= {"bbox": [40, 60, 50, 30], "bbox_mode": BoxMode.XYWH_ABS}
    dicts[0]["annotations"] = [annotation]
    picture = draw_record(dicts[0], 0.0).astype(int)
    changed = (picture[:, :160] != picture[:, -160:]).any(2)
    assert changed[60, 45:85].all()  # the upper side
    assert changed[65:85, 90].all()  # the right one
    assert not changed[70:80, 55:75].any()
    dicts[0]["annotations"] = [annotation | {"score": 0.3}]
    picture = draw_record(dicts[0], 0.4)
    np.testing.assert_array_equal(picture[:, :160], picture[:, -160:])


def test_data_sets_that_cannot_be_drawn(register):
    with pytest.raises(ValueError, match="'toy' has no images"):
        choose_records(register([]), 3)
    with pytest.raises(ValueError, match="'unseg_synthetic_val_video' is not one of single images"):
        choose_records("unseg_synthetic_val_video", 3)
    assert len(choose_records("unseg_synthetic_val_video_frames", 3)) == 3


def test_real_photographs_to_measured_masks(tmp_path, shared_datasets):
    """Four COCO images through discovery and evaluation, as users would run them.

    The four with the largest objects that discovery may find (it takes half of an image for
    background): hand-made features find some of them, and few of the small ones.
    """
    content = json.loads((shared_datasets / "coco/annotations/instances_val2017.json").read_text())
    pixels = {image["id"]: image["height"] * image["width"] for image in content["images"]}
    largest = dict.fromkeys(pixels, 0.0)
    for a in content["annotations"]:
        share = a["area"] / pixels[a["image_id"]]
        if not a["iscrowd"] and share < 0.4:
            largest[a["image_id"]] = max(largest[a["image_id"]], share)
    ids = sorted(largest, key=largest.get)[-4:]
    content["images"] = [image for image in content["images"] if image["id"] in ids]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    (tmp_path / "images").mkdir()
    for one in content["images"]:
        target = tmp_path / "images" / one["file_name"]
        target.symlink_to(shared_datasets / "coco/val2017" / one["file_name"])
    (tmp_path / "truth.json").write_text(json.dumps(content))
    config = "projects/FreeSOLO/configs/free_masks_filter_bank.yaml"
    run("unseg.tools.pseudo_masks", "--config-file", config, "--images", tmp_path / "images",
        "--output", tmp_path / "x.json", "INPUT.MIN_SIZE_TEST", 160)  # fmt: skip
    numbers = evaluate_file(str(tmp_path / "x.json"), f"{tmp_path}/truth.json@{tmp_path}/images")
    for task in ("bbox", "segm"):
        assert 0 < numbers[task]["AR@100"] < 50
        assert 0 < numbers[task]["AP50"] < 50
