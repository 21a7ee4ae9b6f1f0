"""dev/experiments/long_tail.py and its measures: the steps, and numbers of planted embeddings."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch

from unseg.config import load_config

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def importable(folder):
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


with importable(ROOT / "dev/experiments"):
    import long_tail
    import long_tail_measures


def steps_of(*arms, seeds=(1, 2), words=()):
    plan = long_tail.Plan(Path("out"), "train", "test", arms or long_tail.ARMS, words)
    return {step.name: step for step in plan.steps(seeds)}


def test_steps_need_what_precedes_them():
    steps = steps_of()
    seen = {}
    for name, step in steps.items():
        assert seen.keys() >= set(step.needs)
        seen[name] = step
    assert {step.arm for step in steps.values() if step.measure} == set(long_tail.ARMS)
    assert steps["seed2_full_training"].needs == ["seed2_detector_truth"]
    assert steps["seed2_full"].needs == ["seed2_full_training"]
    assert steps["seed1_untrained"].needs == ["seed1_detector_truth"]
    assert steps["seed1_free_training"].needs == ["seed1_detector_free"]
    assert "seed1_untrained_training" not in steps


def test_only_what_is_asked_for_is_done():
    assert list(steps_of("untrained", seeds=[3])) == ["seed3_detector_truth", "seed3_untrained"]


@pytest.mark.parametrize("arm", [name for name, arm in long_tail.ARMS.items() if arm.trained])
def test_training_and_measuring_have_the_arms_settings(arm):
    steps = steps_of(arm, seeds=[1], words=["SOLVER.MAX_ITER", "7"])
    for name in (f"seed1_{arm}_training", f"seed1_{arm}"):
        words = list(map(str, steps[name].command))
        start = next(
            i for i, word in enumerate(words) if word.isupper() or "." in word and word[0].isupper()
        )
        cfg = load_config(str(long_tail.HEAD), words[start:])
        assert cfg.SOLVER.MAX_ITER == 7
        for key, value in long_tail.ARMS[arm].overrides.items():
            assert cfg.MODEL.HIERARCHICAL_EMBEDDING[key.split(".")[-1]] == value


def test_moved_masks_stay_whole():
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[2:12, 18:28] = True
    box = torch.tensor([18.0, 2, 28, 12])
    moved, shifted = long_tail_measures.move(box, mask)
    assert moved.tolist() == [19.0, 3, 29, 13]
    assert shifted.sum() == 100
    assert shifted[3:13, 19:29].all()
    mask = mask.roll(2, 1)  # at the right border: away from it
    moved, shifted = long_tail_measures.move(box + torch.tensor([2.0, 0, 2, 0]), mask)
    assert moved.tolist() == [19.0, 3, 29, 13]
    assert shifted[3:13, 19:29].all()


def test_distances_of_rows():
    a, b = torch.tensor([[0.0, 0], [3, 4]]), torch.tensor([[0.3, 0.4], [0, 0]])
    flat = long_tail_measures.row_distances(a, b, {"geometry": "euclidean", "c": 1.0})
    torch.testing.assert_close(flat, torch.tensor([0.5, 5.0], dtype=torch.float64))
    # From the origin 2 |u|, whatever the curvature.
    curved = long_tail_measures.row_distances(a[:1], b[:1], {"geometry": "poincare", "c": 2.0})
    torch.testing.assert_close(curved, torch.tensor([1.0], dtype=torch.float64))
