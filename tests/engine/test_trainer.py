"""The trainer: reproducible, killed and resumed, explicit about NaN, averaging weights."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.utils.events import EventStorage
from PIL import Image
from toy_training import Recording, read_losses, register_toy_dataset, toy_cfg

from unseg.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


@pytest.fixture(scope="module", autouse=True)
def toy_dataset(images):
    register_toy_dataset(images)
    yield
    DatasetCatalog.remove("toy_train")


def train(cfg, stop_after=None, resume=False, **attributes):
    torch.manual_seed(cfg.SEED)
    trainer = Recording(cfg)
    trainer.resume_or_load(resume=resume)
    for name, value in attributes.items():
        setattr(trainer.model, name, value)
    if stop_after is None:
        trainer.train()
        return trainer
    trainer.max_iter = stop_after
    original = trainer.run_step

    def dying():
        if trainer.iter == stop_after:
            raise KeyboardInterrupt
        original()

    trainer.run_step = dying
    trainer.max_iter = cfg.SOLVER.MAX_ITER
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("stop_after", [4, 6, 11])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path, stop_after, ema):
    changes = {"SOLVER__EMA__ENABLED": ema}
    whole = train(toy_cfg(tmp_path / "whole", **changes))
    again = train(toy_cfg(tmp_path / "again", **changes))
    assert again.log == whole.log, "two runs of one seed differ"
    train(toy_cfg(tmp_path / "cut", **changes), stop_after=stop_after)
    rest = train(toy_cfg(tmp_path / "cut", **changes), resume=True)
    assert min(rest.log) == 4 * (stop_after // 4)
    assert rest.log == {i: whole.log[i] for i in rest.log}
    final = [torch.load(tmp_path / n / "model_final.pth") for n in ("whole", "cut")]
    for key, value in final[0]["model"].items():
        assert torch.equal(value, final[1]["model"][key]), key
    if ema:
        averages = [torch.load(tmp_path / n / "ema/model_final.pth") for n in ("whole", "cut")]
        for key, value in averages[0]["model"].items():
            assert torch.equal(value, averages[1]["model"][key]), key


def test_a_drawn_seed_is_resumed(tmp_path):
    cfg = toy_cfg(tmp_path, SEED=-1)
    first = train(cfg, stop_after=5)
    second = train(cfg, resume=True)
    assert second.seed == first.seed
    assert second.log[4] == first.log[4]


def test_nan_names_the_loss_and_the_images(tmp_path):
    with pytest.raises(FloatingPointError, match=r"loss_two not finite(?s:.*)4 \(.*4\.png\)"):
        train(toy_cfg(tmp_path), nan_on=4)


def test_foreign_checkpoints_are_refused_in_one_sentence(tmp_path):
    trainer = train(toy_cfg(tmp_path), stop_after=5)
    path = tmp_path / "model_0000003.pth"
    content = torch.load(path)
    stock = content | {"trainer": {"iteration": 3, "hooks": {}}}
    torch.save(stock, path)
    with pytest.raises(CheckpointError, match="not written by unseg's trainer"):
        train(toy_cfg(tmp_path), resume=True)
    group = content["trainer"]["_trainer"]["optimizer"]["param_groups"][0]
    group["params"] = group["params"][:-1]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="do not fit this config"):
        train(toy_cfg(tmp_path), resume=True)
    weights = train(toy_cfg(tmp_path / "new", MODEL__WEIGHTS=str(path)), stop_after=0)
    torch.testing.assert_close(weights.model.state_dict(), trainer_weights(path))
    assert trainer.iter == 5


def test_another_optimizer_is_refused_in_one_sentence(tmp_path, caplog):
    clipped = {"SOLVER__CLIP_GRADIENTS__ENABLED": True}
    train(toy_cfg(tmp_path), stop_after=9)  # two checkpoints
    match = "^the checkpoint's optimizer is AdamW, the config's is SGD: train without --resume"
    for changes in ({}, clipped):
        with caplog.at_level("WARNING"), pytest.raises(CheckpointError, match=match):
            train(toy_cfg(tmp_path, SOLVER__OPTIMIZER="SGD", **changes), resume=True)
    assert "trying the checkpoint before it" not in caplog.text
    rest = train(toy_cfg(tmp_path, **clipped), resume=True)
    assert min(rest.log) == 8, "clipping makes it no other optimizer"


def test_weights_alone_are_not_resumed_from(tmp_path):
    torch.save({"model": Recording(toy_cfg(tmp_path)).model.state_dict()}, tmp_path / "w.pth")
    (tmp_path / "w.pth").rename(tmp_path / "model_final.pth")
    with pytest.raises(CheckpointError, match="weights alone: train without --resume"):
        train(toy_cfg(tmp_path), resume=True)
    (tmp_path / "model_final.pth").rename(tmp_path / "w.pth")
    cfg = toy_cfg(tmp_path, MODEL__WEIGHTS=str(tmp_path / "w.pth"))
    assert min(train(cfg, resume=True).log) == 0, "a fresh run beside a file of weights"


def trainer_weights(path):
    return torch.load(path)["model"]


def test_ema_is_the_exponential_average(tmp_path):
    cfg = toy_cfg(tmp_path, SOLVER__EMA__ENABLED=True, SOLVER__EMA__DECAY=0.7, SOLVER__MAX_ITER=5)
    torch.manual_seed(0)
    trainer = Recording(cfg)
    trainer.resume_or_load(False)
    expected = trainer.model.out.weight.detach().double().clone()
    step = trainer.run_step

    def follow():
        step()
        expected.mul_(0.7).add_(0.3 * trainer.model.out.weight.detach().double())

    trainer.run_step = follow
    trainer.train()
    average = torch.load(tmp_path / "ema/model_final.pth")["model"]
    torch.testing.assert_close(average["out.weight"].double(), expected, rtol=1e-5, atol=1e-7)
    assert average["net.1.num_batches_tracked"] == 5
    before = trainer.model.out.weight.detach().clone()
    with trainer._ema.applied():
        assert torch.equal(trainer.model.out.weight, average["out.weight"])
    assert torch.equal(trainer.model.out.weight, before)


def test_an_average_begun_in_a_resumed_run_starts_from_its_weights(tmp_path):
    train(toy_cfg(tmp_path), stop_after=5)
    start = trainer_weights(tmp_path / "model_0000003.pth")["out.weight"]
    changes = {"SOLVER__EMA__ENABLED": True, "SOLVER__EMA__DECAY": 0.999}
    train(toy_cfg(tmp_path, **changes), resume=True)
    average = trainer_weights(tmp_path / "ema/model_final.pth")["out.weight"]
    torch.testing.assert_close(average, start, rtol=0, atol=0.01)
    end = trainer_weights(tmp_path / "model_final.pth")["out.weight"]
    assert (end - start).abs().max() > 0.1, "else the test would not see the difference"


def test_evaluation_uses_the_average_and_leaves_training_alone(tmp_path):
    plain = train(toy_cfg(tmp_path / "plain"))
    changes = {
        "SOLVER__EMA__ENABLED": True,
        "DATASETS__TEST": ("toy_train",),
        "TEST__EVAL_PERIOD": 3,
        "VIS_PERIOD": 5,
    }
    seen = []

    class Watching(Recording):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            seen.append(model.out.weight.detach().clone())
            return super().test(cfg, model, evaluators)

    torch.manual_seed(3)
    trainer = Watching(toy_cfg(tmp_path / "ema", **changes))
    trainer.resume_or_load(False)
    trainer.train()
    assert trainer.log == plain.log
    assert len(seen) == 4  # after 3, 6, 9 and 12 steps
    average = torch.load(tmp_path / "ema/ema/model_final.pth")["model"]["out.weight"]
    assert torch.equal(seen[-1], average)
    assert not torch.equal(seen[-1], trainer.model.out.weight)
    assert any(Path(tmp_path / "ema").glob("events.out.*"))


def test_training_pictures(tmp_path, images, monkeypatch):
    pictures = []
    put_image = EventStorage.put_image

    def record(storage, name, picture):
        pictures.append((storage.iter, name, picture.copy()))
        put_image(storage, name, picture)

    monkeypatch.setattr(EventStorage, "put_image", record)
    cfg = toy_cfg(tmp_path, VIS_PERIOD=5, MODEL__MASK_ON=True, INPUT__RANDOM_FLIP="none")
    trainer = train(cfg)
    # Detectron2's models draw at steps 0, 5, ...: they must not be asked to.
    assert [(iteration, name) for iteration, name, _ in pictures] == [
        (4, "image | masks trained on | prediction"),
        (9, "image | masks trained on | prediction"),
    ]
    assert trainer.model.vis_period == 0
    by_pixels = {Image.open(images / f"{i}.png").tobytes(): i for i in range(7)}
    for _, _, picture in pictures:
        assert picture.shape == (3, 32, 3 * 32 + 2 * 4)
        assert picture.dtype == np.uint8
        image, trained, predicted = (
            picture.transpose(1, 2, 0)[:, x : x + 32].astype(int) for x in (0, 36, 72)
        )
        number = by_pixels[image.astype(np.uint8).tobytes()]
        changed = np.abs(trained - image).max(axis=2) > 0
        last_row = 4 * (number % 3) + 8  # of the masks; their outlines are a pixel wider
        assert changed[1:last_row, 4:19].mean() > 0.95
        assert not changed[last_row + 2 :].any()
        assert not changed[:, 23:].any()
        assert (np.abs(predicted - image).max(axis=2) > 0).mean() > 0.95, "a mask everywhere"


def test_kill_9_and_resume_gives_the_losses_of_an_uninterrupted_run(tmp_path, images):
    command = [sys.executable, str(Path(__file__).with_name("toy_training.py"))]

    def start(name):
        arguments = [str(tmp_path / name), str(images), "120"]
        return subprocess.Popen(
            command + arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    assert start("whole").wait(timeout=120) == 0
    kills = 0
    for wanted in (27, 61):
        process = start("killed")
        log = tmp_path / "killed" / "losses.jsonl"
        end = time.monotonic() + 60
        while not (log.exists() and log.read_text().count("\n") >= wanted):
            assert time.monotonic() < end
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 2
    assert start("killed").wait(timeout=120) == 0
    assert read_losses(tmp_path / "killed") == read_losses(tmp_path / "whole")
    final = [torch.load(tmp_path / n / "model_final.pth")["model"] for n in ("whole", "killed")]
    for key, value in final[0].items():
        assert torch.equal(value, final[1][key]), key
