"""dev/experiments/spectral_*.py: the features are as they are said to be, the scripts run small."""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image

from unseg.config import load_config
from unseg.data.datasets.synthetic import register_synthetic
from unseg.discovery.spectral import SpectralSettings, segment

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def importable(folder):
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


with importable(ROOT / "dev/experiments"):
    import spectral_ablation as ablation
    import spectral_discoverers as discoverers
    import spectral_features as features
    import spectral_figures as figures
    from runner import ExperimentError

RECIPE = features.FeatureRecipe()


@pytest.fixture(scope="module")
def scene():
    """A scene of seed 101."""
    return next(features.patch_scenes((24, 28), 101, 1, RECIPE))


def entropy_by_numpy(values):
    counts, _ = np.histogram(values, bins=30)
    share = counts[counts > 0] / counts.sum()
    return -(share * np.log2(share)).sum()


# The features.


def halves(height, width):
    """Background above, two objects below, (3, h, w); the middle row shows both halves."""
    coverage = np.zeros((3, height, width))
    coverage[0, : height // 2] = 1
    coverage[1, height // 2 :, : width // 2] = 1
    coverage[2, height // 2 :, width // 2 :] = 1
    middle = height // 2
    coverage[:, middle] = 0.75 * coverage[:, middle]
    coverage[0, middle] += 0.25
    return coverage


def test_channels_are_of_three_kinds_in_the_given_shares():
    recipe = features.FeatureRecipe(channels=200, signal=0.25, flat=0.1)
    made, kinds = features.make_features(halves(20, 20), recipe, np.random.default_rng(0))
    assert made.shape == (200, 20, 20)
    assert made.dtype == np.float32
    assert np.bincount(kinds).tolist() == [50, 20, 130]
    assert len(np.unique(np.flatnonzero(kinds == 0) % 2)) == 2  # in no order


def test_noisy_channels_have_the_highest_entropy_and_no_signal(scene):
    entropy = np.array([entropy_by_numpy(channel.ravel()) for channel in scene.features])
    by_kind = [entropy[scene.kinds == kind] for kind in range(3)]
    assert by_kind[2].min() > max(by_kind[0].max(), by_kind[1].max())
    assert by_kind[2].min() > np.log2(30) - 0.1
    values = scene.features[scene.kinds == 2].reshape(RECIPE.counts()[2], -1)
    assert values.std(axis=1) == pytest.approx(RECIPE.noisy, abs=0.1)
    # Differences of two objects' means are what chance makes them: a standard score of 1.
    first, second = np.unique(scene.labels[scene.labels > 0])[:2]
    one, other = (values[:, scene.labels.ravel() == n] for n in (first, second))
    scale = RECIPE.noisy * np.sqrt(1 / one.shape[1] + 1 / other.shape[1])
    assert np.std((one.mean(1) - other.mean(1)) / scale) == pytest.approx(1, abs=0.2)


def test_flat_channels_hardly_vary_and_carry_little(scene):
    deviation = scene.features.std(axis=(1, 2))
    difference = figures.instance_differences(scene.features, scene.labels)
    signal, flat = (scene.kinds == kind for kind in (0, 1))
    assert deviation[flat].max() < 0.6 * deviation[signal].min()
    assert difference[flat].mean() < 0.2 * difference[signal].mean()
    # The deviation that the recipe states, of rare peaks: the median is far below it.
    recipe = features.FeatureRecipe(channels=400, signal=0.0, flat=1.0, flat_signal=0.0)
    made, _ = features.make_features(halves(60, 60), recipe, np.random.default_rng(1))
    spread = made - np.median(made, axis=(1, 2), keepdims=True)
    assert np.sqrt(np.mean(spread**2)) == pytest.approx(recipe.flat_noise, rel=0.05)
    assert np.median(np.abs(spread)) < 0.1 * recipe.flat_noise


def test_signal_lies_in_a_subspace_and_mixes_by_area():
    recipe = features.FeatureRecipe(channels=64, signal=1.0, flat=0.0, noise=0.0, rank=2)
    coverage = halves(12, 12)
    made, _ = features.make_features(coverage, recipe, np.random.default_rng(3))
    background, left, right = made[:, 0, 0], made[:, 11, 0], made[:, 11, 11]
    np.testing.assert_allclose(made[:, 6, 0], 0.25 * background + 0.75 * left, atol=1e-6)
    np.testing.assert_allclose(made[:, 6, 11], 0.25 * background + 0.75 * right, atol=1e-6)
    assert np.linalg.matrix_rank(made.reshape(64, -1), tol=1e-4) == 2


def test_deviations_of_the_signal_are_the_recipes():
    recipe = features.FeatureRecipe(channels=400, signal=1.0, flat=0.0, rank=200)
    between, around, noise = [], [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        coverage = np.zeros((41, 41, 10))  # a row of patches each
        coverage[np.arange(41), np.arange(41)] = 1
        made, _ = features.make_features(coverage, recipe, rng)
        means = made.mean(axis=2)  # (C, 41)
        between.append(np.mean((means[:, 1:].mean(1) - means[:, 0]) ** 2) ** 0.5)
        around.append(means[:, 1:].std(axis=1, ddof=1).mean())
        noise.append(made.std(axis=2, ddof=1).mean())
    assert np.mean(between) == pytest.approx(2 * recipe.foreground, rel=0.1)
    # A tenth of the noise's variance is left in means of ten patches.
    expected = np.sqrt(recipe.instance**2 + recipe.noise**2 / 10)
    assert np.mean(around) == pytest.approx(expected, rel=0.05)
    assert np.mean(noise) == pytest.approx(recipe.noise, rel=0.05)


def test_coverage_by_counting():
    masks = np.zeros((2, 8, 12), bool)
    masks[0, :4, :6] = True  # patch (0, 0) whole, half of (0, 1)
    masks[1, 7, 11] = True  # a sixteenth of (1, 2)
    coverage = features.patch_coverage(masks, (2, 3))
    np.testing.assert_array_equal(coverage[1], [[1, 0.5, 0], [0, 0, 0]])
    np.testing.assert_array_equal(coverage[2], [[0, 0, 0], [0, 0, 1 / 16]])
    np.testing.assert_array_equal(coverage.sum(axis=0), np.ones((2, 3)))


def test_scenes_are_fresh_for_each_seed_and_repeat():
    def scenes(seed):
        return list(features.patch_scenes((16, 20), seed, 3, RECIPE))

    first, again, other = scenes(5), scenes(5), scenes(6)
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a.features, b.features)
        np.testing.assert_array_equal(a.labels, b.labels)
    assert all((a.labels != b.labels).any() for a, b in zip(first, other))
    assert all(2 <= s.num_objects <= 5 for s in first + other)


# The ablation.


def test_arms_are_the_papers():
    def switches(arm):
        s = ablation.arm_settings(arm)
        return s.ncr.enabled, s.dcr.enabled, s.affinity, s.background

    assert switches("baseline") == (False, False, "dot", "quotient")
    assert switches("ncr") == (True, False, "dot", "quotient")
    assert switches("ncr_dcr") == (True, True, "dot", "quotient")
    assert switches("ncr_boc_reference") == (True, False, "boc", "reference")
    assert switches("full") == (True, True, "boc", "quotient")
    assert switches("affinity_l1") == (True, True, "l1", "quotient")
    assert ablation.arm_settings("auto") == SpectralSettings()
    told = {arm for arm in ablation.TITLES if arm not in ("auto", "bound")}
    assert told == set(ablation.ARMS)
    assert all(ablation.arm_settings(arm).clusters.mode == "oracle" for arm in told)


def test_inner_products_have_one_row_because_nothing_is_lost(scene):
    x = torch.from_numpy(scene.features)
    for arm in ("baseline", "ncr", "ncr_dcr"):
        quotient = ablation.arm_settings(arm)
        reference = replace(quotient, background="reference")
        one, other = (segment(x, s, scene.num_objects) for s in (quotient, reference))
        assert torch.equal(one.labels, other.labels)


def test_lost_vectors_are_counted(scene):
    numbers = ablation.score_scene(scene, "full_reference")
    x = torch.from_numpy(scene.features)
    found = segment(x, ablation.arm_settings("full_reference"), scene.num_objects)
    zero = [not vector.numpy().any() for vector in found.embedding]
    assert numbers["lost"] == sum(zero) == figures.lost_vectors(found)
    assert ablation.score_scene(scene, "full")["lost"] == 0
    assert numbers["true K"] == len(set(scene.labels.ravel().tolist())) - 1


def test_bound_is_right_where_there_is_no_noise():
    recipe = features.FeatureRecipe(noise=0.0)
    scene = next(features.patch_scenes((24, 28), 101, 1, recipe))
    assert ablation.score_bound(scene)["mIoU"] > 90
    assert ablation.score_bound(scene)["K"] == scene.num_objects


def test_means_leave_out_what_is_missing():
    scores = [{"a": 1.0, "b": float("nan")}, {"a": 3.0, "b": 5.0}]
    assert ablation.average(scores) == {"a": 2.0, "b": 5.0}
    assert ablation.average(scores[:1]) == {"a": 1.0, "b": None}


def test_ablation_runs_small_and_tables_have_all_arms(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["spectral_ablation.py", *map(str, arguments)])
        ablation.main()

    grid = ("--grids", "12x12", "--seeds", "1", "--scenes", "2", "--output", tmp_path)
    # What the steps' commands do, here without new processes.
    done = []
    monkeypatch.setattr(
        ablation.Experiment, "run", lambda self, steps: done.extend(s.words() for s in steps)
    )
    monkeypatch.setattr(ablation, "tables", lambda args: {})
    run(*grid)
    monkeypatch.undo()
    assert len(done) == 2
    for words in done:
        assert words[0] == "dev/experiments/spectral_ablation.py"
        run(*words[1:])
    monkeypatch.setattr(ablation.Experiment, "run", lambda self, steps: None)
    capsys.readouterr()
    run(*grid)
    printed = capsys.readouterr().out
    table = (tmp_path / "12x12/table.md").read_text()
    affinities = (tmp_path / "12x12_affinities/table.md").read_text()
    assert table in printed + "\n"
    assert affinities in printed + "\n"
    for title in ablation.TITLES.values():
        assert f"| {title} | 1 |" in table
    for title in ablation.AFFINITY_TITLES.values():
        assert f"| {title} | 1 |" in affinities
    numbers = json.loads((tmp_path / "12x12/results.json").read_text())["numbers"]
    scores = json.loads((tmp_path / "12x12_seed1.json").read_text())
    assert len(scores["full"]) == 2
    mean = np.mean([one["mIoU"] for one in scores["full"]])
    assert numbers["full"]["1"]["mIoU"] == pytest.approx(mean)


# The discoverers.


@pytest.mark.parametrize("data", discoverers.DATA_SETS)
def test_discoverers_commands(data, tmp_path):
    made = discoverers.steps(tmp_path, data, "NAME", list(discoverers.ARMS), ["SEED", "7"])
    assert len(made) == 2 * sum(data in arm for arm in discoverers.ARMS.values())
    names = []
    for find in made[::2]:
        words = find.words()
        assert words[:3] == ["-m", "unseg.tools.pseudo_masks", "--config-file"]
        place = words.index("--output")
        cfg = load_config(str(ROOT / words[3]), words[place + 2 :])
        assert cfg.SEED == 7
        assert cfg.DISCOVERY.IN_FEATURE == "filter_bank"
        if data == "coco":
            assert cfg.INPUT.MIN_SIZE_TEST == 320
            assert cfg.MODEL.FILTER_BANK.BANDWIDTH == 1.4
        spectral = cfg.MODEL.META_ARCHITECTURE == "DeepSpectral"
        names.append("DeepSpectral" if spectral else cfg.DISCOVERY.NAME)
    assert names[:4] == ["FreeMask", "TokenCut", "MaskCut", "DeepSpectral"]
    assert set(discoverers.TITLES) == set(discoverers.ARMS)


def test_discoverers_run_small(tmp_path, monkeypatch, capsys):
    name = "test_spectral_experiments_scenes"
    register_synthetic(name, seed=9, count=2)
    pseudo = tmp_path / "scenes/deep_spectral.json"
    # The tools have tests of their own: the step's files are put where they would leave them.
    (tmp_path / "scenes").mkdir()
    records = DatasetCatalog.get(name)
    annotations = [{"id": k} for k in range(3)]
    pseudo.write_text(json.dumps({"images": [{}] * len(records), "annotations": annotations}))
    numbers = {"segm": {"AP50": 10.0, "AP": 5.0, "AR@100": 20.0}, "bbox": {"AP50": None}}
    pseudo.with_name("deep_spectral_numbers.json").write_text(
        json.dumps(numbers | {"bbox": {"AP50": 11.0}})
    )
    monkeypatch.setattr(discoverers.Step, "words", lambda self: ["-c", "pass"])
    arguments = ("--data", "scenes", "--scenes", name, "--arms", "deep_spectral")
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--output", str(tmp_path)])
    discoverers.main()
    printed = capsys.readouterr().out
    assert "| DeepSpectral | 1 | 10.0 | 5.00 | 20.0 | 11.0 | 1.50 |" in printed
    monkeypatch.setattr(discoverers.Step, "words", lambda self: ["-c", "exit(3)"])
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--output", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="exit status 3"):
        discoverers.main()
    assert issubclass(ExperimentError, RuntimeError)


# The figures.


def test_difference_between_instances_by_hand():
    labels = np.array([[0, 1, 1], [2, 2, 5]])
    x = np.array([[[9.0, 1, 3], [4, 6, 10]], [[7.0, 1, 1], [1, 1, 1]]])
    # Means 2, 5 and 10: differences 3, 8 and 5.
    np.testing.assert_allclose(figures.instance_differences(x, labels), [16 / 3, 0])
    np.testing.assert_allclose(figures.deviations(x), [np.std(x[0]), np.std(x[1])])


def test_lost_vectors_by_hand(scene):
    x = torch.from_numpy(scene.features)
    found = segment(x, ablation.arm_settings("full"), scene.num_objects)
    maps = torch.zeros(4, 3, 3)
    maps[1, 0, 0], maps[3, 2, 2] = 0.5, -0.5
    assert figures.lost_vectors(replace(found, embedding=maps)) == 2
    assert figures.lost_vectors(replace(found, embedding=None)) == 0


def test_figures_are_drawn(tmp_path, monkeypatch, capsys):
    pytest.importorskip("skimage")
    monkeypatch.setattr(figures, "SCENE_GRID", (16, 16))
    monkeypatch.setitem(figures.OVERRIDES, "INPUT.MIN_SIZE_TEST", 128)
    words = ("--output", tmp_path, "--photographs", "rocket", "--scenes", 2)
    monkeypatch.setattr(sys, "argv", ["spectral_figures.py", *map(str, words)])
    figures.main()
    printed = capsys.readouterr().out
    for name in ("channels", "deviation", "eigenvectors", "background"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) > 80
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 30
        assert f"{name}.png" in printed
    assert "rocket, as published: " in printed
