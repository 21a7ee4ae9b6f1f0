"""The synthetic renderer: determinism, exact masks, the world's statistics, clips."""

import hashlib
import os
import random
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from unseg.data.datasets.synthetic import (
    PRESETS,
    SceneSettings,
    contact_sheet,
    render_clip,
    render_clip_frame,
    render_scene,
)
from unseg.data.datasets.synthetic.__main__ import main
from unseg.data.datasets.synthetic.catalogue import build_catalogue, frequencies
from unseg.data.datasets.synthetic.layout import sample_scene
from unseg.data.datasets.synthetic.looks import hsv_to_rgb, rgb_to_lab
from unseg.data.datasets.synthetic.presets import HELDOUT_CATEGORIES, SEEN_CATEGORIES
from unseg.data.datasets.synthetic.scene import MIN_PART_PIXELS, Scene, render_plan, scene_rng
from unseg.data.datasets.synthetic.textures import NUM_TEXTURES, TILE, texture_bank

DEFAULT = PRESETS["default"]
STILLS = sorted(name for name, preset in PRESETS.items() if preset.frames == 1)


def digest(*scenes: Scene) -> str:
    sha = hashlib.sha256()
    for scene in scenes:
        for array in vars(scene).values():
            sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def masks_of(preset: SceneSettings, count: int, seed: int = 5) -> list[Scene]:
    return [render_scene(preset, seed, index, with_image=False) for index in range(count)]


# ----------------------------------------------------------------------------- determinism


def test_a_scene_depends_on_settings_seed_and_index_only():
    first = [digest(render_scene(DEFAULT, 5, index)) for index in range(6)]
    backwards = [digest(render_scene(DEFAULT, 5, index)) for index in reversed(range(6))]
    assert first == backwards[::-1]
    others = [
        digest(render_scene(DEFAULT, 6, 0)),
        digest(render_scene(replace(DEFAULT, noise=2.0), 5, 0)),
    ]
    assert len({*first, *others}) == 8


def test_global_random_state_has_no_influence_and_is_left_alone():
    expected = digest(render_scene(DEFAULT, 5, 0))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert digest(render_scene(DEFAULT, 5, 0)) == expected
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_the_number_of_threads_has_no_influence():
    threads = cv2.getNumThreads()
    found = set()
    try:
        for number in (1, 2, 4):
            cv2.setNumThreads(number)
            large = replace(DEFAULT, size=(480, 640))
            found.add(digest(render_scene(DEFAULT, 5, 1), render_scene(large, 5, 1)))
    finally:
        cv2.setNumThreads(threads)
    assert len(found) == 1


