"""python -m unseg.demo: images in, pictures out, nothing lost on the way."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from unseg.config import load_config
from unseg.demo import Predictor, draw_prediction, expand_inputs, output_files, output_names
from unseg.structures import WindowMasks

CONFIG = "projects/FreeSOLO/configs/free_masks_tiny.yaml"


def test_demo(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "unseg.demo", "--config-file", CONFIG),
            *("--input", "unseg-synthetic://val/000002.bmp", "unseg-synthetic://val/000003.bmp"),
            *("--output", tmp_path / "out", "--confidence-threshold", "0.7"),
            *("--opts", "DISCOVERY.FREE_MASK.MAX_MASKS", "5"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "objects drawn" in done.stdout
    names = ["000002.bmp", "000003.bmp"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    for name in names:
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size == (160, 160)


@pytest.fixture(scope="module")
def predictor():
    return Predictor(load_config(CONFIG))


def test_predictor_gives_the_models_answer_for_files_of_any_format(predictor):
    rgb = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    rgb[10:30, 10:40] = (200, 40, 40)
    for_bgr = Predictor(load_config(CONFIG, ["INPUT.FORMAT", "BGR"]))
    instances = for_bgr(rgb)["instances"]
    assert instances.image_size == (50, 70)
    # The memory layouts differ, and with them the last bits.
    scores = predictor(rgb)["instances"].scores
    torch.testing.assert_close(instances.scores, scores, rtol=0, atol=1e-4)
    swapped = for_bgr(np.ascontiguousarray(rgb[:, :, ::-1]))["instances"].scores
    assert swapped.shape != scores.shape or (swapped - scores).abs().max() > 1e-3
    assert draw_prediction(rgb, instances, 0.0).shape == rgb.shape
    np.testing.assert_array_equal(draw_prediction(rgb, instances, 2.0), rgb)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1)])
def test_very_thin_images(predictor, size):
    instances = predictor(np.full((*size, 3), 90, dtype=np.uint8))["instances"]
    assert instances.image_size == size


def test_boxes_of_models_without_masks():
    rgb = np.full((40, 60, 3), 100, dtype=np.uint8)
    instances = Instances((40, 60))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 5, 50, 35], [20.0, 10, 30, 20]]))
    instances.scores = torch.tensor([0.9, 0.2])
    changed = (draw_prediction(rgb, instances, 0.5) != rgb).any(2)
    assert changed[34:36, 15:45].any(0).all()
    assert changed[20:30, 49:51].any(1).all()
    assert not changed[12:18, 29:31].any()  # the other box
    np.testing.assert_array_equal(draw_prediction(rgb, instances, 2.0), rgb)


def test_masks_of_windows_are_drawn_like_others():
    rgb = np.full((40, 60, 3), 100, dtype=np.uint8)
    boxes = torch.tensor([[10.0, 5, 50, 35], [20.0, 10, 30, 20]])
    masks = WindowMasks(torch.ones(2, 3, 3), boxes, (40, 60))
    pictures = []
    for form in (masks, masks.tensor):
        instances = Instances((40, 60), pred_masks=form, scores=torch.tensor([0.9, 0.8]))
        pictures.append(draw_prediction(rgb, instances, 0.5))
    np.testing.assert_array_equal(*pictures)
    assert (pictures[0] != rgb).any(2)[8:30, 15:45].all()


def test_expand_inputs(tmp_path):
    for name in ("a.jpg", "b.png", "c.txt", "x[1].jpg"):
        (tmp_path / name).touch()
    all_images = [str(tmp_path / name) for name in ("a.jpg", "b.png", "x[1].jpg")]
    assert expand_inputs([str(tmp_path)]) == all_images
    assert expand_inputs([str(tmp_path / "*.png")]) == all_images[1:2]
    assert expand_inputs([all_images[2]]) == all_images[2:]
    assert expand_inputs([all_images[1], str(tmp_path), all_images[0]]) == [
        all_images[i] for i in (1, 0, 2)
    ]
    with pytest.raises(FileNotFoundError, match="nothing"):
        expand_inputs([str(tmp_path / "nothing*")])


def test_pictures_have_names_of_their_own(tmp_path):
    files = [
        "a/1.jpg",
        "b/1.jpg",
        "1.png",
        "c/1.jpg",
        "1_2.jpg",
        "unseg-synthetic://val/2.bmp",
        "x",
    ]
    names = ["1.jpg", "1_2.jpg", "1.png", "1_3.jpg", "1_2_2.jpg", "2.bmp", "x.png"]
    assert output_names(files) == names
    folder = tmp_path / "new/out"
    assert output_files(files, str(folder)) == [folder / name for name in names]
    assert folder.is_dir()
    assert output_files(["a/1.jpg"], str(tmp_path / "y/one.png")) == [tmp_path / "y/one.png"]
    assert (tmp_path / "y").is_dir()
    # Names are kept, so the folder of the images itself will not do.
    (tmp_path / "1.jpg").touch()
    with pytest.raises(ValueError, match="it would be overwritten"):
        output_files([str(tmp_path / "1.jpg")], str(tmp_path))
