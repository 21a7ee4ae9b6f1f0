"""The command line: train, resume, evaluate; killed and resumed with a real config."""

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import EventStorage
from quick_rcnn import CONFIG, QUICK, ROOT, write_scenes
from toy_training import Recording, read_losses, register_toy_dataset, toy_cfg

from unseg.checkpoint import CheckpointError
from unseg.config import load_config
from unseg.engine import main

TRAIN_NET = ROOT / "projects/FreeSOLO/train_net.py"

pytestmark = pytest.mark.usefixtures("restored_loggers")


@pytest.fixture
def scenes(tmp_path):
    """Overrides that name a few scenes to train on and to test on."""
    names = {"TRAIN": write_scenes(tmp_path, "train", 4), "TEST": write_scenes(tmp_path, "val", 1)}
    yield [x for split, name in names.items() for x in (f"DATASETS.{split}", f"('{name}',)")]
    for name in names.values():
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_train_resume_and_evaluate_from_the_command_line(tmp_path, scenes, monkeypatch):
    output = tmp_path / "out"
    drawn = []
    monkeypatch.setattr(EventStorage, "put_image", lambda s, name, _: drawn.append((s.iter, name)))

    def arguments(max_iter, *flags):
        settings = {
            "OUTPUT_DIR": output,
            "MODEL.DEVICE": "cpu",
            "SOLVER.IMS_PER_BATCH": 2,
            "SOLVER.MAX_ITER": max_iter,
            "VIS_PERIOD": 1,
            **QUICK,
        }
        opts = [str(x) for item in settings.items() for x in item]
        return ["--config-file", str(CONFIG), *flags, *scenes, *opts]

    monkeypatch.setattr(sys, "argv", [str(TRAIN_NET), *arguments(2)])
    runpy.run_path(str(TRAIN_NET), run_name="__main__")
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert torch.load(output / "model_final.pth")["trainer"]["iteration"] == 1
    main(arguments(3, "--resume"))
    assert torch.load(output / "model_final.pth")["trainer"]["iteration"] == 2
    starts = re.findall(r"Starting training from iteration (\d+)", (output / "log.txt").read_text())
    assert starts == ["0", "2"]
    # One picture a step: Detectron2's own, one per sampled mask, are off.
    assert drawn == [(step, "image | masks trained on | prediction") for step in range(3)]

    results = main(arguments(3, "--eval-only", "--resume"))
    recall = results["bbox"]["AR@10"]
    assert recall > 0
    for expected, passes in ((recall, True), (recall + 1, False)):
        opts = ["TEST.EXPECTED_RESULTS", f"[['bbox', 'AR@10', {expected!r}, 0.01]]"]
        evaluation = [*arguments(3, "--eval-only"), "MODEL.WEIGHTS", f"{output}/model_final.pth"]
        if passes:
            assert main(evaluation + opts)["bbox"] == pytest.approx(results["bbox"], nan_ok=True)
        else:
            with pytest.raises(SystemExit, match="1"):
                main(evaluation + opts)


@pytest.fixture
def toy(tmp_path):
    """Command line of the toy model: its config as a file."""
    register_toy_dataset(tmp_path)
    changes = {"SOLVER__EMA__ENABLED": True, "SOLVER__EMA__DECAY": 0.9, "SOLVER__MAX_ITER": 4}
    (tmp_path / "toy.yaml").write_text(toy_cfg(tmp_path / "out", **changes).dump())
    yield ["--config-file", str(tmp_path / "toy.yaml")]
    DatasetCatalog.remove("toy_train")


class Evaluating(Recording):
    """Its evaluation gives back the weights that it is given."""

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return {k: v.clone() for k, v in model.state_dict().items()}


