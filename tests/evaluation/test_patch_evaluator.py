"""PatchMaskEvaluator against loops over pixels."""

import json
import math

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

from unseg.config import get_cfg
from unseg.data import build_mapper
from unseg.evaluation import PatchMaskEvaluator, build_evaluator
from unseg.evaluation.patches import patch_ious

SIDE = 6


def pair(image_id, patches=4, seed=None):
    """Random inputs and outputs of one image, half of its patches positive."""
    rng = np.random.default_rng(image_id if seed is None else seed)
    labels = np.where(np.arange(patches) % 2, -1, 1).astype(np.int8)
    inside = rng.random((patches, SIDE, SIDE)) < rng.random((patches, 1, 1))
    masks = (np.where(inside, 1, -1) * (labels == 1)[:, None, None]).astype(np.int8)
    noise = rng.random((patches, 1, 1)) * 3
    logits = (np.where(inside, 1, -1) + noise * rng.normal(size=masks.shape)).round(1)
    scores = labels + 1.5 * rng.normal(size=patches)
    record = {"image_id": image_id, "patch_masks": masks, "patch_labels": labels}
    output = {"patch_logits": logits.astype(np.float32), "patch_scores": scores.astype(np.float32)}
    return tuple({k: torch.as_tensor(v) for k, v in part.items()} for part in (record, output))


def as_pair(parts):
    record, output = parts
    return {**record, "image_id": int(record["image_id"])}, output


def slow_iou(logits, mask):
    """Both empty: they agree."""
    inter = union = 0
    for row in range(len(mask)):
        for column in range(len(mask[row])):
            a, b = logits[row][column] >= 0, mask[row][column] == 1
            inter += a and b
            union += a or b
    return inter / union if union else 1.0


def expected_numbers(pairs):
    ious, right = [], []
    for record, output in pairs:
        for n, label in enumerate(record["patch_labels"].tolist()):
            if label == 1:
                logits, mask = output["patch_logits"][n], record["patch_masks"][n]
                ious.append(slow_iou(logits.tolist(), mask.tolist()))
            right.append((output["patch_scores"][n].item() >= 0) == (label == 1))
    ious.sort()
    half = len(ious) // 2
    return {
        "IoU": 100 * math.fsum(ious) / len(ious),
        "IoU-median": 50 * (ious[half] + ious[-half - 1]),
        "IoU>50": 100 * sum(iou > 0.5 for iou in ious) / len(ious),
        "IoU>70": 100 * sum(iou > 0.7 for iou in ious) / len(ious),
        "score-accuracy": 100 * sum(right) / len(right),
    }


def evaluate(pairs):
    evaluator = PatchMaskEvaluator("toy")
    for record, output in pairs:
        evaluator.process([record], [output])
    return evaluator.evaluate()


@pytest.mark.parametrize("images", [1, 2, 25])
def test_equals_a_loop(images):
    pairs = [as_pair(pair(k, patches=2 + 2 * (k % 3))) for k in range(images)]
    results = evaluate(pairs)
    assert list(results) == ["patches"]
    expected = expected_numbers(pairs)
    assert results["patches"] == pytest.approx(expected, abs=1e-9)
    if images == 25:  # they say something
        assert len(set(expected.values())) == 5
        assert 5 < min(expected.values()) < max(expected.values()) < 95


def test_exact_shares():
    """IoU of exactly .5 or .7 is not above; logit 0 is in the mask, score 0 is an object."""
    masks = torch.full((3, 10, 10), -1, dtype=torch.int8)
    logits = torch.full((3, 10, 10), -5.0)
    masks[:, 0] = 1
    for n, count in enumerate((5, 7, 8)):
        logits[n, 0, :count] = 0
    assert patch_ious(logits, masks).tolist() == [5 / 10, 7 / 10, 8 / 10]
    record = {"image_id": 1, "patch_masks": masks, "patch_labels": torch.ones(3)}
    output = {"patch_logits": logits, "patch_scores": torch.tensor([0.0, -1e-6, 2])}
    numbers = evaluate([(record, output)])["patches"]
    assert numbers == pytest.approx(
        {
            "IoU": 200 / 3,
            "IoU-median": 70,
            "IoU>50": 200 / 3,
            "IoU>70": 100 / 3,
            "score-accuracy": 200 / 3,
        }
    )


def test_empty_masks():
    masks = torch.full((2, 4, 4), -1)
    logits = torch.stack([torch.full((4, 4), -1.0), torch.full((4, 4), 1.0)])
    assert patch_ious(logits, masks).tolist() == [1, 0]
    assert patch_ious(-logits.flip(0).abs(), masks + 2).tolist() == [0, 0]
    assert patch_ious(logits[:0], masks[:0]).tolist() == []


