"""dev/benchmarks run."""

import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util

ROOT = Path(__file__).resolve().parents[2]


def run(monkeypatch, script, *arguments):
    """Run a benchmark; its exit status."""
    threads = torch.get_num_threads(), cv2.getNumThreads()
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str(ROOT / "dev/benchmarks"))
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


def test_spectral(monkeypatch, capsys):
    assert run(monkeypatch, "spectral.py", "--quick") == 0
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


def test_proposals(monkeypatch, capsys):
    assert run(monkeypatch, "proposals.py", "--quick") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "0 checks failed"
    for start in ("recall: 40 proposals on each of 6 images", "inputs:", "dense: ", "heads: "):
        assert sum(line.startswith(start) for line in lines) == 1
    assert sum(line.strip() == "equal met" for line in lines) == 2  # forward, and backward
    assert sum(line.endswith("at most 1e-09 met") for line in lines) == 1
    ratios = [float(line.split()[-1][:-1]) for line in lines if line.rstrip().endswith("x")]
    assert len(ratios) == 13
    assert all(ratio > 0 for ratio in ratios)
    (weights,) = (line.split() for line in lines if line.startswith("  weights"))
    # 8 channels and 4 x 4 cells: two hundred by 56 x 56 for Full
    assert float(weights[2]) == pytest.approx(8 * 16 * 56**2 / 1e6, abs=0.06)


def test_proposals_fails_when_results_differ(monkeypatch, capsys):
    import unseg.evaluation.proposal_recall as proposal_recall
    import unseg.layers as layers

    assemble, overlap = layers.assemble_instances, proposal_recall.predicted_mask_iou
    monkeypatch.setattr(layers, "assemble_instances", lambda *x: assemble(*x).roll(1, 1))
    monkeypatch.setattr(proposal_recall, "predicted_mask_iou", lambda *x: 0.9 * overlap(*x))
    arguments = ["--quick", "--parts", "assembling", "recall"]
    assert run(monkeypatch, "proposals.py", *arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.strip() == "equal NOT MET" for line in lines) == 2
    assert sum(line.endswith("at most 1e-09 NOT MET") for line in lines) == 1
    assert lines[-1] == "3 checks failed"


def test_ellipses_are_those_of_their_formula(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "dev/benchmarks"))
    import proposal_scenes as proposals

    size = (40, 60)
    boxes = np.array([[3.2, 4.7, 30.1, 38.9], [0, 0, 60, 20], [50, 10, 52, 12]], dtype=float)
    masks = mask_util.decode(proposals.ellipse_rles(boxes, size))
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    for box, mask in zip(boxes, masks.transpose(2, 0, 1)):
        (x0, y0, x1, y1) = box
        dx, dy = (x - (x0 + x1) / 2) / (x1 - x0), (y - (y0 + y1) / 2) / (y1 - y0)
        np.testing.assert_array_equal(mask, dx**2 + dy**2 <= 0.25)
    scene = proposals.make_scene(0, size, 50)
    assert len(scene.masks) == 50
    assert mask_util.area(scene.objects).min() > 0


def test_hyperbolic_kmeans(monkeypatch, capsys):
    assert run(monkeypatch, "hyperbolic_kmeans.py", "--quick", "--million") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "0 checks failed"
    for start in (
        "assignment: 600 points",
        "lloyd: ",
        "seeding: 20 of 600",
        "million: 2000 points",
    ):
        assert sum(line.startswith(start) for line in lines) == 1
    assert sum("labels: 64 of 64 equal met" in line for line in lines) == 2
    assert sum(line.endswith("at most 1e-08 met") for line in lines) == 2
    assert sum(" as long" in line for line in lines) == 4
    peaks = [line.split() for line in lines if "so far at most" in line]
    assert [words[0] for words in peaks] == ["lorentz,", "frechet,"]
    assert all(0 < float(words[-2]) < 4 for words in peaks)


def test_hyperbolic_kmeans_fails_when_results_differ(monkeypatch, capsys):
    import unseg.geometry as geometry

    correct = geometry.nearest_centroids

    def wrong(x, centroids, c):
        labels, distances = correct(x, centroids, c)
        return (labels + 1) % len(centroids), distances

    monkeypatch.setattr(geometry, "nearest_centroids", wrong)
    arguments = ["--quick", "--parts", "assignment"]
    assert run(monkeypatch, "hyperbolic_kmeans.py", *arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("labels: 0 of 64 equal" in line and line.endswith("NOT MET") for line in lines) == 2
    assert lines[-1] == "4 checks failed"  # distances are of other centroids, too


def test_long_tail_head(monkeypatch, capsys):
    assert run(monkeypatch, "long_tail_head.py", "--quick") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "0 checks failed"
    assert sum(line.endswith("the same detections met") for line in lines) == 2
    assert sum(line.endswith("%   ") and " plain" in line for line in lines) == 2