def test_another_process_renders_the_same_bits():
    program = (
        "import numpy, sys; numpy.random.seed(9); sys.path.insert(0, sys.argv[1]);"
        "from test_synthetic_scenes import *;"
        "sys.stdout.write(digest(render_scene(DEFAULT, 5, 7), *render_clip(CLIP, 5, 3)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "3"}
    command = [sys.executable, "-c", program, os.path.dirname(__file__)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == digest(render_scene(DEFAULT, 5, 7), *render_clip(CLIP, 5, 3))


def test_masks_are_the_same_without_an_image():
    for index in range(5):
        full = render_scene(DEFAULT, 5, index)
        bare = render_scene(DEFAULT, 5, index, with_image=False)
        assert bare.image is None
        assert digest(replace(full, image=bare.masks)) == digest(replace(bare, image=bare.masks))


# Published numbers on the synthetic sets are about exactly these masks. If this fails although the
# renderer was left alone, a numpy or OpenCV release (or a processor) rounds otherwise: see how many
# pixels differ, and say so where the numbers are. If the renderer was changed on purpose, every
# number measured on synthetic scenes is out of date: measure the tables of the README and of
# projects/ again, then put the digests of the new masks here.
PINNED_MASKS = {
    0: "7efdb24d7a4bee73",
    1: "d6ecf68b47e6aabb",
    2: "08f06dc546e7ce36",
    3: "c10ba37321b68c6e",
}  # seed: its first five default scenes


@pytest.mark.parametrize("seed", PINNED_MASKS)
def test_masks_are_those_of_the_published_numbers(seed):
    sha = hashlib.sha256()
    for scene in masks_of(DEFAULT, 5, seed):
        for array in (scene.masks, scene.part_masks):
            sha.update(repr(array.shape).encode() + np.packbits(array).tobytes())
    assert sha.hexdigest()[:16] == PINNED_MASKS[seed]


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_negative_seeds_and_indices_are_refused(seed, index):
    with pytest.raises(ValueError, match="negative"):
        render_scene(DEFAULT, seed, index)


# ------------------------------------------------------------------------------- exact masks


def check_scene(scene: Scene, preset: SceneSettings) -> None:
    height, width = preset.size
    number = len(scene.masks)
    assert scene.image.shape == (height, width, 3)
    assert scene.image.dtype == np.uint8
    assert scene.masks.shape == (number, height, width)
    assert scene.masks.dtype == bool
    assert scene.categories.shape == scene.order.shape == (number,)
    assert set(scene.categories.tolist()) <= set(preset.allowed_categories)
    assert sorted(scene.order.tolist()) == scene.order.tolist() == list(range(number))
    assert scene.masks.sum(axis=0).max(initial=0) <= 1
    areas = scene.masks.mean(axis=(1, 2))
    assert (areas >= 0.98 * preset.area[0]).all()
    assert (areas <= preset.area[1]).all()
    assert len(scene.part_masks) == len(scene.part_parents) == len(scene.part_categories)
    assert scene.part_masks.sum(axis=0).max(initial=0) <= 1
    for mask, parent in zip(scene.part_masks, scene.part_parents):
        assert mask.sum() >= MIN_PART_PIXELS * preset.unit**2
        assert not (mask & ~scene.masks[parent]).any()
        assert mask.sum() < scene.masks[parent].sum()


@settings(max_examples=40, deadline=None)
@given(
    preset=st.sampled_from(STILLS),
    seed=st.integers(0, 2**40),
    index=st.integers(0, 2**31),
    size=st.sampled_from([(160, 160), (96, 144), (200, 130)]),
)
def test_masks_are_exact_disjoint_and_of_the_promised_size(preset, seed, index, size):
    chosen = replace(PRESETS[preset], size=size)
    check_scene(render_scene(chosen, seed, index), chosen)


def nearest_removed(index: int, preset: SceneSettings) -> tuple[Scene, Scene]:
    """A scene and the same scene without its nearest object, both free of noise."""
    plan = sample_scene(replace(preset, noise=0.0), scene_rng(5, index))
    return render_plan(plan), render_plan(replace(plan, objects=plan.objects[1:]))


def test_the_picture_changes_where_an_object_is_and_nowhere_else():
    preset = replace(DEFAULT, shadow=0.0, strips_in_front=0.0, camouflage=0.0)
    for index in range(12):
        with_it, without = nearest_removed(index, preset)
        changed = (with_it.image != without.image).any(axis=2)
        mask = with_it.masks[0]
        # Anti-aliasing and the lens's blur reach a few pixels over the edge.
        reach = cv2.dilate(mask.view(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
        assert not (changed & ~reach).any()
        assert changed[mask].mean() > 0.97


def test_removing_the_nearest_object_uncovers_the_others():
    uncovered = 0
    for index in range(30):
        with_it, without = nearest_removed(index, replace(DEFAULT, strips_in_front=0.0))
        assert len(without.masks) == len(with_it.masks) - 1
        for before, after in zip(with_it.masks[1:], without.masks):
            assert not (before & ~after).any()
            assert not (after & ~before & ~with_it.masks[0]).any()
            uncovered += int((after & ~before).any())
    assert uncovered >= 5  # occlusion does happen


def test_strips_in_front_cut_the_masks_and_strips_behind_do_not():
    plan = sample_scene(replace(DEFAULT, strips=20.0), scene_rng(5, 0))
    behind = replace(plan, strips=tuple(replace(s, in_front=False) for s in plan.strips))
    front = replace(plan, strips=tuple(replace(s, in_front=True) for s in plan.strips))
    clean = render_plan(replace(plan, strips=()), with_image=False).masks.any(axis=0)
    assert (render_plan(behind, with_image=False).masks.any(axis=0) == clean).all()
    cut = render_plan(front, with_image=False).masks.any(axis=0)
    assert not (cut & ~clean).any()
    assert cut.sum() < clean.sum()


# ---------------------------------------------------------------------- the world's statistics


def test_categories_follow_the_long_tail():
    categories = np.concatenate([scene.categories for scene in masks_of(DEFAULT, 700)])
    expected = frequencies(24, 0.9, tuple(range(24)))
    assert np.allclose(expected[0] / expected, np.arange(1, 25) ** 0.9)
    counts = np.bincount(categories, minlength=24)
    assert chisquare(counts, expected * counts.sum()).pvalue > 1e-3


def test_scenes_hold_about_three_objects_with_parts_and_occlusion():
    scenes = masks_of(DEFAULT, 300)
    objects = np.array([len(scene.masks) for scene in scenes])
    assert objects.min() >= 1
    assert abs(objects.mean() - 3.2) < 0.25
    parts = np.concatenate([np.bincount(s.part_parents, minlength=len(s.masks)) for s in scenes])
    assert parts.max() == 3
    assert (parts >= 1).mean() > 0.9


def test_heldout_categories_never_leak():
    train = np.concatenate([s.categories for s in masks_of(PRESETS["heldout_train"], 200)])
    val = np.concatenate([s.categories for s in masks_of(PRESETS["heldout_val"], 60)])
    assert set(train.tolist()) == set(SEEN_CATEGORIES)
    assert set(val.tolist()) == set(HELDOUT_CATEGORIES)
    assert not set(SEEN_CATEGORIES) & set(HELDOUT_CATEGORIES)
    families = [build_catalogue(24, 0).categories[c].family for c in HELDOUT_CATEGORIES]
    assert sorted(families) == list(range(6))


def test_single_scenes_hold_one_object_near_the_middle():
    for scene in masks_of(PRESETS["single"], 60):
        assert len(scene.masks) == 1
        y, x = np.nonzero(scene.masks[0])
        assert abs(y.mean() - 79.5) < 40
        assert abs(x.mean() - 79.5) < 40


def borders(first: np.ndarray, second: np.ndarray) -> bool:
    grown = cv2.dilate(first.view(np.uint8), cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)))
    return bool((grown.astype(bool) & second).any())


def test_touching_scenes_hold_touching_pairs_of_one_category():
    pairs = 0
    scenes = masks_of(PRESETS["touching"], 60)
    for scene in scenes:
        same = [
            (a, b)
            for a in range(len(scene.masks))
            for b in range(a)
            if scene.categories[a] == scene.categories[b]
        ]
        pairs += any(borders(scene.masks[a], scene.masks[b]) for a, b in same)
    assert pairs > 0.6 * len(scenes)


def appearance(scene: Scene, number: int) -> np.ndarray:
    """Mean and spread of Lab colour, mean gradient, and elongation of one object."""
    mask = scene.masks[number]
    lab = rgb_to_lab(scene.image)[mask]
    grey = scene.image.mean(axis=2)
    gradient = np.stack(np.gradient(grey))[:, mask]
    points = np.stack(np.nonzero(mask)).astype(float)
    shape = np.linalg.eigvalsh(np.cov(points))
    solidity = mask.sum() / cv2.contourArea(cv2.convexHull(points.T.astype(np.int32)))
    return np.array(
        [
            *lab.mean(0),
            *lab.std(0),
            *np.abs(gradient).mean(1),
            np.sqrt(shape[1] / shape[0]),
            solidity,
        ]
    )


def test_categories_can_be_recognised_but_not_perfectly():
    """Nearest neighbours by nine plain numbers: far above chance, far from trivial."""
    world = replace(PRESETS["single"], camouflage=0.0)
    features, labels = [], []
    for index in range(360):
        scene = render_scene(world, 5, index)
        features.append(appearance(scene, 0))
        labels.append(scene.categories[0])
    features = np.array(features)
    features = (features - features.mean(0)) / features.std(0)
    labels = np.array(labels)
    known, asked = slice(0, 260), slice(260, None)
    distance = np.linalg.norm(features[asked, None] - features[None, known], axis=2)
    accuracy = (labels[known][distance.argmin(1)] == labels[asked]).mean()
    assert 0.25 < accuracy < 0.95  # chance is 0.04


def test_contrast_keeps_objects_apart_from_the_background():
    def gap(preset: SceneSettings) -> float:
        gaps = []
        for index in range(40):
            scene = render_scene(preset, 5, index)
            lab = rgb_to_lab(scene.image)
            outside = ~scene.masks.any(axis=0)
            for mask in scene.masks:
                near = cv2.dilate(mask.view(np.uint8), np.ones((15, 15))).astype(bool) & outside
                if near.any():
                    gaps.append(np.linalg.norm(lab[mask].mean(0) - lab[near].mean(0)))
        return float(np.quantile(gaps, 0.15))  # the worst ones

    easy = gap(replace(DEFAULT, camouflage=0.0, contrast=45.0))
    assert easy > 1.4 * gap(replace(DEFAULT, camouflage=1.0))


def test_colour_need_not_tell_the_category():
    def spread(category_colour: float) -> float:
        world = replace(PRESETS["single"], categories=(4,), category_colour=category_colour)
        scenes = [render_scene(world, 5, index) for index in range(30)]
        means = [rgb_to_lab(scene.image)[scene.masks[0]].mean(0) for scene in scenes]
        return float(np.linalg.norm(np.std(means, axis=0)))

    assert spread(0.0) > 1.7 * spread(1.0)


def test_a_larger_scene_shows_the_same_kind_of_picture():
    large = replace(DEFAULT, size=(320, 320))
    scenes = [render_scene(large, 5, index) for index in range(10)]
    for scene in scenes:
        check_scene(scene, large)
    assert len(np.unique(scenes[0].image.reshape(-1, 3), axis=0)) > 5000


def test_scenes_are_neither_flat_nor_noise():
    for index in range(8):
        grey = render_scene(DEFAULT, 5, index).image.mean(axis=2)
        change = np.abs(np.diff(grey, axis=1)).mean()
        assert 1.5 < change < 15  # grey levels from pixel to pixel
        assert grey.std() > 10


# ----------------------------------------------------------------- catalogue, textures, settings


def test_a_smaller_catalogue_is_the_beginning_of_a_larger_one():
    small, large = build_catalogue(12, 3), build_catalogue(60, 3)
    assert small.categories == large.categories[:12]
    assert len(set(large.names)) == 60
    assert build_catalogue(12, 4).categories != small.categories
    for category in large.categories:
        assert 1 <= len(category.slots) <= 3
        assert len({slot.part_class for slot in category.slots}) == len(category.slots)


def test_textures_are_periodic_and_differ():
    bank = texture_bank()
    assert bank.shape == (NUM_TEXTURES, 2 * TILE, 2 * TILE)
    assert (bank[:, :TILE] == bank[:, TILE:]).all()
    tiles = bank[:, :TILE, :TILE].reshape(NUM_TEXTURES, -1).astype(float)
    # Nothing jumps where the tile meets itself.
    seam = np.abs(bank[:, 0].astype(int) - bank[:, TILE - 1]).mean()
    inside = np.abs(np.diff(bank[:, :TILE].astype(int), axis=1)).mean()
    assert seam < 1.5 * inside
    correlation = np.corrcoef(tiles) - np.eye(NUM_TEXTURES)
    assert np.abs(correlation).max() < 0.5
    with pytest.raises(ValueError, match="read-only"):
        bank[0, 0, 0] = 1


def test_colour_conversions():
    assert np.allclose(hsv_to_rgb(1 / 3, 1.0, 1.0), [0, 255, 0])
    assert np.allclose(hsv_to_rgb(7.5, 0.0, 0.5), 127.5)
    rgb = np.random.default_rng(0).uniform(0, 255, (50, 1, 3)).astype(np.float32)
    expected = cv2.cvtColor(rgb / 255, cv2.COLOR_RGB2LAB)
    assert np.abs(rgb_to_lab(rgb) - expected).max() < 0.6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", (16, 160)),
        ("size", (160.5, 160)),
        ("num_categories", 0),
        ("categories", (24,)),
        ("categories", ()),
        ("categories", [1]),
        ("area", (0.2, 0.1)),
        ("area", (0.0, 0.1)),
        ("pairs", 1.5),
        ("camouflage", -0.1),
        ("noise", -1.0),
        ("mean_objects", 0.5),
        ("max_objects", 0),
        ("frames", 0),
    ],
)
def test_settings_that_make_no_scene_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        SceneSettings(**{name: value})


