"""dev/experiments/proposals.py: what is measured, the steps, and a run of two iterations."""

import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode, Instances
from pycocotools import mask as mask_util

from unseg.config import load_config
from unseg.data.datasets.synthetic import register_synthetic
from unseg.engine import main as train
from unseg.modeling.proposals.instance_fcn_head import InstanceFCNHead, LevelMaps
from unseg.modeling.proposals.instance_fcn_losses import WindowTraining
from unseg.modeling.proposals.instance_fcn_windows import WindowLevel
from unseg.structures import encode_masks
from unseg.tools import pseudo_masks

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def importable(folder):
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


with importable(ROOT / "dev/experiments"):
    import proposal_measures as measures
    import proposal_windows as windows
    import proposals
    import runner
    from runner import ExperimentError


def tiny_deepmask(**test):
    words = [x for key, value in test.items() for x in (f"MODEL.DEEPMASK.TEST.{key}", value)]
    return load_config(str(proposals.DEEPMASK), ["MODEL.DEVICE", "cpu", *words])


# Sliding windows.


def slow_discs(size, scales, side, stride):
    """Discs of 128 / 224 of the windows' sides, by looking at each pixel, without empty ones."""
    height, width = size
    longest = math.ceil(side * 128 / 224)
    found = []
    for scale in scales:
        rows, columns = (round(2**scale * n) for n in size)
        y_factor, x_factor = height / rows, width / columns
        for y in range(0, rows + stride, stride):  # the last one is beyond all pixels' edges
            for x in range(0, columns + stride, stride):
                disc = np.zeros(size, bool)
                for i in range(height):
                    for j in range(width):
                        dx = (j + 0.5 - x * x_factor) / (longest * x_factor / 2)
                        dy = (i + 0.5 - y * y_factor) / (longest * y_factor / 2)
                        disc[i, j] = dx * dx + dy * dy <= 1
                if disc.any():
                    found.append(disc)
    return found


def test_sliding_windows_are_the_pyramids():
    size, scales = (40, 56), (-1.0, 0.5)
    cfg = tiny_deepmask(SCALES=scales)
    found = measures.sliding_proposals(cfg, size, 8, np.random.default_rng(3))
    expected = slow_discs(size, scales, 64, 8)
    assert sorted(m.tobytes() for m in found.pred_masks.to_dense().bool().numpy()) == sorted(
        m.tobytes() for m in expected
    )
    assert (found.scores[:-1] > found.scores[1:]).all()


def test_sliding_windows_are_a_random_thousand():
    cfg = tiny_deepmask()
    one, again, other = (
        measures.sliding_proposals(cfg, (160, 160), 8, np.random.default_rng(s)) for s in (1, 1, 2)
    )
    assert len(one) == len(other) == 1000
    boxes = [p.pred_masks.box for p in (one, again, other)]
    assert torch.equal(boxes[0], boxes[1])
    assert not torch.equal(boxes[0], boxes[2])
    # Of all sizes from the beginning: 26 to 74 pixels, where the border does not cut.
    sides = (boxes[0][:40, 2:] - boxes[0][:40, :2]).amax(dim=1)
    assert sides.min() <= 28
    assert sides.max() >= 50


# Touching objects.


def squares(*corners, size=(40, 60)):
    masks = np.zeros((len(corners), *size), bool)
    for mask, (x, y, side) in zip(masks, corners):
        mask[y : y + side, x : x + side] = True
    return masks


@pytest.fixture
def scene(register):
    """Squares of 10 pixels: two that touch, and one alone."""
    masks = squares((5, 5, 10), (15, 5, 10), (40, 20, 10))
    annotations = [
        {
            "bbox": list(mask_util.toBbox(rle)),
            "bbox_mode": BoxMode.XYWH_ABS,
            "segmentation": rle,
            "area": 100,
            "category_id": 0,
            "iscrowd": 0,
            "touching": touching,
        }
        for rle, touching in zip(encode_masks(masks), (True, True, False))
    ]
    record = {"file_name": "x", "image_id": 7, "height": 40, "width": 60}
    name = register([record | {"annotations": annotations}], "toy_scene", thing_classes=["x"])
    yield name, masks
    DatasetCatalog.remove(f"{name}_touching_only")


