"""python -m unseg.tools.export_proposals, as users run it."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from unseg.discovery import write_pseudo_masks
from unseg.structures import ImageRecord
from unseg.tools import export_proposals

CONFIG = "projects/FreeSOLO/configs/free_masks_tiny.yaml"
OPTS = ["DISCOVERY.BATCH_SIZE", "2", "INPUT.MIN_SIZE_TEST", "64",
        "DISCOVERY.FREE_MASK.SCORE_THRESHOLD", "0.3"]  # fmt: skip
IMAGES = 9


@pytest.fixture
def dataset(tmp_path):
    """The first synthetic scenes, without annotations."""
    records = [ImageRecord(f"{i:06d}.bmp", 160, 160, i + 1) for i in range(IMAGES)]
    write_pseudo_masks(tmp_path / "scenes.json", records)
    name = f"{tmp_path}/scenes.json@unseg-synthetic://val"
    yield name
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def words(dataset, output, *flags):
    return ["--config-file", CONFIG, "--dataset", dataset, "--output", str(output), *flags, *OPTS]


def run_here(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export_proposals", *arguments])
    export_proposals.main()


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lines_in(parts):
    return sum(p.read_bytes().count(b"\n") for p in parts.glob("shard-*")) if parts.exists() else 0


@pytest.mark.usefixtures("restored_loggers")
def test_whole_sharded_or_killed_the_bytes_are_the_same(dataset, tmp_path, monkeypatch, capsys):
    run_here(monkeypatch, *words(dataset, tmp_path / "whole"))
    whole = bytes_of(tmp_path / "whole")
    assert whole.keys() == {"box_proposals.pkl", "manifest.json", "mask_proposals-00000.json"}
    results = json.loads(whole["mask_proposals-00000.json"])
    boxes = pickle.loads(whole["box_proposals.pkl"])
    assert boxes["ids"] == list(range(1, IMAGES + 1))
    assert len(results) == sum(map(len, boxes["boxes"])) > IMAGES
    assert (
        f"{len(results)} proposals of {IMAGES} images, 1 files of masks" in capsys.readouterr()[0]
    )

    for shard in range(2):
        flags = ["--num-shards", "2", "--shard", str(shard)]
        run_here(monkeypatch, *words(dataset, tmp_path / "shards", *flags))
        assert (tmp_path / "shards").exists() == (shard == 1)
    assert bytes_of(tmp_path / "shards") == whole

    command = [sys.executable, "-m", "unseg.tools.export_proposals"]
    process = subprocess.Popen(
        [*command, *words(dataset, tmp_path / "killed", "--resume")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while lines_in(tmp_path / "killed.parts") < 1 and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    run_here(monkeypatch, *words(dataset, tmp_path / "killed", "--resume"))
    assert bytes_of(tmp_path / "killed") == whole
    # There is nothing left to do, and nothing is done.
    capsys.readouterr()
    before = (tmp_path / "killed/box_proposals.pkl").stat().st_mtime_ns
    run_here(monkeypatch, *words(dataset, tmp_path / "killed", "--resume"))
    assert "is complete" in capsys.readouterr().out
    assert (tmp_path / "killed/box_proposals.pkl").stat().st_mtime_ns == before


def test_wrong_flags(dataset, tmp_path, monkeypatch, capsys):
    for flags, message in (
        (["--num-shards", "2", "--shard", "2"], "--shard must be below"),
        (["--num-shards", "2", "--num-gpus", "2"], "--shard must be below"),
    ):
        with pytest.raises(SystemExit) as caught:
            run_here(monkeypatch, *words(dataset, tmp_path / "x", *flags))
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    # Proposals are of a data set: a folder has no image ids.
    with pytest.raises(SystemExit) as caught:
        run_here(monkeypatch, "--config-file", CONFIG, "--output", "y", "--images", "x")
    assert "--dataset is required" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
