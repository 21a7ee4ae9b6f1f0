"""dev/benchmarks run."""

import runpy
import sys
from pathlib import Path

import cv2
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(monkeypatch, script, *arguments):
    """Run a benchmark; its exit status."""
    threads = torch.get_num_threads(), cv2.getNumThreads()
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    try:
        runpy.run_path(str(ROOT / "dev/benchmarks" / script), run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
    return 0


def test_rendering(monkeypatch, capsys):
    assert run(monkeypatch, "synthetic.py", "--count", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("2 scenes of unseg_synthetic_train, 160 x 160")
    assert [float(line.split()[-2]) > 0 for line in lines[2:]] == [True, True]
    status = run(monkeypatch, "synthetic.py", "--dataset", "unseg_synthetic_val_video")
    assert "holds clips" in status


def test_freesolo(monkeypatch, capsys):
    assert run(monkeypatch, "freesolo.py", "--quick") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "0 checks failed"
    for start in ("pairwise loss, COCO", "pairwise loss, whole", "colour edges", "targets of"):
        assert sum(line.startswith(start) for line in lines) == 1
    # Results are compared, and agree.
    assert sum(line.endswith("1e-05 met") for line in lines) == 2
    assert any(line.endswith("equal met") for line in lines)
    (saved,) = (line.split() for line in lines if line.startswith("  saved"))
    assert float(saved[-1].removesuffix("x")) > 10


def test_freesolo_fails_when_results_differ(monkeypatch, capsys):
    import unseg.modeling.losses as losses

    correct = losses.pairwise_affinity
    monkeypatch.setattr(
        losses, "pairwise_affinity", lambda x, *rest: correct(x * (1 + 1e-3), *rest)
    )
    assert run(monkeypatch, "freesolo.py", "--quick") == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("1e-05 NOT MET") for line in lines) == 2
    assert lines[-1] == "2 checks failed"


def test_freesolo_step(monkeypatch, capsys):
    config = ROOT / "projects/FreeSOLO/configs/freesolo_tiny.yaml"
    arguments = ["--config-file", config, "--size", 64, 96, "--images", 2, "--rounds", 1]
    overrides = ["MODEL.FREESOLO.INSTANCE_CHANNELS", 16]
    assert run(monkeypatch, "freesolo_step.py", *map(str, arguments + overrides)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("2 views of 64 x 96, ")
    shares = [float(line.split()[-1].removesuffix("%")) for line in lines[2:-1]]
    assert len(shares) == 10
    assert sum(shares) == pytest.approx(100, abs=1)


def spectral(monkeypatch, *arguments):
    monkeypatch.syspath_prepend(str(ROOT / "dev/benchmarks"))
    return run(monkeypatch, "spectral.py", *arguments)


def test_spectral(monkeypatch, capsys):
    assert spectral(monkeypatch, "--quick") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "0 goals missed"
    start = lines.index("400 patches (20 x 20), 384 channels, k-means with 10 starts")
    rows = {line.split()[0]: line.split() for line in lines[start + 1 : start + 5]}
    assert list(rows) == ["published", "quotient", "reference", "auto-K"]
    for words in rows.values():
        assert words[2] == "ms"
        assert float(words[1]) > 0
        assert 0 < float(words[5]) <= 1
    assert rows["published"][3] == "1.0x"
    (stages,) = (line for line in lines if line.startswith("  quotient by stages"))
    parts = [float(part.split()[-1]) for part in stages.split(":")[1].split(",")]
    assert len(parts) == 10
    assert all(part > 0 for part in parts)
    assert sum(line.startswith("  scipy pdist") for line in lines) == 1
    extra = lines[lines.index("extra memory at 400 patches, in float32 matrices of all pairs") + 1]
    assert float(extra.split()[1]) >= 0
