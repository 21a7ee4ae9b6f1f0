"""The command-line tools, as users run them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from detectron2.data import DatasetCatalog
from PIL import Image
from pycocotools import mask as mask_util

from unseg.config import load_config
from unseg.demo import Predictor, draw_prediction, expand_inputs
from unseg.discovery import write_pseudo_masks
from unseg.structures import ImageRecord, PseudoMask
from unseg.tools.evaluate_masks import evaluate_file, match_images

CONFIG = "projects/FreeSOLO/configs/free_masks_tiny.yaml"


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
    for word in ("unseg", "torch", "Detectron2", "mask ops", "pycocotools"):
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


def test_demo(tmp_path):
    out = run(
        "unseg.demo",
        "--config-file",
        CONFIG,
        "--input",
        "unseg-synthetic://val/000002.bmp",
        "unseg-synthetic://val/000003.bmp",
        "--output",
        tmp_path / "out",
        "--confidence-threshold",
        0.7,
        "--opts",
        "DISCOVERY.FREE_MASK.MAX_MASKS",
        5,
    )
    assert "masks drawn" in out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000002.png", "000003.png"]


def test_predictor_gives_the_models_answer_for_files_of_any_format(tmp_path):
    cfg = load_config(CONFIG, ["INPUT.FORMAT", "BGR"])
    rgb = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    rgb[10:30, 10:40] = (200, 40, 40)
    instances = Predictor(cfg)(rgb)["instances"]
    same = Predictor(load_config(CONFIG))(rgb)["instances"]
    assert instances.image_size == (50, 70)
    assert torch.equal(instances.scores, same.scores)
    assert draw_prediction(rgb, instances, 0.0).shape == rgb.shape
    np.testing.assert_array_equal(draw_prediction(rgb, instances, 2.0), rgb)


def test_expand_inputs(tmp_path):
    for name in ("a.jpg", "b.png", "c.txt"):
        (tmp_path / name).touch()
    assert expand_inputs([str(tmp_path)]) == [str(tmp_path / "a.jpg"), str(tmp_path / "b.png")]
    assert expand_inputs([str(tmp_path / "*.png")]) == [str(tmp_path / "b.png")]
    with pytest.raises(FileNotFoundError, match="nothing"):
        expand_inputs([str(tmp_path / "nothing*")])
