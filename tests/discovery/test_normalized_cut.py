"""TokenCut and MaskCut against planted objects and a slow float64 transcription of their steps."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unseg.config import get_cfg
from unseg.discovery import (
    MaskCut,
    MaskCutSettings,
    TokenCut,
    TokenCutSettings,
    build_discoverer,
    mask_cut,
    normalized_cut,
    token_cut,
)
from unseg.discovery.normalized_cut import choose_side

CHANNELS = 48


def scene(size, objects, noise=0.0, seed=0):
    """Features (C, h, w) of a background and of rectangles (y, x, height, width), and their masks.

    The directions of the background and the objects are orthogonal; noise is added to every patch.
    """
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((CHANNELS, 1 + len(objects))))[0].T
    directions *= np.sqrt(CHANNELS)
    features = np.tile(directions[0], (*size, 1))
    masks = []
    for (y, x, height, width), direction in zip(objects, directions[1:], strict=True):
        mask = np.zeros(size, dtype=bool)
        mask[y : y + height, x : x + width] = True
        features[mask] = direction
        masks.append(mask)
    features += noise * rng.standard_normal(features.shape)
    return torch.from_numpy(features.transpose(2, 0, 1).copy()).float(), masks


def frame(size=(10, 10)):
    """A background of the border patches only: the object in the middle has most of the patches."""
    return scene(size, [(1, 1, size[0] - 2, size[1] - 2)], noise=0.1)


def decoded(found):
    return [mask.decode() for mask in found]


def same(masks, expected):
    return len(masks) == len(expected) and all(map(np.array_equal, masks, expected))


# The published steps, one patch at a time.


def flood(mask, seed, connectivity):
    """The part of `mask` that can be reached from the patch `seed`."""
    steps = [(-1, 0), (1, 0), (0, -1), (0, 1)]
    if connectivity == 8:
        steps += [(-1, -1), (-1, 1), (1, -1), (1, 1)]
    part, stack = np.zeros_like(mask), [seed]
    while stack:
        y, x = stack.pop()
        if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and not part[y, x]:
            part[y, x] = True
            stack += [(y + dy, x + dx) for dy, dx in steps]
    return part


def reference_weights(rows, threshold, floor):
    weights = np.full((len(rows), len(rows)), floor)
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            norms = np.linalg.norm(a) * np.linalg.norm(b)
            if norms > 0 and a @ b / norms > threshold:
                weights[i, j] = 1.0
    return weights


def first_of_largest(values, among):
    """[ours] Patches that differ by rounding only are equal: the first is taken."""
    patches = list(zip(*np.nonzero(among), strict=True))
    largest = max(values[p] for p in patches)
    return next(p for p in patches if values[p] > largest * (1 - 1e-4))


def reference_cut(rows, grid, s, max_corners, free):
    weights = reference_weights(rows, s.threshold, s.floor)
    links = weights[free.ravel()][:, free.ravel()] == 1
    np.fill_diagonal(links, False)
    if links.sum() in (0, len(links) * (len(links) - 1)):
        return None  # [ours] one uniform region is left: the vector has rounding to show only
    degree = weights.sum(axis=1)
    vector = scipy.linalg.eigh(np.diag(degree) - weights, np.diag(degree))[1][:, 1]
    vector = vector.reshape(grid)
    mean = np.mean([vector[p] for p in zip(*np.nonzero(free), strict=True)])
    seed = first_of_largest(abs(vector), free)
    foreground = free & ((vector > mean) if vector[seed] > mean else (vector < mean))
    h, w = grid
    corners = [(0, 0), (0, w - 1), (h - 1, 0), (h - 1, w - 1)]
    if sum(foreground[p] for p in corners) > max_corners:
        foreground = free & ~foreground
        seed = first_of_largest(abs(vector - mean), foreground)
    mask = flood(foreground, seed, s.connectivity)
    inside = mask.ravel()
    own, others = weights[inside][:, inside].sum(), weights[inside][:, ~inside].sum()
    return mask, own / (own + others) * degree[~inside].sum() / degree.sum()


def reference_mask_cut(features, s):
    grid = tuple(features.shape[1:])
    rows = features.double().flatten(1).t().numpy().copy()
    free, found, results = np.ones(grid, dtype=bool), [], []
    for t in range(1, s.max_masks + 1):
        cut = reference_cut(rows, grid, s, s.max_corners, free)
        if cut is None:
            break
        mask, contrast = cut
        ious = [(mask & m).sum() / (mask | m).sum() for m in found]
        if all(iou <= s.max_iou for iou in ious) and mask.sum() > s.min_area * mask.size:
            results.append((mask, (s.max_masks - t + contrast) / s.max_masks))
        found.append(mask)
        rows[mask.ravel()] = 0
        if s.exclude_found:
            free &= ~mask
    return results


def random_scene(seed):
    """Objects of different sizes, some of them touching or overlapping, with much noise."""
    rng = np.random.default_rng(1000 + seed)
    size = tuple(rng.integers(7, 11, 2))
    objects = []
    for _ in range(rng.integers(2, 5)):
        height, width = rng.integers(2, 6, 2)
        y, x = rng.integers(0, size[0] - height + 1), rng.integers(0, size[1] - width + 1)
        objects.append((y, x, height, width))
    return scene(size, objects, noise=rng.uniform(0.3, 1.2), seed=seed)[0]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("connectivity", [4, 8])
def test_token_cut_is_the_published_procedure(seed, connectivity):
    features = random_scene(seed)
    grid = tuple(features.shape[1:])
    s = TokenCutSettings(connectivity=connectivity)
    rows = features.double().flatten(1).t().numpy()
    mask, contrast = reference_cut(rows, grid, s, 4, np.ones(grid, dtype=bool))
    (found,) = token_cut(features, grid, s)
    np.testing.assert_array_equal(found.decode(), mask)
    assert found.score == pytest.approx(contrast, rel=1e-4)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("exclude_found", [False, True])
def test_mask_cut_is_the_published_procedure(seed, exclude_found):
    features = random_scene(seed)
    s = MaskCutSettings(exclude_found=exclude_found)
    expected = reference_mask_cut(features, s)
    found = mask_cut(features, tuple(features.shape[1:]), s)
    assert same(decoded(found), [mask for mask, _ in expected])
    assert [m.score for m in found] == pytest.approx([score for _, score in expected], rel=1e-4)


def test_token_cut_finds_the_salient_object():
    features, (mask,) = scene((12, 15), [(3, 5, 5, 4)], noise=0.1)
    (found,) = token_cut(features, (12 * 8, 15 * 8), TokenCutSettings())
    np.testing.assert_array_equal(found.decode(), mask.repeat(8, 0).repeat(8, 1))
    assert 0 < found.score < 1


@pytest.mark.parametrize("solver", ["auto", "dense", "lanczos", "lobpcg"])
def test_mask_cut_finds_three_objects_in_turn(solver):
    # More than 256 patches, so that "auto" iterates.
    features, masks = scene(
        (18, 20), [(2, 2, 8, 6), (11, 12, 5, 6), (2, 13, 4, 4)], noise=0.1, seed=2
    )
    found = mask_cut(features, (18, 20), MaskCutSettings(solver=solver))
    assert same(sorted(decoded(found), key=lambda m: -m.sum()), masks)
    scores = [m.score for m in found]
    assert 1 > scores[0] > 2 / 3 > scores[1] > 1 / 3 > scores[2] > 0


def test_mask_cut_of_two_objects_finds_two():
    features, masks = scene((14, 14), [(1, 1, 6, 5), (9, 8, 4, 4)], noise=0.1)
    dropped = Counter()
    found = mask_cut(features, (14, 14), MaskCutSettings(), dropped=dropped)
    assert same(sorted(decoded(found), key=lambda m: -m.sum()), masks)
    assert sum(dropped.values()) == 1


def test_scale_of_the_features_does_not_matter():
    features = random_scene(3)
    size = tuple(features.shape[1:])
    expected = decoded(mask_cut(features, size, MaskCutSettings()))
    for factor in (1e-30, 1e-3, 1e30):
        assert same(decoded(mask_cut(features * factor, size, MaskCutSettings())), expected)
    assert same(decoded(mask_cut(features.double(), size, MaskCutSettings())), expected)


@settings(deadline=None)
@given(
    values=hnp.arrays(np.float64, (3, 4), elements=st.integers(-20, 20), unique=True),
    max_corners=st.integers(0, 4),
)
def test_sides_do_not_depend_on_the_sign(values, max_corners):
    values = values + 0.25 * (values > 0)  # no two of the same absolute value
    everywhere = np.ones((3, 4), dtype=bool)
    foreground, seed = choose_side(values, everywhere, max_corners)
    other, other_seed = choose_side(-values, everywhere, max_corners)
    np.testing.assert_array_equal(foreground, other)
    assert seed == other_seed
    assert foreground.flat[seed]


# Every setting does something.


def test_threshold():
    rng = np.random.default_rng(0)
    base, other = np.linalg.qr(rng.standard_normal((CHANNELS, 2)))[0].T
    features = np.tile(base, (8, 8, 1))
    features[2:5, 2:5] = 0.5 * base + np.sqrt(0.75) * other  # a cosine of 0.5
    features = torch.from_numpy(features.transpose(2, 0, 1).copy())
    assert token_cut(features, (8, 8), TokenCutSettings(threshold=0.45)) == []
    (found,) = token_cut(features, (8, 8), TokenCutSettings(threshold=0.55))
    assert found.area == 9


def test_floor_joins_everything():
    features, _ = scene((8, 8), [(2, 2, 3, 3)])
    scores = [
        token_cut(features, (8, 8), TokenCutSettings(floor=floor))[0].score
        for floor in (0.0, 1e-5, 0.1)
    ]
    # Nothing leaves the object; then 9 * 55 edges of the floor's weight do.
    assert scores[0] == pytest.approx(1 - 81 / (81 + 55**2), rel=1e-5)
    inside, between = 81, 0.1 * 9 * 55
    volume = inside + between
    total = 81 + 55**2 + 2 * between
    assert scores[2] == pytest.approx(inside / volume * (1 - volume / total), rel=1e-5)
    assert scores[0] > scores[1] > scores[2]


def test_connectivity():
    features, (first, second) = scene((10, 10), [(1, 1, 3, 3), (4, 4, 3, 3)])
    features[:, second] = features[:, first]
    both = first | second
    (four,) = token_cut(features, (10, 10), TokenCutSettings(connectivity=4))
    (eight,) = token_cut(features, (10, 10), TokenCutSettings(connectivity=8))
    assert any(np.array_equal(four.decode(), mask) for mask in (first, second))
    np.testing.assert_array_equal(eight.decode(), both)


def test_upsample():
    features, (mask,) = scene((8, 8), [(2, 2, 4, 3)])
    (nearest,) = token_cut(features, (80, 80), TokenCutSettings())
    (bilinear,) = token_cut(features, (80, 80), TokenCutSettings(upsample="bilinear"))
    square = mask.repeat(10, 0).repeat(10, 1)
    np.testing.assert_array_equal(nearest.decode(), square)
    smooth = bilinear.decode()
    assert not (smooth & ~square).any()  # only the corners are rounded off
    corners = [(20, 20), (20, 49), (59, 20), (59, 49)]
    assert not any(smooth[p] for p in corners)
    assert (square & ~smooth).sum() < 0.05 * square.sum()


def test_sizes_that_do_not_divide():
    features, (mask,) = scene((8, 8), [(2, 2, 4, 3)])
    (found,) = token_cut(features, (83, 61), TokenCutSettings())
    rows = ((np.arange(83) + 0.5) * 8 / 83).astype(int)
    columns = ((np.arange(61) + 0.5) * 8 / 61).astype(int)
    np.testing.assert_array_equal(found.decode(), mask[rows][:, columns])


@pytest.mark.parametrize("cut", [token_cut, mask_cut])
def test_solver_is_passed_on(cut, monkeypatch):
    used = []
    solve = normalized_cut.laplacian_eigenpairs
    monkeypatch.setattr(
        normalized_cut,
        "laplacian_eigenpairs",
        lambda *args, solver: used.append(solver) or solve(*args, solver=solver),
    )
    kind = TokenCutSettings if cut is token_cut else MaskCutSettings
    cut(random_scene(0), (8, 8), kind(solver="lobpcg"))
    assert set(used) == {"lobpcg"}


def test_max_masks():
    features = random_scene(1)
    size = tuple(features.shape[1:])
    s = MaskCutSettings(max_iou=1.0, min_area=0.0, exclude_found=True)
    three = decoded(mask_cut(features, size, s))
    assert len(three) == 3
    assert same(decoded(mask_cut(features, size, replace(s, max_masks=1))), three[:1])
    assert same(decoded(mask_cut(features, size, replace(s, max_masks=2))), three[:2])


def test_max_corners():
    features, (middle,) = frame()
    s = MaskCutSettings(max_masks=1)
    (mask,) = decoded(mask_cut(features, (10, 10), s))
    np.testing.assert_array_equal(mask, middle)
    (mask,) = decoded(mask_cut(features, (10, 10), replace(s, max_corners=4)))
    np.testing.assert_array_equal(mask, ~middle)
    # TokenCut has no such rule.
    (mask,) = decoded(token_cut(features, (10, 10), TokenCutSettings()))
    np.testing.assert_array_equal(mask, ~middle)


def ious(masks):
    """Of each mask with those before it."""
    return [(a & b).sum() / (a | b).sum() for n, a in enumerate(masks) for b in masks[:n]]


def cut_random_scenes(s):
    scenes = map(random_scene, range(16))
    return [decoded(mask_cut(f, tuple(f.shape[1:]), s)) for f in scenes]


def test_exclude_found_makes_masks_disjoint():
    s = MaskCutSettings(max_iou=1.0, min_area=0.0)
    assert any(sum(ious(masks)) > 0 for masks in cut_random_scenes(s))
    disjoint = cut_random_scenes(replace(s, exclude_found=True))
    assert all(sum(ious(masks)) == 0 for masks in disjoint)
    assert max(map(len, disjoint)) == 3


def test_max_iou():
    s = MaskCutSettings(max_iou=1.0, min_area=0.0)
    everything = cut_random_scenes(s)
    assert max(iou for masks in everything for iou in ious(masks)) > 0.5
    for threshold in (0.5, 0.2):
        kept = cut_random_scenes(replace(s, max_iou=threshold))
        assert all(iou <= threshold for masks in kept for iou in ious(masks))
        assert sum(map(len, kept)) < sum(map(len, everything))


def test_min_area():
    features, masks = scene((20, 20), [(2, 2, 6, 6), (14, 14, 2, 2)], noise=0.1)
    s = MaskCutSettings(max_masks=2)
    dropped = Counter()
    found = decoded(mask_cut(features, (20, 20), s, dropped=dropped))
    assert same(found, masks[:1])  # 4 of 400 patches are not above 1 %
    assert dropped["too small"] == 1
    found = decoded(mask_cut(features, (20, 20), replace(s, min_area=0.009)))
    assert same(found, masks)


# Degenerate input.


def degenerate():
    one_hot = torch.eye(36).view(36, 6, 6)
    return {
        "constant": torch.ones(4, 6, 6),
        "zero": torch.zeros(4, 6, 6),
        "orthogonal": one_hot,
        "one patch": torch.randn(4, 1, 1),
        "two equal patches": torch.ones(4, 1, 2),
        "one patch of features": torch.ones(4, 6, 6) * (torch.arange(36).view(6, 6) == 7),
        "no patches": torch.zeros(4, 0, 5),
        "no channels": torch.zeros(0, 6, 6),
    }


@pytest.mark.parametrize("name", degenerate())
@pytest.mark.parametrize(
    ("cut", "kind"), [(token_cut, TokenCutSettings), (mask_cut, MaskCutSettings)]
)
def test_features_without_structure_have_no_masks(cut, kind, name):
    dropped = Counter()
    assert cut(degenerate()[name], (48, 48), kind(), dropped=dropped) == []
    assert dropped == {"no structure": 1}


@pytest.mark.parametrize("solver", ["auto", "dense", "lanczos", "lobpcg"])
@pytest.mark.parametrize("size", [(1, 2), (1, 9), (9, 1), (2, 2), (1, 300)])
@pytest.mark.parametrize("floor", [0.0, 1e-5])
def test_thin_and_small_grids(size, solver, floor):
    features = torch.from_numpy(np.random.default_rng(0).standard_normal((6, *size)))
    image_size = (size[0] * 4, size[1] * 4)
    for found in (
        token_cut(features, image_size, TokenCutSettings(solver=solver, floor=floor)),
        mask_cut(features, image_size, MaskCutSettings(solver=solver, floor=floor)),
    ):
        assert all(m.rle["size"] == list(image_size) for m in found)
        assert all(0 < m.score <= 1 for m in found)


def test_a_row_is_cut():
    features, (mask,) = scene((1, 20), [(0, 4, 1, 6)], noise=0.1)
    (found,) = token_cut(features, (1, 20), TokenCutSettings())
    np.testing.assert_array_equal(found.decode(), mask)


@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
def test_masks_that_vanish_in_a_small_image_are_dropped(upsample):
    features, _ = scene((9, 9), [(2, 3, 2, 2)])
    dropped = Counter()
    # The one pixel shows the patch in the middle.
    s = TokenCutSettings(upsample=upsample)
    assert token_cut(features, (1, 1), s, dropped=dropped) == []
    assert dropped["empty"] == 1


def test_nothing_left_to_find_ends_the_search():
    features, (mask,) = scene((8, 8), [(2, 2, 3, 3)])
    dropped = Counter()
    s = MaskCutSettings(exclude_found=True)
    assert same(decoded(mask_cut(features, (8, 8), s, dropped=dropped)), [mask])
    assert dropped["no structure"] == 1


@pytest.mark.parametrize(
    ("cut", "kind"), [(token_cut, TokenCutSettings), (mask_cut, MaskCutSettings)]
)
def test_bad_features(cut, kind):
    with pytest.raises(ValueError, match=r"shape \(C, h, w\), got \(4, 6\)"):
        cut(torch.zeros(4, 6), (8, 8), kind())
    for value in (float("nan"), float("inf")):
        features = torch.ones(4, 6, 6)
        features[1, 2, 3] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            cut(features, (8, 8), kind())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("connectivity", 6),
        ("upsample", "cubic"),
        ("solver", "arpack"),
        ("floor", 1.0),
        ("floor", -1),
    ],
)
@pytest.mark.parametrize("kind", [TokenCutSettings, MaskCutSettings])
def test_bad_settings(kind, name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        kind(**{name: value})


# As discoverers.


def test_the_configs_defaults_are_the_papers():
    cfg = get_cfg()
    assert TokenCutSettings.from_config(cfg) == TokenCutSettings()
    assert MaskCutSettings.from_config(cfg) == MaskCutSettings()
    token = TokenCutSettings()
    assert (token.threshold, token.floor) == (0.2, 1e-5)
    mask = MaskCutSettings()
    assert (mask.threshold, mask.floor, mask.max_masks) == (0.15, 1e-5, 3)
    assert (mask.max_iou, mask.min_area) == (0.5, 0.01)
    assert not mask.exclude_found


@pytest.mark.parametrize(
    ("kind", "node", "cut"), [(TokenCut, "TOKENCUT", token_cut), (MaskCut, "MASKCUT", mask_cut)]
)
def test_discoverers_of_the_registry(kind, node, cut):
    cfg = get_cfg()
    cfg.DISCOVERY.NAME = kind.__name__
    cfg.DISCOVERY[node].THRESHOLD = 0.4
    discoverer = build_discoverer(cfg)
    assert isinstance(discoverer, kind)
    assert discoverer.settings.threshold == 0.4
    features = random_scene(5)
    found, dropped = discoverer(features, (64, 72), dropped=Counter()), Counter()
    assert found == cut(features, (64, 72), discoverer.settings, dropped=dropped)
