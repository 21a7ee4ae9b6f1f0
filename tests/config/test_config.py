"""Config keys: added once, never to Detectron2's defaults, read from YAML and overrides."""

import pytest
from detectron2.config import get_cfg as detectron2_cfg

import unseg
from unseg.config import add_unseg_config, get_cfg, load_config


def test_adding_twice_changes_nothing():
    cfg = detectron2_cfg()
    add_unseg_config(cfg)
    cfg.DISCOVERY.BATCH_SIZE = 3
    add_unseg_config(cfg)
    assert cfg.DISCOVERY.BATCH_SIZE == 3
    assert unseg.add_unseg_config is add_unseg_config


def test_detectron2s_defaults_stay_as_they_are():
    before = detectron2_cfg().dump()
    get_cfg().DISCOVERY.NAME = "x"
    assert detectron2_cfg().dump() == before
    assert "DISCOVERY" not in detectron2_cfg()


def test_file_and_overrides(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("VERSION: 2\nDISCOVERY:\n  NAME: Other\n  BATCH_SIZE: 2\n")
    cfg = load_config(str(path), ["DISCOVERY.BATCH_SIZE", "5", "MODEL.DEVICE", "cpu"])
    assert (cfg.DISCOVERY.NAME, cfg.DISCOVERY.BATCH_SIZE) == ("Other", 5)
    assert cfg.is_frozen()


def test_unknown_keys_are_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("VERSION: 2\nDISCOVERY:\n  NAMES: Other\n")
    with pytest.raises(KeyError, match=r"DISCOVERY\.NAMES"):
        load_config(str(path))
    with pytest.raises((KeyError, AssertionError), match="NOTHING"):
        load_config("", ["DISCOVERY.NOTHING", "1"])


def test_without_a_gpu_the_cpu_is_used(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert load_config("", []).MODEL.DEVICE == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert load_config("", []).MODEL.DEVICE == "cuda"
