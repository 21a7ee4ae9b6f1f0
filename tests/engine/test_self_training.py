"""Self-training: its stages and what each is given, kills and resumption, refusals, processes."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from processes import is_alive, wait_until
from quick_rcnn import ROOT, write_scenes

from unseg.config import load_config
from unseg.discovery import load_pseudo_masks, write_pseudo_masks
from unseg.discovery.statistics import MaskStatistics
from unseg.engine import (
    PseudoMaskJob,
    SelfTrainingError,
    Trainer,
    rounds,
    self_train,
)
from unseg.structures import ImageRecord
from unseg.tools import self_train as tool

pytestmark = pytest.mark.usefixtures("restored_loggers")


def in_process(stage):
    stage.work()


def discovery(tmp_path):
    return {
        "discovery_config": str(tmp_path / "free.yaml"),
        "images": str(tmp_path / "photographs"),
    }


def products(folder):
    """Masks, their embeddings and all results, by name."""
    names = ("masks*.json", "*.npy", "**/results.json")
    paths = sorted(path for name in names for path in folder.glob(name))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


class KilledError(BaseException):
    pass


def _die(*args, **kwargs):
    raise KilledError


@contextlib.contextmanager
def killed_midway():
    """After a batch of labelling and after a step of training that starts from the beginning; a
    training that is resumed dies when it would write its results."""

    def label(self, model, units, *, name):
        label_all(self, model, units[:1], name=name)
        raise KilledError

    def step(self):
        if self.iter == 1 and self.start_iter == 0:
            raise KilledError
        one_step(self)

    label_all, one_step = PseudoMaskJob.run, Trainer.run_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PseudoMaskJob, "run", label)
        patch.setattr(Trainer, "run_step", step)
        patch.setattr(rounds, "atomic_write", _die)
        yield


def test_killed_at_every_stage_and_resumed(tmp_path, options, photographs):
    """A whole run from discovery, and the same one killed wherever it can be."""
    changes = {"SOLVER.EMA.ENABLED": True, "SOLVER.EMA.DECAY": 0.5}
    whole = self_train(options("whole", changes, **discovery(tmp_path)), run_stage=in_process)
    assert [r["masks"] for r in whole["rounds"]] == ["masks0.json", "masks1.json"]
    assert all(r["mask_statistics"]["masks"] > 0 for r in whole["rounds"])
    (name,) = whole["rounds"][0]["metrics"]
    assert set(whole["rounds"][1]["metrics"][name]) == {"bbox", "segm"}
    assert json.loads((tmp_path / "whole/results.json").read_text()) == whole

    kills = {}

    def kill(stage):
        if kills.setdefault(stage.title, 0) < (2 if "training" in stage.title else 1):
            kills[stage.title] += 1
            with killed_midway():
                stage.work()
            pytest.fail(f"{stage.title} was not killed")
        stage.work()

    for _ in range(6):
        with pytest.raises(KilledError):
            self_train(
                options("killed", changes, **discovery(tmp_path)), resume=True, run_stage=kill
            )
    resumed = self_train(
        options("killed", changes, **discovery(tmp_path)), resume=True, run_stage=kill
    )
    assert list(kills.values()) == [1, 2, 1, 2]
    assert resumed == whole
    assert len(products(tmp_path / "whole")) >= 5
    assert products(tmp_path / "killed") == products(tmp_path / "whole")
    starts = (tmp_path / "killed/round2/log.txt").read_text().count("Starting training from")
    assert starts == 3

    # Nothing is left to do, and nothing is done.
    again = self_train(
        options("killed", changes, **discovery(tmp_path)), resume=True, run_stage=_die
    )
    assert again == whole


def test_from_a_file_of_masks_that_names_its_images(tmp_path, options):
    """Round 2 learns round 1's masks on the same images, filtered as SELF_TRAINING says."""
    masks = write_scenes(tmp_path, "train", 3)
    results = self_train(options("out", masks=masks), run_stage=in_process)
    assert not (tmp_path / "out/masks0.json").exists()
    assert [r["masks"] for r in results["rounds"]] == ["train.json", "masks1.json"]
    assert results["rounds"][0]["mask_statistics"] is None  # a file that does not say
    names = [
        yaml.safe_load((tmp_path / f"out/round{n}/config.yaml").read_text())["DATASETS"]["TRAIN"]
        for n in (1, 2)
    ]
    assert names == [[masks], [f"{tmp_path}/out/masks1.json@unseg-synthetic://train"]]
    records = load_pseudo_masks(tmp_path / "out/masks1.json")
    given = load_pseudo_masks(tmp_path / "train.json")
    assert [r.file_name for r in records] == [r.file_name for r in given]
    found = [m for r in records for m in r.masks]
    assert 0 < len(found) <= 15
    assert all(m.score >= 0.01 and m.box[2] < 0.95 * 160 for m in found)