def test_only_touching_objects_count(scene):
    name, masks = scene
    # The isolated one, then one of the two; one pixel; at last the other one.
    order = np.concatenate([masks[2:], masks[:1], squares((0, 0, 1)), masks[1:2]])
    proposals = Instances((40, 60), pred_masks=torch.from_numpy(order))
    proposals.scores = torch.tensor([0.9, 0.8, 0.7, 0.6])

    def numbers(count):
        propose = lambda: iter([({"image_id": 7}, proposals[:count])])  # noqa: E731
        return measures.measure_recall(name, propose)

    found = numbers(1)
    assert found["AR@1"] == pytest.approx(100 / 3)
    assert found["touching AR@10"] == 0
    found = numbers(3)
    assert found["AR@10"] == found["box AR@100"] == pytest.approx(200 / 3)
    assert found["touching AR@10"] == found["touching AR@100"] == pytest.approx(50)
    found = numbers(4)
    assert found["AR@1"] == pytest.approx(100 / 3)
    assert found["AR@1000"] == found["touching AR@100"] == pytest.approx(100)
    (record,) = DatasetCatalog.get(name)
    assert [a["iscrowd"] for a in record["annotations"]] == [0, 0, 0]  # the original is as it was


# Windows.


def test_foreign_cells_by_hand():
    cells = torch.zeros((2, 3, 2, 4), dtype=torch.bool)
    cells[:, 0, :, 0] = True  # two cells each of the first and the second object, one of the third
    cells[:, 1, :, 1] = True
    cells[:, 2, 0, 3] = True
    found = torch.zeros((2, 2, 4), dtype=torch.bool)
    found[0, 0, :] = True  # one of 0, one of 1, background, the one of 2
    found[1, :, 1] = True
    iou, foreign = windows.score_masks(found, cells, torch.tensor([0, 1]))
    assert iou.tolist() == pytest.approx([1 / 5, 1])
    assert foreign.tolist() == pytest.approx([2 / 3, 0])
    _, foreign = windows.score_masks(found[:1], cells[:1, :1], torch.tensor([0]))
    assert foreign.isnan().all()


def test_cells_of_objects_by_hand():
    masks = torch.from_numpy(squares((0, 0, 4), (6, 2, 4), size=(12, 12)))
    boxes = torch.tensor([[-4.0, -4, 8, 8], [4, 0, 10, 6]])
    cells = windows.cells_of_objects(masks, boxes, 3)  # of 4 pixels, and of 2
    first, second = (torch.zeros((2, 3, 3), dtype=torch.bool) for _ in range(2))
    first[0, 1, 1] = True  # the other square has half of its cell at most
    second[1, 1:, 1:] = True
    assert torch.equal(cells, torch.stack([first, second]))


def slow_window_scores(labels, boxes, foreground, m, stride, size):
    """IoU and foreign share around the cells whose windows hold one of the first two objects.

    labels: (h, w), which object a cell is of, -1 for none; foreground: the mask in all windows.
    """
    side = labels.shape[0]
    scores = []
    for y in range(side):
        for x in range(side):
            fits = []
            for number, (x0, y0, x1, y1) in enumerate(boxes):
                dx = abs(stride * x + stride / 2 - (x0 + x1) / 2)
                dy = abs(stride * y + stride / 2 - (y0 + y1) / 2)
                octaves = abs(math.log2(max(x1 - x0, y1 - y0) / size))
                if max(dx, dy) <= 40 * size / 128 and octaves <= 0.3:
                    fits.append((dx * dx + dy * dy, number))
            if not fits or min(fits)[1] > 1:
                continue
            own, r = min(fits)[1], m // 2
            count = dict.fromkeys(("both", "either", "taken", "there"), 0)
            for i in range(max(y - r, 0), min(y + r + 1, side)):
                for j in range(max(x - r, 0), min(x + r + 1, side)):
                    label, found = labels[i, j], foreground[i, j]
                    count["both"] += found and label == own
                    count["either"] += found or label == own
                    count["there"] += label >= 0 and label != own
                    count["taken"] += found and label >= 0 and label != own
            there = count["there"]
            iou = count["both"] / count["either"]
            scores.append((iou, count["taken"] / there if there else float("nan")))
    return scores


