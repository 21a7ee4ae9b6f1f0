"""Learning checks: minutes each, run by .ci/run and ``dev/test.sh -m slow``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_demo_shows_that_self_training_on_free_masks_pays(tmp_path):
    """dev/demo.py end to end: FreeSOLO beats the masks it learned from, and round 2 round 1."""
    done = subprocess.run(
        [sys.executable, "dev/demo.py", "--output", str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def free_masks(dataset):
        return json.loads((tmp_path / f"demo/{dataset}_metrics.json").read_text())["segm"]

    results = json.loads((tmp_path / "demo/seed1/freesolo/results.json").read_text())
    val, heldout = "unseg_synthetic_val_fresh", "unseg_synthetic_val_heldout_fresh"
    first, second = (one["metrics"][val]["segm"] for one in results["rounds"])
    free = free_masks(val)
    assert free["AP50"] > 15
    assert first["AP50"] >= 1.3 * free["AP50"]
    assert second["AP50"] >= 1.5 * free["AP50"]
    assert second["AP"] > first["AP"] > free["AP"]
    unseen = results["rounds"][1]["metrics"][heldout]["segm"]
    assert unseen["AP50"] > 0.9 * free_masks(heldout)["AP50"]  # 30 and 38 against 26 were seen
    metrics = (tmp_path / "demo/seed1/mask_rcnn/metrics.json").read_text().splitlines()
    assert json.loads(metrics[-1])["segm/AP50"] > 1
    page = (tmp_path / "demo/index.html").read_text()
    pictures = sorted(p.name for p in (tmp_path / "demo/pictures").iterdir())
    assert len(pictures) == 20
    assert all(f"pictures/{name}" in page for name in pictures)


@pytest.mark.slow
def test_proposal_nets_learn_and_one_score_map_cannot_separate(tmp_path):
    """dev/experiments/proposals.py, one seed: nets beat blind windows, k = 3 separates objects."""
    arms = ("sliding", "deepmask", "instance_fcn_k1", "instance_fcn_k3")
    command = [sys.executable, "dev/experiments/proposals.py", "--output", str(tmp_path / "out")]
    command += ["--seeds", "1", "--arms", *arms]
    logs = [open(tmp_path / f"{n}.log", "w+") for n in range(2)]
    sharing = [subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT) for log in logs]
    for process, log in zip(sharing, logs):
        status = process.wait()
        log.seek(0)
        assert status == 0, log.read()[-3000:]
        log.close()
    numbers = {
        table: json.loads((tmp_path / f"out/{table}/results.json").read_text())["numbers"]
        for table in ("recall", "touching")
    }
    recall = {arm: numbers["recall"][arm]["1"] for arm in arms}
    for arm in ("deepmask", "instance_fcn_k3"):
        assert recall[arm]["AR@10"] >= max(25, 5 * recall["sliding"]["AR@10"])
        assert recall[arm]["AR@100"] >= max(35, 1.5 * recall["sliding"]["AR@100"])
    one, three = (numbers["touching"][f"instance_fcn_k{k}"]["1"] for k in (1, 3))
    # 14, 17 and 5 with seeds 1 to 3: another processor may be as unlucky as the third.
    assert three["touching AR@10"] >= one["touching AR@10"] + 3
    assert three["foreign"] < one["foreign"] / 2
    assert three["window IoU"] >= one["window IoU"] + 7