def test_masks_of_negatives_do_not_count():
    record, output = as_pair(pair(3))
    before = evaluate([(record, output)])
    output["patch_logits"][1::2] = 100
    assert evaluate([(record, output)]) == before
    output["patch_logits"][::2] = 100
    assert evaluate([(record, output)]) != before


def test_an_image_seen_twice_counts_once():
    pairs = [as_pair(pair(k)) for k in range(4)]
    assert evaluate([*pairs, pairs[2]]) == evaluate(pairs)


def test_where_there_is_nothing():
    numbers = evaluate([])["patches"]
    assert len(numbers) == 5
    assert all(math.isnan(v) for v in numbers.values())
    record, output = as_pair(pair(0))
    record["patch_labels"][:] = -1
    numbers = evaluate([(record, output)])["patches"]
    assert math.isnan(numbers["IoU"])
    assert math.isnan(numbers["IoU>70"])
    assert not math.isnan(numbers["score-accuracy"])


def test_reset_forgets():
    evaluator = PatchMaskEvaluator("toy")
    evaluator.process(*([part] for part in as_pair(pair(0))))
    evaluator.reset()
    evaluator.process(*([part] for part in as_pair(pair(1))))
    assert evaluator.evaluate() == evaluate([as_pair(pair(1))])


def test_little_is_kept():
    """Numbers per patch: no mask, no logits, nor views that keep them alive."""
    evaluator = PatchMaskEvaluator("toy")
    evaluator.process(*([part] for part in as_pair(pair(0, patches=8))))
    for ious, right in evaluator._images.values():
        assert (ious.shape, right.shape) == ((4,), (8,))
        assert ious.base is None or ious.base.nbytes <= 4 * 8
        assert right.base is None or right.base.nbytes <= 8


@pytest.mark.parametrize(
    ("where", "key", "value", "message"),
    [
        (0, "patch_masks", None, "image 3: the input has no patch_masks"),
        (0, "patch_labels", None, "image 3: the input has no patch_labels"),
        (1, "patch_logits", None, "image 3: the output has no patch_logits"),
        (1, "patch_logits", torch.zeros(4, 5, 5), r"image 3: patch_logits \(4, 5, 5\)"),
        (1, "patch_scores", torch.zeros(4, 1), r"image 3: .*patch_scores \(4, 1\)"),
        (1, "patch_scores", torch.full((4,), torch.nan), "image 3: .*NaN"),
        (1, "patch_logits", torch.full((4, SIDE, SIDE), torch.inf), "image 3: .*NaN/inf"),
    ],
)
def test_bad_patches_name_the_image(where, key, value, message):
    parts = as_pair(pair(3))
    if value is None:
        del parts[where][key]
    else:
        parts[where][key] = value
    with pytest.raises(ValueError, match=message):
        evaluate([parts])


def test_from_config_with_the_mapper(register, tmp_path):
    """A name in TEST.EVALUATORS makes the mapper give what the evaluator reads."""
    Image.new("RGB", (80, 60), (9, 9, 9)).save(tmp_path / "a.png")
    polygon = [10, 10, 60, 10, 60, 50, 10, 50]
    record = {
        "file_name": str(tmp_path / "a.png"),
        "image_id": 1,
        "height": 60,
        "width": 80,
        "annotations": [{"segmentation": [polygon], "category_id": 0}],
    }
    name = register([record])
    cfg = get_cfg()
    cfg.INPUT.MAPPER = "DeepMaskPatchMapper"
    cfg.TEST.EVALUATORS = ("PatchMaskEvaluator",)
    evaluator = build_evaluator(cfg, name)
    assert isinstance(evaluator, PatchMaskEvaluator)
    mapped = build_mapper(cfg, False)(record)
    output = {
        "patch_logits": mapped["patch_masks"].float(),
        "patch_scores": mapped["patch_labels"].float(),
    }
    evaluator.process([mapped], [output])
    assert set(evaluator.evaluate()["patches"].values()) == {100}


def evaluate_on_rank(rank, folder):
    """One of two processes; the image in the middle goes to both."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    results = evaluate([as_pair(pair(k)) for k in (range(4), range(3, 7))[rank]])
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(results, file)
    torch.distributed.destroy_process_group()


def test_ranks(tmp_path):
    """Two processes give what one gives; only the main one has numbers."""
    expected = evaluate([as_pair(pair(k)) for k in range(7)])
    assert expected != evaluate([as_pair(pair(k)) for k in range(4)])
    mp.start_processes(evaluate_on_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    assert json.loads((tmp_path / "0.json").read_text())["patches"] == pytest.approx(
        expected["patches"]
    )
    assert (tmp_path / "1.json").read_text() == "{}"