def test_positive_windows_of_touching_objects():
    """k = 1 on two squares of 20 pixels that touch and one that is apart, in cells of 4."""
    stride, m, size = 4, 7, 20.0
    masks = squares((4, 8, 20), (24, 12, 20), (52, 52, 24), size=(80, 80))
    boxes = torch.tensor([[4.0, 8, 24, 28], [24, 12, 44, 32], [52, 52, 76, 76]])
    labels = np.full((20, 20), -1)
    for number, mask in enumerate(masks):
        labels[mask[::stride, ::stride]] = number
    rng = np.random.default_rng(0)
    foreground = (labels >= 0) ^ (rng.random(labels.shape) < 0.1)
    logits = torch.from_numpy(np.where(foreground, 3.0, -3.0)).float()[None, None]
    level = WindowLevel(stride, stride / 2, size)
    training = WindowTraining(pos_shift=40.0, neg_shift=80.0)  # several windows for each object
    head = InstanceFCNHead(
        in_features=["p2"], in_channels=1, levels=[level], k=1, m=m, hidden=1, training=training
    )
    maps = [LevelMaps(logits, logits[:, 0])]
    chosen = torch.tensor([True, True, False])
    found = windows.positive_windows(head, maps, (80, 80), torch.from_numpy(masks), boxes, chosen)
    ((iou, foreign),) = found
    expected = np.array(slow_window_scores(labels, boxes.tolist(), foreground, m, stride, size))
    assert len(expected) > 10
    np.testing.assert_allclose(iou.numpy(), expected[:, 0])
    np.testing.assert_allclose(foreign.numpy(), expected[:, 1])
    # The same scene at half its size is the same windows' at twice the scale.
    small = torch.from_numpy(masks[:, ::2, ::2].copy())
    ((again, _),) = windows.positive_windows(head, maps, (80, 80), small, boxes / 2, chosen)
    torch.testing.assert_close(again, iou)


# Steps.


def config_of(step):
    words = step.words()
    place = words.index("--config-file") + 1
    rest = [w for w in words[place + 1 :] if w != "--resume"]
    while rest and rest[0].startswith("--"):
        rest = rest[2:]
    return load_config(str(ROOT / words[place]), [*rest, "MODEL.DEVICE", "cpu"])


def test_steps_and_their_settings(tmp_path):
    plan = proposals.Plan(tmp_path, "TRAIN", "TEST", list(proposals.ARMS), ["SOLVER.MAX_ITER", "9"])
    steps = {step.name: step for step in plan.steps([1, 2, 2])}
    networks = [name for name, arm in proposals.ARMS.items() if arm.labels != "none"]
    # Free masks of both sets and their numbers; windows; training and numbers.
    assert len(steps) == 3 + 2 * (1 + 2 * len(networks))
    runner._check(list(steps.values()))
    for seed in (1, 2):
        for name in networks:
            training, measured = steps[f"seed{seed}_{name}_training"], steps[f"seed{seed}_{name}"]
            cfg, tested = config_of(training), config_of(measured)
            assert seed == cfg.SEED
            assert cfg.SOLVER.MAX_ITER == 9
            assert cfg.DATASETS.TEST == ()
            assert measured.needs == [training.name]
            assert (measured.arm, measured.seed) == (name, seed)
            assert f"{cfg.OUTPUT_DIR}/model_final.pth" == tested.MODEL.WEIGHTS
            assert tested.MODEL.INSTANCE_FCN.K == cfg.MODEL.INSTANCE_FCN.K
            free = name.endswith("free")
            file = f"{tmp_path}/free_masks_train.json@TRAIN"
            assert ((file,) if free else ("TRAIN",)) == cfg.DATASETS.TRAIN
            assert ("free_masks_train" in training.needs) == free
    sharp = steps["seed2_sharpmask_training"]
    assert sharp.needs == ["seed2_deepmask_training"]
    assert config_of(sharp).MODEL.WEIGHTS == config_of(steps["seed2_deepmask"]).MODEL.WEIGHTS
    heads = [config_of(steps[f"seed1_{name}"]).MODEL.DEEPMASK.HEAD for name in networks[:3]]
    assert heads == ["shared", "paper", "full"]
    for k in (1, 3, 5, 7):
        assert k == config_of(steps[f"seed1_instance_fcn_k{k}_training"]).MODEL.INSTANCE_FCN.K
    assert {name for step in steps.values() for name in step.needs} <= steps.keys()