def test_extreme_settings_still_make_scenes():
    crowded = SceneSettings(mean_objects=30.0, max_objects=60, strips=30.0, strips_in_front=1.0)
    bare = SceneSettings(strips=0.0, shading=0.0, shadow=0.0, lighting=0.0, noise=0.0)
    for index in range(3):
        assert len(render_scene(crowded, 5, index).masks) > 4
        check_scene(render_scene(bare, 5, index), bare)


# -------------------------------------------------------------------------------------- clips

CLIP = replace(PRESETS["video"], frames=6)


def test_clips_keep_their_objects():
    for index in range(5):
        frames = render_clip(CLIP, 5, index, with_image=False)
        assert len(frames) == 6
        for scene in frames:
            assert scene.masks.shape == frames[0].masks.shape
            assert (scene.categories == frames[0].categories).all()
            assert scene.masks.sum(axis=0).max(initial=0) <= 1
            for mask, parent in zip(scene.part_masks, scene.part_parents):
                assert not (mask & ~scene.masks[parent]).any()
        seen = np.stack([scene.masks.any(axis=(1, 2)) for scene in frames])
        assert seen[2:4].all()  # laid out between these two


def test_objects_move_a_little_from_frame_to_frame():
    steps = []
    for index in range(6):
        frames = render_clip(CLIP, 5, index, with_image=False)
        for before, after in zip(frames, frames[1:]):
            for first, second in zip(before.masks, after.masks):
                if first.sum() > 100 and second.sum() > 100:
                    union = (first | second).sum()
                    steps.append((first & second).sum() / union)
    assert 0.3 < np.median(steps) < 0.98