class Recorder:
    """Does no stage, leaves what it would, and remembers what it was given."""

    def __init__(self):
        self.given = {}

    def __call__(self, stage):
        (args,) = (a for a in stage.work.args if isinstance(a, Namespace))
        cfg = load_config(args.config_file, args.opts)
        self.given[stage.title.split()[0]] = (cfg, args)
        if "training" in stage.title:
            stage.traces[0].mkdir()
            metrics = {name: {"segm": {"AP": 1.0, "AP50": None}} for name in cfg.DATASETS.TEST}
            (stage.traces[0] / "results.json").write_text(json.dumps(metrics))
            return
        info = {"settings": json.loads(json.dumps(stage.is_finished.args[1]))}
        write_pseudo_masks(stage.traces[0], [], info=info, statistics=MaskStatistics(masks=3))


def given_to(options):
    recorder = Recorder()
    results = self_train(options, run_stage=recorder)
    return recorder.given, results


def test_what_the_stages_are_given(tmp_path, options):
    changes = {
        "SELF_TRAINING.ROUNDS": 3,
        "SELF_TRAINING.SCORE_THRESHOLD": 0.25,
        "MODEL.WEIGHTS": "first.pth",
        "MODEL.FREESOLO.DATA.BOXES": "xyxy_as_xywh",
    }
    sources = {"discovery_config": str(ROOT / "projects/FreeSOLO/configs/free_masks_tiny.yaml")}
    sources |= {"discovery_weights": "free.pth", "dataset": "a.json@unseg_synthetic_val"}
    out = tmp_path / "a"
    given, results = given_to(options("a", changes, **sources))
    assert list(given) == ["masks0", "round1", "masks1", "round2", "masks2", "round3"]
    assert [r["round"] for r in results["rounds"]] == [1, 2, 3]

    cfg, args = given["masks0"]
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.WEIGHTS) == ("MaskDiscovery", "free.pth")
    assert cfg.DISCOVERY.MAX_MASKS_PER_IMAGE == 100  # its own settings
    assert args.dataset == "a.json@unseg_synthetic_val"
    for number in (1, 2):
        cfg, args = given[f"masks{number}"]
        assert f"{out}/round{number}/model_final.pth" == cfg.MODEL.WEIGHTS
        d = cfg.DISCOVERY
        assert (d.SCORE_THRESHOLD, d.MAX_MASKS_PER_IMAGE, d.MAX_WIDTH) == (0.25, 5, 0.95)
        assert args.dataset == "a.json@unseg_synthetic_val"
    for number in (1, 2, 3):
        cfg, args = given[f"round{number}"]
        (name,) = cfg.DATASETS.TRAIN
        boxes = "xyxy_as_xywh" if number == 1 else "masks"
        assert name == f"{out}/masks{number - 1}.json@unseg_synthetic_val"
        assert cfg.MODEL.WEIGHTS == "first.pth"
        assert boxes == cfg.MODEL.FREESOLO.DATA.BOXES
        assert Path(cfg.OUTPUT_DIR) == out / f"round{number}"
        assert args.resume

    changes |= {"SELF_TRAINING.FROM_PREVIOUS": True, "SOLVER.EMA.ENABLED": True}
    given, _ = given_to(options("b", changes, **sources))
    average = f"{tmp_path}/b/round1/ema/model_final.pth"
    weights = [given[stage][0].MODEL.WEIGHTS for stage in ("round1", "masks1", "round2")]
    assert weights == ["first.pth", average, average]


def test_table(tmp_path, options):
    recorder = Recorder()
    masks = write_scenes(tmp_path, "train", 1)
    sets = ("unseg_synthetic_val", "unseg_synthetic_train")
    results = self_train(options("out", {"DATASETS.TEST": sets}, masks=masks), run_stage=recorder)
    first, second = rounds.make_table(results).split("unseg_synthetic_train")
    assert first.startswith("unseg_synthetic_val\n")
    for table in (first, second):
        lines = [[c.strip() for c in line.split("|")] for line in table.strip().splitlines()]
        assert ["", "round", "masks learned from", "segm AP", "segm AP50", ""] in lines
        assert ["", "1", "-", "1.00", "-", ""] in lines
        assert ["", "2", "3", "1.00", "-", ""] in lines


def test_folders_that_are_refused(tmp_path, options):
    masks = write_scenes(tmp_path, "train", 1)
    run = options("out", masks=masks)
    self_train(run, run_stage=Recorder())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SelfTrainingError, match=r"out holds a run already: .*--resume"):
        self_train(run, run_stage=_die)

    more = options("out", {"SOLVER.MAX_ITER": 4, "SOLVER.BASE_LR": 7.0}, masks=masks)
    with pytest.raises(SelfTrainingError, match=r"learner\.SOLVER\.BASE_LR was 0\.001 and is 7\.0"):
        self_train(more, resume=True, run_stage=_die)
    other_image = options("out", masks=str(tmp_path / "val.json"), images=str(tmp_path))
    with pytest.raises(SelfTrainingError, match=r"other settings: images was '.*train\.json@unseg"):
        self_train(other_image, resume=True, run_stage=_die)
    write_scenes(tmp_path, "train", 2)
    with pytest.raises(SelfTrainingError, match="other settings: masks was"):
        self_train(run, resume=True, run_stage=_die)
    write_scenes(tmp_path, "train", 1)

    with open(tmp_path / "out/plan.json") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SelfTrainingError, match="another process works in"):
            self_train(run, resume=True, run_stage=_die)
    # Devices and processes may change.
    same = options("out", {"DATALOADER.NUM_WORKERS": 3}, masks=masks, num_gpus=2)
    self_train(same, resume=True, run_stage=_die)
    assert sorted(tmp_path.rglob("*")) == before

    (tmp_path / "out/round1/results.json").unlink()
    with pytest.raises(SelfTrainingError, match=r"round1 .* is missing, but there is masks1"):
        self_train(run, resume=True, run_stage=_die)
    (tmp_path / "out/plan.json").unlink()
    for resume in (False, True):
        with pytest.raises(SelfTrainingError, match=r"round1 exists, but no plan\.json"):
            self_train(run, resume=resume, run_stage=_die)