def test_eval_only_takes_the_average_where_there_is_one(tmp_path, toy):
    main(toy, Recording)
    paths = [tmp_path / "out" / name for name in ("model_final.pth", "ema/model_final.pth")]
    plain, average = (torch.load(path)["model"] for path in paths)
    assert not torch.equal(plain["out.weight"], average["out.weight"])

    def evaluate(*flags_and_opts):
        found = main([*toy, "--eval-only", *flags_and_opts], Evaluating)["out.weight"]
        return found, (tmp_path / "out/log.txt").read_text().splitlines()[-1]

    for options in (["--resume"], ["MODEL.WEIGHTS", str(paths[0])]):
        found, said = evaluate(*options)
        assert torch.equal(found, average["out.weight"])
        assert "evaluating the averaged weights" in said
    found, said = evaluate("MODEL.WEIGHTS", str(paths[1]))  # the average as plain weights
    assert torch.equal(found, average["out.weight"])
    assert "holds no average" in said
    found, _ = evaluate("--resume", "SOLVER.EMA.ENABLED", "False")
    assert torch.equal(found, plain["out.weight"])

    content = torch.load(paths[0])
    del content["trainer"]["hooks"]["EMAHook"]["out.bias"]
    torch.save(content, paths[0])
    with pytest.raises(CheckpointError, match=r"the average is not of this model(?s:.*)out\.bias"):
        evaluate("--resume")


def test_settings_that_would_be_ignored_are_refused(toy):
    with pytest.raises(ValueError, match=r"TEST\.AUG\.ENABLED"):
        main([*toy, "--eval-only", "TEST.AUG.ENABLED", "True"])


def test_shipped_configs_draw_pictures():
    assert load_config(str(ROOT / "configs/Base-RCNN-FPN-Agnostic.yaml")).VIS_PERIOD > 0


_SCRIPT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from toy_training import Recording
from unseg.engine import main
main(sys.argv[1:], Recording)
"""


FREESOLO = CONFIG.with_name("freesolo_tiny.yaml")
# All that is random in a step and in the mapper.
ALL_VIEWS = {
    "MODEL.FREESOLO.DATA.STRONG_VIEW": True,
    "MODEL.FREESOLO.DATA.COPY_PASTE": True,
    "MODEL.FREESOLO.DATA.APPEND_WEAK_VIEW": True,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "extra"), [(CONFIG, {}), (FREESOLO, ALL_VIEWS)], ids=["rcnn", "freesolo"]
)
def test_kill_9_and_resume_with_a_real_config_and_workers(tmp_path, scenes, config, extra):
    """Losses and weights equal those of the uninterrupted run, bit by bit.

    Not read from metrics.json: its numbers are medians over a window that a kill empties.
    """

    def start(name):
        settings = {
            "OUTPUT_DIR": tmp_path / name,
            "MODEL.DEVICE": "cpu",
            "DATALOADER.NUM_WORKERS": 2,
            "SOLVER.MAX_ITER": 8,
            "SOLVER.CHECKPOINT_PERIOD": 3,
            "SOLVER.EMA.ENABLED": True,
        } | extra
        opts = [str(x) for item in settings.items() for x in item]
        flags = ["--config-file", str(config), "--resume"]
        command = [sys.executable, "-c", _SCRIPT, str(Path(__file__).parent)]
        log = open(tmp_path / f"{name}.txt", "a")
        return subprocess.Popen([*command, *flags, *scenes, *opts], stdout=log, stderr=log)

    assert start("whole").wait(timeout=600) == 0, (tmp_path / "whole.txt").read_text()[-3000:]
    process = start("killed")
    tag = tmp_path / "killed/last_checkpoint"
    end = time.monotonic() + 300
    while not (tag.exists() and tag.read_text() == "model_0000005.pth"):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed/model_final.pth").exists()
    assert start("killed").wait(timeout=600) == 0, (tmp_path / "killed.txt").read_text()[-3000:]
    assert "Starting training from iteration 6" in (tmp_path / "killed/log.txt").read_text()

    whole, killed = (read_losses(tmp_path / name) for name in ("whole", "killed"))
    assert sorted(whole) == list(range(8))
    assert len(whole[0]) >= 5
    assert killed == whole
    for name in ("model_final.pth", "ema/model_final.pth"):
        expected, found = (
            torch.load(tmp_path / run / name)["model"] for run in ("whole", "killed")
        )
        for key, value in expected.items():
            assert torch.equal(value, found[key]), key