def test_objects_leave_the_picture_or_are_hidden():
    fast = replace(PRESETS["video"], speed=4.0)
    empty = [
        not mask.any()
        for index in range(6)
        for scene in render_clip(fast, 5, index, with_image=False)
        for mask in scene.masks
    ]
    assert 0.02 < np.mean(empty) < 0.8


def test_frames_share_the_scene_but_not_the_noise():
    still = replace(CLIP, speed=0.0)
    first, second = (render_clip_frame(still, 5, 0, frame) for frame in (0, 1))
    assert (first.masks == second.masks).all()
    difference = first.image.astype(float) - second.image
    assert 1.0 < difference.std() < 3 * still.noise
    assert digest(render_clip_frame(CLIP, 5, 1, 4)) == digest(render_clip(CLIP, 5, 1)[4])
    with pytest.raises(ValueError, match=r"0\.\.5"):
        render_clip_frame(CLIP, 5, 0, 6)


# --------------------------------------------------------------------------------------- sheet


def test_contact_sheet_shows_scenes_and_outlines():
    plain = contact_sheet(DEFAULT, 5, 2, 5, columns=3, scale=2)
    assert plain.shape == (2 * 320 + 4, 3 * 320 + 8, 3)
    assert (plain[:320:2, :320:2] == render_scene(DEFAULT, 5, 2).image).all()
    assert (plain[324:, 2 * 324 :] == 255).all()
    outlined = contact_sheet(DEFAULT, 5, 2, 5, columns=3, scale=2, with_masks=True)
    assert 0.002 < (outlined != plain).any(axis=2).mean() < 0.2
    assert contact_sheet(CLIP, 5, 0, 1, columns=4).shape == (324, 4 * 164 - 4, 3)
    with pytest.raises(ValueError, match="positive"):
        contact_sheet(DEFAULT, count=0)


def test_command_line_writes_a_sheet(tmp_path, capsys):
    path = tmp_path / "sheet.png"
    main(["--output", str(path), "--preset", "lvis", "--count", "2", "--size", "96", "128"])
    assert cv2.imread(str(path)).shape == (96, 2 * 128 + 4, 3)
    assert "2 of lvis" in capsys.readouterr().out