def test_options_that_are_refused(tmp_path, options):
    masks = write_scenes(tmp_path, "train", 1)
    file = str(tmp_path / "train.json")
    free = str(ROOT / "projects/FreeSOLO/configs/free_masks_tiny.yaml")
    for message, changes, sources in (
        ("ROUNDS must be at least 1", {"SELF_TRAINING.ROUNDS": 0}, {"masks": masks}),
        ("name the images", {}, {"masks": file}),
        ("name the images", {}, {"discovery_config": free}),
        (
            "either a file of masks or",
            {},
            {"dataset": "x", "masks": file, "discovery_config": free},
        ),
        ("either a file of masks or", {}, {"dataset": "x"}),
        ("names its images", {}, {"masks": masks, "images": str(tmp_path)}),
        (r"nothing\.json does not exist", {}, {"masks": f"{tmp_path}/nothing.json@x"}),
    ):
        with pytest.raises(SelfTrainingError, match=message):
            self_train(options("out", changes, **sources), run_stage=_die)
    assert not (tmp_path / "out").exists()


def test_masks_of_no_object_are_not_learned(tmp_path, options):
    record = ImageRecord("000000.bmp", 160, 160, 0)
    write_pseudo_masks(tmp_path / "none.json", [record], statistics=MaskStatistics())
    run = options("out", masks=f"{tmp_path}/none.json@unseg-synthetic://train")
    with pytest.raises(SelfTrainingError, match=r"none\.json has no masks to learn from"):
        self_train(run, run_stage=in_process)


# In processes.


def command_line(options, *flags):
    named = {
        "--config-file": options.config_file,
        "--output": options.output,
        "--discovery-config": options.discovery_config,
        "--images": options.images,
    }
    words = [word for item in named.items() if item[1] for word in item]
    return [*words, *flags, *options.opts]


def test_command_with_processes(tmp_path, options, photographs, monkeypatch, capfd):
    run = options("out", {"SELF_TRAINING.ROUNDS": 1}, **discovery(tmp_path))
    monkeypatch.setattr(sys, "argv", ["self_train", *command_line(run)])
    tool.main()
    out = capfd.readouterr().out
    assert "round1 (training): begins" in out
    assert "| segm AP |" in " ".join(out.split())
    assert "3 images" in (tmp_path / "out/masks0.log").read_text()
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results["rounds"]) == 1
    assert results["rounds"][0]["mask_statistics"]["images"] == 3
    with pytest.raises(SystemExit, match=r"^error: .*out holds a run already"):
        tool.main()


def stage_process(command):
    """The process of the stage that a command has begun."""
    children = Path(f"/proc/{command}/task/{command}/children").read_text().split()
    (stage,) = (c for c in children if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text())
    return int(stage)


@pytest.mark.slow
def test_kill_9_of_a_stage_and_of_the_command(tmp_path, options, photographs):
    """The results are those of the uninterrupted run."""

    def start(name):
        words = command_line(options(name, **discovery(tmp_path)), "--resume")
        log = open(tmp_path / f"{name}.txt", "w")
        command = [sys.executable, "-m", "unseg.tools.self_train", *words]
        return subprocess.Popen(command, stdout=log, stderr=log)

    def said(name):
        return (tmp_path / f"{name}.txt").read_text()

    assert start("whole").wait(timeout=600) == 0, said("whole")[-3000:]
    assert said("whole").count(": begins, log in ") == 4

    command = start("killed")
    wait_until((tmp_path / "killed/round1/config.yaml").exists, 300)
    os.kill(stage_process(command.pid), signal.SIGKILL)
    assert command.wait(timeout=60) == 1
    expected = f"error: round1 (training) has failed (exit code -9); its log is {tmp_path}/killed"
    assert expected in said("killed")

    command = start("killed")
    wait_until((tmp_path / "killed/round2/config.yaml").exists, 300)
    stage = stage_process(command.pid)
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    wait_until(lambda: not is_alive(stage), 20)
    assert not (tmp_path / "killed/results.json").exists()

    assert start("killed").wait(timeout=600) == 0, said("killed")[-3000:]
    assert said("killed").count(": finished before") == 3
    assert products(tmp_path / "killed") == products(tmp_path / "whole")
