"""dev/benchmarks run."""

import runpy
import sys
from pathlib import Path

import cv2
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run_synthetic(monkeypatch, *arguments):
    threads = torch.get_num_threads(), cv2.getNumThreads()
    monkeypatch.setattr(sys, "argv", ["synthetic.py", *arguments])
    try:
        runpy.run_path(str(ROOT / "dev/benchmarks/synthetic.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])


def test_rendering(monkeypatch, capsys):
    run_synthetic(monkeypatch, "--count", "2")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("2 scenes of unseg_synthetic_train, 160 x 160")
    assert [float(line.split()[-2]) > 0 for line in lines[2:]] == [True, True]
    with pytest.raises(SystemExit, match="holds clips"):
        run_synthetic(monkeypatch, "--dataset", "unseg_synthetic_val_video")
