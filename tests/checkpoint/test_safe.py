"""Files of weights cannot run code, whatever their suffix."""

import argparse
import os
import pickle
from collections import OrderedDict
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from unseg.checkpoint import CheckpointError, SafeCheckpointer, load_weights_file
from unseg.config import load_config


class Malicious:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (self.sentinel,)


@pytest.mark.parametrize("name", ["w.pkl", "w.pth", "w.pyth", "w.bin"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_code_is_not_run(tmp_path, name, wrapped):
    sentinel = tmp_path / "sentinel"
    payload = Malicious(str(sentinel))
    content = {"model": {"weight": np.zeros(2)}, "__author__": payload} if wrapped else payload
    path = tmp_path / name
    if name.endswith(".pkl"):
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    for load in (load_weights_file, SafeCheckpointer(nn.Linear(2, 2)).load):
        with pytest.raises(CheckpointError, match=name):
            load(str(path))
    assert not sentinel.exists()
    pickle.loads(pickle.dumps(payload))
    assert sentinel.exists(), "the payload works, so the test means something"


def test_yaml_does_not_run_code(tmp_path):
    sentinel = tmp_path / "sentinel"
    base = tmp_path / "base.yaml"
    base.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{sentinel}']\n")
    derived = tmp_path / "derived.yaml"
    derived.write_text(f"_BASE_: {base}\nSEED: 1\n")
    for path in (base, derived):
        with pytest.raises(Exception, match="python/object/apply"):
            load_config(str(path))
    assert not sentinel.exists()


def test_arrays_are_read(tmp_path):
    arrays = OrderedDict(
        a=np.arange(6, dtype=np.float32).reshape(2, 3), b=np.float64(2.5), c=np.array(["x", "yy"])
    )
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f"{protocol}.pkl"
        path.write_bytes(pickle.dumps({"model": arrays, "n": 3}, protocol=protocol))
        read = load_weights_file(path)
        assert read["n"] == 3
        for key, value in arrays.items():
            np.testing.assert_array_equal(read["model"][key], value)


def test_numpy_1_names_are_read(tmp_path):
    data = pickle.dumps({"w": np.arange(3.0)}, protocol=2)
    assert b"numpy._core.multiarray" in data
    path = tmp_path / "old.pkl"
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    np.testing.assert_array_equal(load_weights_file(path)["w"], [0, 1, 2])


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_damaged_files_are_named(tmp_path, keep):
    path = tmp_path / "w.pth"
    torch.save({"model": {"weight": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"w\.pth is damaged"):
        load_weights_file(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_the_command_line_in_a_training_state_is_read(tmp_path, zipped):
    """DINO's full checkpoints hold one."""
    path = tmp_path / "w.pth"
    args = argparse.Namespace(arch="resnet50", crops=[2, 8], lr=0.1)
    content = {"teacher": {"weight": torch.ones(2)}, "args": args}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    read = load_weights_file(path)
    assert read["args"] == args
    assert torch.equal(read["teacher"]["weight"], torch.ones(2))
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: argparse.Namespace(inner=x)])
def test_a_class_that_is_not_allowed_is_named(tmp_path, wrap):
    path = tmp_path / "w.pth"
    torch.save({"model": {"weight": torch.ones(2)}, "scale": wrap(Fraction(1, 2))}, path)
    with pytest.raises(CheckpointError) as error:
        load_weights_file(path)
    message = str(error.value)
    assert message.endswith(
        "w.pth is damaged or holds more than weights: Unsupported global: fractions.Fraction"
    )
    torch.save(Malicious(str(tmp_path / "sentinel")), path)  # torch words this one differently
    with pytest.raises(CheckpointError, match=r": Unsupported global: \w+\.mkdir$"):
        load_weights_file(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_weights_file(tmp_path / "nothing.pth")


def test_detectron2_model_zoo_pickles_load(tmp_path):
    """The format of R-50.pkl: numpy arrays, an author, and matching by name."""
    model = nn.Sequential(OrderedDict(backbone=nn.Linear(2, 2)))
    weights = {"weight": np.ones((2, 2), np.float32), "bias": np.zeros(2, np.float32)}
    path = tmp_path / "zoo.pkl"
    content = {"model": weights, "__author__": "someone", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    SafeCheckpointer(model).load(str(path))
    torch.testing.assert_close(model.backbone.weight, torch.ones(2, 2))