def test_crop_training_is_about_the_same_windows(tmp_path):
    plan = proposals.Plan(tmp_path, "A", "B", ["instance_fcn_k5", "instance_fcn_crop"], [])
    names = ("seed1_instance_fcn_k5_training", "seed1_instance_fcn_crop_training")
    steps = {step.name: step for step in plan.steps([1])}
    whole, crop = (config_of(steps[name]) for name in names)
    node, patch = crop.MODEL.INSTANCE_FCN, crop.MODEL.DEEPMASK
    assert patch.INPUT_SIZE == node.M * 4
    assert round(patch.INPUT_SIZE / 1.3125) == patch.OBJECT_SIZE
    factor = patch.INPUT_SIZE / 1.3125 / 128
    assert pytest.approx(node.POS_SHIFT * factor, rel=0.01) == patch.DATA.JITTER_SHIFT
    assert pytest.approx(node.NEG_SHIFT * factor, rel=0.01) == patch.DATA.NEG_SHIFT
    assert patch.DATA.JITTER_SCALE == node.POS_SCALE_OCT
    assert patch.DATA.NEG_SCALE == node.NEG_SCALE_OCT
    pixels = sum(side**2 for side in whole.INPUT.MIN_SIZE_TRAIN) / 3 * whole.SOLVER.IMS_PER_BATCH
    patches = crop.SOLVER.IMS_PER_BATCH * patch.DATA.PATCHES_PER_IMAGE
    assert patches * (patch.INPUT_SIZE + patch.CONTEXT) ** 2 == pytest.approx(pixels, rel=0.1)
    for one in (whole, crop):
        one.defrost()
        one.MODEL.DEEPMASK = one.MODEL.INSTANCE_FCN.TRAIN_ON = one.INPUT.MAPPER = one.OUTPUT_DIR = 0
    assert whole == crop  # nothing else differs


def test_arms_bring_what_they_need(tmp_path):
    def names(*arms):
        plan = proposals.Plan(tmp_path, "A", "B", arms, [])
        return [step.name for step in plan.steps([4])]

    assert names("sharpmask") == [
        "seed4_deepmask_training",
        "seed4_deepmask",
        "seed4_sharpmask_training",
        "seed4_sharpmask",
    ]
    assert names("sliding") == ["seed4_sliding"]
    assert names("free_masks") == ["free_masks_test", "seed0_free_masks"]
    assert names("deepmask_free")[0] == "free_masks_train"


def test_seconds_of_a_training(tmp_path):
    lines = [{"iteration": 19, "time": 1.0}, {"iteration": 39, "time": 3.0}, {"iteration": 39}]
    lines += [{"iteration": 39, "time": 2.0}]  # resumed at 20
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    assert proposals.training_seconds(tmp_path) == 80.0
    (tmp_path / "metrics.json").write_text(json.dumps({"iteration": 1}))
    assert math.isnan(proposals.training_seconds(tmp_path))


def test_tables_by_topic(tmp_path):
    numbers = {"AR@1": 1.0, "AR@10": 2.0, "touching AR@10": 3.0}
    results = {"sliding": {1: numbers}, "deepmask": {1: numbers | {"M parameters": 4.0}}}
    results["instance_fcn_k1"] = {1: numbers | {"foreign": 50.0, "window IoU": None}}
    made = proposals.tables(tmp_path, results, {})
    assert list(made) == ["recall", "touching", "cost"]
    assert made["recall"].splitlines()[2] == "| sliding windows | 1 | 1.00 | 2.00 |"
    assert "| InstanceFCN, k = 1 | 1 | 3.00 | – | 50.0 |" in made["touching"]
    assert "| sliding windows | 1 | 3.00 | – | – |" in made["touching"]
    assert "| DeepMask | 1 | 4.00 |" in made["cost"]
    assert "sliding" not in made["cost"]
    assert (tmp_path / "touching/plot.png").exists()


