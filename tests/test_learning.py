"""Learning checks: minutes each, run by .ci/run and ``dev/test.sh -m slow``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_demo_shows_that_training_on_free_masks_pays(tmp_path):
    """dev/demo.py end to end: a detector beats the masks it learned from by half."""
    done = subprocess.run(
        [sys.executable, "dev/demo.py", "--output", str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    free = json.loads((tmp_path / "demo/val_metrics.json").read_text())["segm"]
    metrics = (tmp_path / "demo/seed1/metrics.json").read_text().splitlines()
    trained = json.loads(metrics[-1])
    assert free["AP50"] > 15
    assert trained["segm/AP50"] >= 1.5 * free["AP50"]
    assert trained["segm/AP"] > free["AP"]
    page = (tmp_path / "demo/index.html").read_text()
    pictures = sorted(p.name for p in (tmp_path / "demo/pictures").iterdir())
    assert len(pictures) == 20
    assert all(f"pictures/{name}" in page for name in pictures)
