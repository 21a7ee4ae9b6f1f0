"""Masks of whole folders and data sets: complete, identical for any number of processes."""

import inspect
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import launch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from unseg.checkpoint import CheckpointError
from unseg.config import load_config
from unseg.data import build_mapper
from unseg.data.image import ImageReadError
from unseg.discovery import load_pseudo_masks
from unseg.engine import PseudoMaskJob, images_in_folder, images_of_dataset
from unseg.engine.find_masks import load_weights
from unseg.structures import WindowMasks

CONFIG = "projects/FreeSOLO/configs/free_masks_tiny.yaml"
# large masks count here, and little time is spent
OPTS = ["DISCOVERY.FREE_MASK.MAX_AREA", 1.0, "DISCOVERY.FREE_MASK.SCORE_THRESHOLD", 0.5,
        "DISCOVERY.BATCH_SIZE", 3, "INPUT.MIN_SIZE_TEST", 64]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven images of several sizes and kinds in two folders."""
    root = tmp_path_factory.mktemp("images")
    (root / "sub").mkdir()
    rng = np.random.default_rng(0)
    for i in range(11):
        h, w = [(64, 80), (80, 64), (50, 90)][i % 3]
        image = rng.integers(0, 60, (h, w, 3), dtype=np.uint8)
        image[10:40, 5 + 2 * i : 30 + 2 * i] += np.array([150, 20, 60], dtype=np.uint8)
        name = f"sub/{i}.png" if i % 2 else f"{i}.jpg"
        mode = ["RGB", "L", "RGB", "P"][i % 4] if i % 2 else "RGB"
        Image.fromarray(image).convert(mode).save(root / name)
    (root / "notes.txt").write_text("no image")
    return root


def bytes_of(path):
    """The file and its sidecar by name; nothing else may be left in the folder."""
    return {p.name: p.read_bytes() for p in path.parent.iterdir()}


def run_job(folder, output, num_shards=1, opts=OPTS):
    cfg = load_config(CONFIG, opts)
    model = build_model(cfg)
    job = PseudoMaskJob(cfg, images_in_folder(folder), output)
    job.start(resume=False)
    units = job.work_dir.missing()
    for shard in range(num_shards):
        job.run(model, units[shard::num_shards], name=str(shard))
    return job.collect_if_complete()


def test_every_image_is_listed_with_its_own_masks(folder, tmp_path):
    statistics = run_job(folder, tmp_path / "x.json")
    records = load_pseudo_masks(tmp_path / "x.json")
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.[jp][pn]g"))
    assert [r.file_name for r in records] == names
    assert [r.image_id for r in records] == list(range(1, 12))
    model = build_model(load_config(CONFIG, OPTS)).eval()
    found = 0
    mapper = build_mapper(load_config(CONFIG, OPTS), False)
    for record in records:
        with Image.open(folder / record.file_name) as image:
            assert (record.height, record.width) == image.size[::-1]
        (expected,) = model.discover([mapper({"file_name": str(folder / record.file_name)})])
        assert len(record.masks) == len(expected)
        for a, b in zip(record.masks, expected, strict=True):
            assert (a.decode() != b.decode()).sum() <= 2  # batches round differently
            assert a.score == pytest.approx(b.score, abs=1e-5)
        found += len(expected)
    assert found > 11
    assert statistics.images == 11
    assert statistics.masks == found
    assert not (tmp_path / "x.json.parts").exists()


def test_any_number_of_shards_gives_the_same_bytes(folder, tmp_path):
    for num_shards in (1, 2, 7):
        run_job(folder, tmp_path / f"{num_shards}/x.json", num_shards)
    files = [bytes_of(tmp_path / f"{n}/x.json") for n in (1, 2, 7)]
    assert len(files[0]) == 2
    assert files[0] == files[1] == files[2]


def command(folder, output, *extra):
    opts = [str(o) for o in OPTS]
    return [
        *(sys.executable, "-m", "unseg.tools.pseudo_masks", "--config-file", CONFIG),
        *("--images", str(folder), "--output", str(output), *extra, *opts),
    ]


def test_killed_and_resumed_gives_the_same_bytes(folder, tmp_path):
    run_job(folder, tmp_path / "whole/x.json")
    output = tmp_path / "killed/x.json"
    # the second process to be killed finds what the first one left
    for wanted in (1, 2):
        slow = [*command(folder, output, "--resume")]
        process = subprocess.Popen(slow, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 90
        while _lines(tmp_path / "killed/x.json.parts") < wanted and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command(folder, output, "--resume"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "11 images" in done.stdout
    assert bytes_of(output) == bytes_of(tmp_path / "whole/x.json")
    # There is nothing left to do, and nothing is done.
    before = output.stat().st_mtime_ns
    done = subprocess.run(command(folder, output, "--resume"), capture_output=True, text=True)
    assert "is complete" in done.stdout
    assert output.stat().st_mtime_ns == before
    assert [p.name for p in output.parent.iterdir() if p.name.endswith(".parts")] == []


def _lines(parts):
    return sum(p.read_bytes().count(b"\n") for p in parts.glob("shard-*")) if parts.exists() else 0


def test_independent_shards_and_the_last_one_collects(folder, tmp_path):
    run_job(folder, tmp_path / "whole/x.json")
    output = tmp_path / "shards/x.json"
    for shard in range(2):
        done = subprocess.run(
            command(folder, output, "--num-shards", "2", "--shard", str(shard)),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert output.exists() == (shard == 1)
        assert ("still to be done" in done.stdout) == (shard == 0)
    assert bytes_of(output) == bytes_of(tmp_path / "whole/x.json")


@pytest.mark.skipif(
    "GLOO" not in inspect.getsource(inspect.getmodule(launch)) or torch.cuda.is_available(),
    reason="Detectron2 0.5 launches several processes on GPUs only",
)
def test_several_processes_of_one_launch(folder, tmp_path):
    run_job(folder, tmp_path / "whole/x.json")
    output = tmp_path / "launched/x.json"
    done = subprocess.run(
        command(folder, output, "--num-gpus", "2"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert bytes_of(output) == bytes_of(tmp_path / "whole/x.json")


def _collect(folder, output, ready, results):
    job = PseudoMaskJob(load_config(CONFIG, OPTS), images_in_folder(folder), output)
    ready.set()
    results.put(job.collect_if_complete() is not None)


def test_one_of_two_shards_that_end_together_writes_the_file(folder, tmp_path, monkeypatch):
    """The first to hold the lock looks before the second has written its last line."""
    cfg = load_config(CONFIG, OPTS)
    job = PseudoMaskJob(cfg, images_in_folder(folder), tmp_path / "x.json")
    job.start(resume=False)
    model = build_model(cfg)
    units = job.work_dir.missing()
    job.run(model, units[:-1], name="a")
    context = multiprocessing.get_context("spawn")
    ready, results = context.Event(), context.Queue()
    with job.work_dir.lock():
        arguments = (folder, tmp_path / "x.json", ready, results)
        other = context.Process(target=_collect, args=arguments, daemon=True)
        other.start()
        assert ready.wait(timeout=120)
        assert job.work_dir.missing() == units[-1:]
        job.run(model, units[-1:], name="b")
    other.join()
    assert results.get(timeout=10)
    assert len(load_pseudo_masks(tmp_path / "x.json")) == 11


def test_a_written_file_is_recognised_by_its_settings(folder, tmp_path):
    run_job(folder, tmp_path / "x.json")
    source = images_in_folder(folder)
    assert PseudoMaskJob(load_config(CONFIG, OPTS), source, tmp_path / "x.json").is_written()
    other = load_config(CONFIG, [*OPTS, "DISCOVERY.FREE_MASK.NMS_SIGMA", 3.0])
    assert not PseudoMaskJob(other, source, tmp_path / "x.json").is_written()
    assert not PseudoMaskJob(other, source, tmp_path / "y.json").is_written()
    (tmp_path / "z.json").write_text('{"info": {}, "images": [], "annotations": []}')
    assert not PseudoMaskJob(other, source, tmp_path / "z.json").is_written()


def test_other_settings_cannot_resume(folder, tmp_path):
    cfg = load_config(CONFIG, OPTS)
    PseudoMaskJob(cfg, images_in_folder(folder), tmp_path / "x.json").start(resume=False)
    other = load_config(CONFIG, [*OPTS, "DISCOVERY.FREE_MASK.NMS_SIGMA", 3.0])
    job = PseudoMaskJob(other, images_in_folder(folder), tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"FREE_MASK\.NMS_SIGMA"):
        job.start(resume=True)


class Detector(nn.Module):
    """Any trained model: stock instances, some below the threshold, some empty."""

    def forward(self, inputs):
        outputs = []
        for x in inputs:
            size = (x["height"], x["width"])
            instances = Instances(size)
            instances.pred_masks = torch.zeros((4, *size), dtype=torch.bool)
            instances.pred_masks[0, :5, :5] = True
            instances.pred_masks[1, :9, :5] = True
            instances.pred_masks[3, :2, :2] = True
            instances.scores = torch.tensor([0.6, 0.9, 0.8, 0.2])
            instances.pred_boxes = Boxes(torch.zeros(4, 4))
            outputs.append({"instances": instances})
        return outputs


class WindowDetector(Detector):
    """The same masks as windows, of which only pasted chunks may be in memory."""

    def forward(self, inputs):
        outputs = super().forward(inputs)
        for output in outputs:
            instances = output["instances"]
            boxes = [[0.0, 0, 5, 5], [0, 0, 5, 9], [0, 0, 5, 5], [0, 0, 2, 2]]
            soft = torch.ones(4, 2, 2)
            soft[2] = 0
            size = instances.image_size
            masks = WindowMasks(soft, torch.tensor(boxes), size, align_corners=True)
            assert torch.equal(masks.tensor, instances.pred_masks)
            instances.remove("pred_masks")
            instances.pred_masks = masks
        return outputs


@pytest.mark.parametrize("model", [Detector(), WindowDetector()], ids=["dense", "windows"])
def test_any_models_instances_become_pseudo_masks(folder, tmp_path, model):
    cfg = load_config(CONFIG, [*OPTS, "DISCOVERY.SCORE_THRESHOLD", 0.5])
    job = PseudoMaskJob(cfg, images_in_folder(folder), tmp_path / "x.json")
    job.start(resume=False)
    job.run(model)
    statistics = job.collect_if_complete()
    for record in load_pseudo_masks(tmp_path / "x.json"):
        assert [m.area for m in record.masks] == [45, 25]
        assert [round(m.score, 3) for m in record.masks] == [0.9, 0.6]
    assert statistics.dropped["below DISCOVERY.SCORE_THRESHOLD"] == 11
    assert statistics.dropped["empty or beyond the best"] == 11


def test_wide_masks_are_left_out_and_counted(folder, tmp_path):
    """Masks 5 and 2 pixels wide of 64, 80 and 90: whether 5 is too wide depends on the image."""
    for limit, areas in ((5 / 80, [[45, 25], [4], [4]]), (0.0, [[45, 25, 4]] * 3)):
        output = tmp_path / f"{limit}.json"
        cfg = load_config(CONFIG, [*OPTS, "DISCOVERY.MAX_WIDTH", limit])
        job = PseudoMaskJob(cfg, images_in_folder(folder), output)
        job.start(resume=False)
        job.run(Detector())
        statistics = job.collect_if_complete()
        records = load_pseudo_masks(output)
        by_width = dict(zip((90, 80, 64), areas, strict=True))
        if limit:
            by_width[90] = [45, 25, 4]
        for record in records:
            assert [m.area for m in record.masks] == by_width[record.width]
        wide = 2 * sum(record.width <= 80 for record in records) if limit else 0
        assert statistics.dropped["as wide as DISCOVERY.MAX_WIDTH"] == wide
        assert statistics.dropped["empty or beyond the best"] == 11


def test_bad_images_raise_or_are_left_out(folder, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted(folder.glob("*.jpg"))[:3]:
        (images / path.name).write_bytes(path.read_bytes())
    whole = (images / "0.jpg").read_bytes()
    (images / "broken.jpg").write_bytes(whole[: len(whole) // 2])  # its header is fine
    (images / "empty.jpg").write_bytes(b"")
    with pytest.raises(ImageReadError, match=r"empty\.jpg"):
        images_in_folder(images)
    (images / "empty.jpg").unlink()
    with pytest.raises(ImageReadError, match=r"broken\.jpg"):
        run_job(images, tmp_path / "x.json")
    (images / "empty.jpg").write_bytes(b"")
    cfg = load_config(CONFIG, [*OPTS, "INPUT.ON_BAD_IMAGE", "skip"])
    job = PseudoMaskJob(cfg, images_in_folder(images, skip_bad=True), tmp_path / "y.json")
    job.start(resume=False)
    job.run(build_model(cfg))
    statistics = job.collect_if_complete()
    assert statistics.unreadable_images == 2
    assert "2 images could not be read" in statistics.summary()
    assert len(load_pseudo_masks(tmp_path / "y.json")) == 3


def test_folders_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no image"):
        images_in_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        images_in_folder(tmp_path / "none")


def test_data_sets_keep_their_ids_and_relative_names():
    source = images_of_dataset("unseg_synthetic_val")
    assert source.root == "unseg-synthetic://val"
    assert source.images[3].file_name == "000003.bmp"
    assert len({image.image_id for image in source.images}) == len(source.images) == 200


def test_data_sets_without_a_root_get_the_deepest_common_folder():
    dicts = [
        {"file_name": f"/data/voc/{name}.jpg", "height": 4, "width": 5, "image_id": name}
        for name in ("images/a", "images/b/c")
    ]
    DatasetCatalog.register("rootless", lambda: dicts)
    try:
        source = images_of_dataset("rootless")
    finally:
        DatasetCatalog.remove("rootless")
        MetadataCatalog.remove("rootless")
    assert source.root == "/data/voc/images"
    assert [image.file_name for image in source.images] == ["a.jpg", "b/c.jpg"]


def test_weights_must_be_complete(tmp_path):
    cfg = load_config("projects/FreeSOLO/configs/free_masks_densecl_R_50.yaml", [])
    model = build_model(cfg)
    with pytest.raises(CheckpointError, match="MODEL.WEIGHTS is empty"):
        load_weights(model, "")
    state = model.state_dict()
    torch.save({"model": state}, tmp_path / "all.pth")
    load_weights(model, str(tmp_path / "all.pth"))
    state.pop("backbone.res4.5.conv3.weight")
    torch.save({"model": state}, tmp_path / "one_less.pth")
    with pytest.raises(CheckpointError, match=r"lack 1 weights .* backbone\.res4\.5\.conv3\.we"):
        load_weights(model, str(tmp_path / "one_less.pth"))
    load_weights(build_model(load_config(CONFIG, OPTS)), "")  # it has none


def test_file_describes_its_origin(folder, tmp_path):
    run_job(folder, tmp_path / "x.json")
    info = json.loads((tmp_path / "x.json").read_text())["info"]["unseg"]
    assert info["settings"]["DISCOVERY"]["FREE_MASK"]["SCORE_THRESHOLD"] == 0.5
    assert info["settings"]["MODEL"]["BACKBONE"]["NAME"] == "build_filter_bank_backbone"


def test_random_weights_are_not_taken_for_those_of_a_file(folder, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"not even read")
    output = tmp_path / "x.json"
    done = subprocess.run(
        [*command(folder, output, "--random-weights"), "MODEL.WEIGHTS", str(tmp_path / "w.pth")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(output.read_text())["info"]["unseg"]["weights"] == "random"