# All of it.

SMALL = {
    "SOLVER.MAX_ITER": 2,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.WARMUP_ITERS": 1,
    "MODEL.DEEPMASK.TEST.TOPK": 20,
    "MODEL.INSTANCE_FCN.TEST.TOPK": 20,
}


def test_a_run_of_two_iterations(tmp_path, monkeypatch, capsys):
    name = "test_proposal_experiments_scenes"
    register_synthetic(name, "touching", seed=9, count=2)

    def run_here(words, **_):
        """Instead of a process that would not know the data set."""
        _, program, *rest = words
        mains = {"dev/experiments/proposal_measures.py": measures.main, "-m": pseudo_masks.main}
        if program.endswith("train_net.py"):
            train(rest)
        else:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", [program, *rest] if program != "-m" else rest)
                mains[program]()
        return subprocess.CompletedProcess(words, 0)

    here = SimpleNamespace(run=run_here, DEVNULL=None, STDOUT=None)
    monkeypatch.setattr(runner, "subprocess", here)
    monkeypatch.chdir(ROOT)  # where steps are run
    words = [str(x) for item in SMALL.items() for x in item]
    arms = ("sliding", "deepmask", "instance_fcn_crop", "free_masks", "instance_fcn_free")
    arguments = ["--train", name, "--data", name, "--seeds", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--arms", *arms, "--", *words])
    proposals.main()
    printed = capsys.readouterr().out
    for arm in arms:
        assert f"| {proposals.ARMS[arm].title} | 1 |" in printed
    numbers = json.loads((tmp_path / "cost/results.json").read_text())["numbers"]
    assert numbers["deepmask"]["1"]["ms/image"] > 0
    files = {
        arm: json.loads((tmp_path / f"seed{int(arm != 'free_masks')}_{arm}.json").read_text())
        for arm in arms
    }
    for arm in ("instance_fcn_crop", "instance_fcn_free"):
        assert {"window IoU", "foreign"} <= files[arm].keys()
    assert files["free_masks"].keys() == files["sliding"].keys()
    assert files["deepmask"].keys() == files["sliding"].keys() | {"M parameters", "ms/image"}
    weights = torch.load(tmp_path / "seed1/deepmask/model_final.pth", weights_only=True)["model"]
    parameters = sum(x.numel() for key, x in weights.items() if "pixel_" not in key)
    assert files["deepmask"]["M parameters"] == pytest.approx(parameters / 1e6)
    proposals.main()  # everything is done already
    assert "== " not in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--", *words[:-2]])
    with pytest.raises(SystemExit, match="begun with other settings"):
        proposals.main()
    assert issubclass(ExperimentError, RuntimeError)


def test_free_masks_as_proposals(tmp_path, scene, monkeypatch):
    name, masks = scene
    rles = [rle | {"counts": rle["counts"].decode()} for rle in encode_masks(masks[:2])]
    annotations = [
        {
            "id": n + 1,
            "image_id": 7,
            "category_id": 1,
            "segmentation": rle,
            "score": 0.5,
            "bbox": list(mask_util.toBbox(rle)),
            "area": 100,
            "iscrowd": 0,
        }
        for n, rle in enumerate(rles)
    ]
    image = {"id": 7, "file_name": "x", "height": 40, "width": 60}
    categories = [{"id": 1, "name": "object"}]
    content = {"images": [image], "annotations": annotations, "categories": categories}
    path = tmp_path / "masks.json"
    path.write_text(json.dumps(content))
    words = ["--config-file", proposals.FREE_MASKS, "--data", name, "--masks", path]
    words += ["--write", tmp_path / "numbers.json"]
    monkeypatch.setattr(sys, "argv", ["x", *map(str, words)])
    measures.main()
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["AR@1000"] == pytest.approx(200 / 3)
    assert numbers["touching AR@100"] == pytest.approx(100)
    assert numbers["AR@1"] == pytest.approx(100 / 3)
