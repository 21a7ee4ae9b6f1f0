"""Checkpoints survive a kill, a full disk and a cut-short copy."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch import nn

from unseg.checkpoint import CheckpointError, SafeCheckpointer


class Counter:
    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def make(folder, value=0):
    model = nn.Linear(3, 3)
    nn.init.constant_(model.weight, float(value))
    counter = Counter(value)
    return model, counter, SafeCheckpointer(model, str(folder), counter=counter)


def save_two(folder):
    for value in (1, 2):
        _, _, checkpointer = make(folder, value)
        checkpointer.save(f"model_{value:07d}")
        os.utime(folder / f"model_{value:07d}.pth", (value, value))


def resume(folder):
    model, counter, checkpointer = make(folder)
    checkpointer.resume_or_load("", resume=True)
    assert (model.weight == counter.value).all()
    return counter.value


def test_resumes_from_the_tagged_checkpoint(tmp_path):
    save_two(tmp_path)
    assert resume(tmp_path) == 2
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    assert resume(tmp_path) == 1


@pytest.mark.parametrize("keep", [0, 10, 500])
def test_falls_back_from_a_half_written_checkpoint(tmp_path, keep, caplog):
    save_two(tmp_path)
    newest = tmp_path / "model_0000002.pth"
    newest.write_bytes(newest.read_bytes()[:keep])
    with caplog.at_level("WARNING"):
        assert resume(tmp_path) == 1
    assert "model_0000002.pth is damaged" in caplog.text


def test_falls_back_without_the_tag(tmp_path):
    save_two(tmp_path)
    (tmp_path / "last_checkpoint").unlink()
    assert make(tmp_path)[2].has_checkpoint()
    assert resume(tmp_path) == 2


def test_does_not_start_over_silently(tmp_path):
    save_two(tmp_path)
    for value in (1, 2):
        (tmp_path / f"model_{value:07d}.pth").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint can be read(?s:.*)model_0000001\.pth"
    ):
        resume(tmp_path)


def test_without_checkpoints_or_resume_the_weights_are_loaded(tmp_path):
    save_two(tmp_path)
    empty = tmp_path / "empty"
    for folder, flag in ((tmp_path, False), (empty, True), (empty, False)):
        model, counter, checkpointer = make(folder)
        checkpointer.resume_or_load(str(tmp_path / "model_0000001.pth"), resume=flag)
        assert (model.weight == 1).all()
        assert counter.value == 0


def test_extra_weights_are_not_resumed_from(tmp_path):
    save_two(tmp_path)
    _, _, checkpointer = make(tmp_path)
    checkpointer.save_weights("ema/model_final", {"weight": torch.zeros(3, 3)})
    assert (tmp_path / "ema/model_final.pth").is_file()
    assert resume(tmp_path) == 2


@pytest.mark.parametrize("name", ["densecl_r50_d2.pth", "model_best.pth", "model_0000001.pth.pth"])
def test_other_files_are_no_checkpoints(tmp_path, name):
    _, _, checkpointer = make(tmp_path, 3)
    checkpointer.save(name.removesuffix(".pth"))
    (tmp_path / "last_checkpoint").unlink()
    assert not checkpointer.has_checkpoint()
    model, counter, checkpointer = make(tmp_path)
    checkpointer.resume_or_load("", resume=True)
    assert counter.value == 0
    assert (model.weight == 0).all()
    # beside a damaged checkpoint of our own they are not fallen back to either
    (tmp_path / "model_final.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model_final\.pth is damaged") as error:
        resume(tmp_path)
    assert name not in str(error.value)


def test_any_tagged_file_is_resumed_from(tmp_path):
    make(tmp_path, 3)[2].save("best")
    assert resume(tmp_path) == 3


def test_a_missing_tagged_file_is_named_and_the_others_tried(tmp_path, caplog):
    save_two(tmp_path)
    (tmp_path / "model_0000002.pth").unlink()
    with caplog.at_level("WARNING"):
        assert resume(tmp_path) == 1
    assert "model_0000002.pth does not exist" in caplog.text
    (tmp_path / "model_0000001.pth").unlink()
    with pytest.raises(CheckpointError, match=r"model_0000002\.pth does not exist"):
        resume(tmp_path)


def test_a_refusal_of_the_trainer_is_no_reason_to_try_older_checkpoints(tmp_path, caplog):
    save_two(tmp_path)
    tried = []

    class Refusing(Counter):
        def load_state_dict(self, state):
            tried.append(state["value"])
            raise CheckpointError("another optimizer")

    checkpointer = SafeCheckpointer(nn.Linear(3, 3), str(tmp_path), counter=Refusing())
    with caplog.at_level("WARNING"), pytest.raises(CheckpointError, match="^another optimizer$"):
        checkpointer.resume_or_load("", resume=True)
    assert tried == [2]
    assert "trying" not in caplog.text


def _save_forever(folder):
    model = nn.Linear(400, 400)
    counter = Counter()
    checkpointer = SafeCheckpointer(model, str(folder), counter=counter)
    while True:
        counter.value += 1
        nn.init.constant_(model.weight, float(counter.value))
        checkpointer.save(f"model_{counter.value % 3:07d}")


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_while_saving(tmp_path):
    context = multiprocessing.get_context("spawn")
    for attempt in range(3):
        process = context.Process(target=_save_forever, args=(tmp_path,))
        process.start()
        wait_for(lambda: (tmp_path / "last_checkpoint").exists())
        saved = (tmp_path / "last_checkpoint").stat().st_mtime_ns
        wait_for(lambda t=saved: (tmp_path / "last_checkpoint").stat().st_mtime_ns > t)
        time.sleep(0.013 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        for path in tmp_path.glob("model_*.pth"):
            content = torch.load(path, weights_only=True)
            assert (content["model"]["weight"] == content["counter"]["value"]).all()
        tag = (tmp_path / "last_checkpoint").read_text()
        assert (tmp_path / tag).is_file()
