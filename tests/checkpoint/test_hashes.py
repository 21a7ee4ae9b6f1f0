"""Weights are the same whatever else is in their file."""

import hashlib

import pytest
import torch

from unseg.checkpoint import CheckpointError, file_hash, weights_hash

WEIGHTS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(3),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "none": torch.zeros(0),
}


def saved_hash(path, model, **other):
    torch.save({"model": model, **other}, path)
    return weights_hash(str(path))


def test_only_the_weights_count(tmp_path):
    expected = saved_hash(tmp_path / "a.pth", WEIGHTS)
    reordered = dict(reversed(WEIGHTS.items())) | {"a.weight": WEIGHTS["a.weight"].T.clone().T}
    assert saved_hash(tmp_path / "b.pth", reordered, iteration=7) == expected
    for change in (
        {"b": torch.tensor(4)},
        {"b": torch.tensor([3])},
        {"b": torch.tensor(3, dtype=torch.int32)},
        {"half": torch.ones(2, dtype=torch.float16)},
        {"a.weight": WEIGHTS["a.weight"].T},
        {"c": torch.zeros(0)},
    ):
        assert saved_hash(tmp_path / "c.pth", WEIGHTS | change) != expected, change


def test_other_files_by_their_bytes_and_other_names_by_themselves(tmp_path):
    (tmp_path / "w.pkl").write_bytes(b"any bytes")
    expected = hashlib.sha256(b"any bytes").hexdigest()
    assert weights_hash(str(tmp_path / "w.pkl")) == file_hash(tmp_path / "w.pkl") == expected
    torch.save(WEIGHTS, tmp_path / "plain.pth")
    assert weights_hash(str(tmp_path / "plain.pth")) == file_hash(tmp_path / "plain.pth")
    for name in ("", "random", "https://example.com/w.pth"):
        assert weights_hash(name) == name
    (tmp_path / "w.pth").write_bytes(b"any bytes")
    with pytest.raises(CheckpointError, match="damaged"):
        weights_hash(str(tmp_path / "w.pth"))
