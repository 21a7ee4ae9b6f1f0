"""python -m unseg.tools.embed_dataset, as users run it."""

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog

from unseg.data import open_embeddings
from unseg.discovery import write_pseudo_masks
from unseg.structures import ImageRecord, PseudoMask
from unseg.tools import embed_dataset

BASE = "projects/FreeSOLO/configs/pseudo_mask_rcnn_tiny.yaml"
CHANGES = {
    "MODEL": {
        "DEVICE": "cpu",
        "FPN": {"OUT_CHANNELS": 32},
        "RPN": {"POST_NMS_TOPK_TEST": 10},
        "ROI_HEADS": {"NAME": "HierarchicalEmbeddingROIHeads", "SCORE_THRESH_TEST": 0.0},
        "ROI_BOX_HEAD": {"FC_DIM": 16},
        "ROI_MASK_HEAD": {"CONV_DIM": 8},
        "HIERARCHICAL_EMBEDDING": {"EMBED_DIM": 3, "CONV_DIM": 8, "FC_DIM": 8, "INIT_STD": 0.5},
    },
    "INPUT": {"MIN_SIZE_TEST": 64},
    "DISCOVERY": {"BATCH_SIZE": 2},
}
IMAGES = 5


@pytest.fixture
def config(tmp_path):
    base = Path(__file__).resolve().parents[2] / BASE
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"_BASE_": str(base)} | CHANGES))
    return tmp_path / "x.yaml"


@pytest.fixture
def dataset(tmp_path):
    """The first synthetic scenes, with their masks."""
    dicts = DatasetCatalog.get("unseg_synthetic_val")[:IMAGES]
    records = [
        ImageRecord(f"{i:06d}.bmp", d["height"], d["width"], i + 1,
                    [PseudoMask(a["segmentation"], 0.5) for a in d["annotations"]])
        for i, d in enumerate(dicts)
    ]  # fmt: skip
    write_pseudo_masks(tmp_path / "scenes.json", records)
    name = f"{tmp_path}/scenes.json@unseg-synthetic://val"
    yield name
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def run_here(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["embed_dataset", *map(str, words)])
    embed_dataset.main()


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("restored_loggers")
def test_found_objects_and_annotations(config, dataset, tmp_path, monkeypatch, capsys):
    words = ["--config-file", config, "--dataset", dataset, "--random-weights", "--output"]
    run_here(monkeypatch, *words, tmp_path / "whole")
    whole = open_embeddings(tmp_path / "whole")
    assert set(whole.image_ids) <= set(range(1, IMAGES + 1))
    assert whole.tangents.shape == (len(whole), 3)
    assert len(whole) > IMAGES
    assert set(whole.classes) == {-1}
    assert whole.info["dataset"] == dataset
    out = capsys.readouterr().out
    assert f"wrote {tmp_path}/whole: {len(whole)} objects of {IMAGES} images" in out
    for shard in range(2):
        flags = ["--num-shards", 2, "--shard", shard]
        run_here(monkeypatch, *words, tmp_path / "shards", *flags)
        assert (tmp_path / "shards").exists() == (shard == 1)
    assert bytes_of(tmp_path / "shards") == bytes_of(tmp_path / "whole")
    capsys.readouterr()
    run_here(monkeypatch, *words, tmp_path / "whole", "--resume")
    assert "is complete" in capsys.readouterr().out

    run_here(monkeypatch, *words, tmp_path / "truth", "--ground-truth")
    truth = open_embeddings(tmp_path / "truth")
    scenes = DatasetCatalog.get("unseg_synthetic_val")[:IMAGES]
    numbers = [len(d["annotations"]) for d in scenes]
    assert truth.image_ids.tolist() == np.repeat(np.arange(1, IMAGES + 1), numbers).tolist()
    assert set(truth.classes) == {0}
    assert truth.info["ground_truth"] is True
    assert np.isfinite(truth.tangents).all()
    assert truth.tangents.std() > 0


def test_annotations_need_a_data_set(config, tmp_path, monkeypatch, capsys):
    words = ["--config-file", config, "--images", tmp_path, "--output", tmp_path / "x"]
    with pytest.raises(SystemExit) as caught:
        run_here(monkeypatch, *words, "--ground-truth")
    assert caught.value.code == 2
    assert "--ground-truth needs a --dataset" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
