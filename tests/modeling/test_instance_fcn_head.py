"""InstanceFCN's head: labels, sampling, targets and losses against loops, exact separation."""

import math

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, PolygonMasks
from instance_fcn_cases import (
    ALL_WINDOWS,
    bin_of,
    make_head,
    make_objects,
    random_maps,
    slow_labels,
    slow_losses,
)
from torch import nn

from unseg.config import get_cfg
from unseg.modeling.proposals.instance_fcn_head import InstanceFCNHead, LevelMaps
from unseg.modeling.proposals.instance_fcn_losses import (
    WindowTraining,
    crop_targets,
    sample_windows,
)
from unseg.modeling.proposals.instance_fcn_windows import WindowLevel, make_levels

SIZE = (45, 62)
BOXES = [(3, 4, 19, 16), (20, 4, 33, 20), (5, 25, 40, 44), (1, 1, 60, 44), (50, 30, 54, 33)]


@pytest.mark.parametrize(("k", "foreign"), [(1, 27), (3, 0), (5, 0)])
def test_touching_squares_are_separated_by_their_own_windows(k, foreign):
    m, half = 15, 7
    masks = np.zeros((2, 21, 30), dtype=bool)
    masks[0, 6:15, 3:12] = masks[1, 6:15, 12:21] = True
    centers = [(10, 7), (10, 16)]
    maps = torch.full((1, k * k, 21, 30), -5.0)
    for mask, (row, column) in zip(masks, centers, strict=True):
        for y, x in zip(*mask.nonzero(), strict=True):
            channel = bin_of(y - row + half, k, m) * k + bin_of(x - column + half, k, m)
            maps[0, channel, y, x] = 5.0
    scores = torch.full((1, 21, 30), -1.0)
    scores[0, 10, 7], scores[0, 10, 16] = 2.0, 1.0
    head = make_head([4], k=k, m=m)
    (found,) = head.ranked_windows([LevelMaps(maps, scores)], [(84, 120)], 2)
    assert found.scores.tolist() == [2.0, 1.0]
    for window, (row, column), own, other in zip(
        found.masks, centers, masks, masks[::-1], strict=True
    ):
        picture = np.zeros((21 + 2 * half, 30 + 2 * half), dtype=bool)
        picture[row : row + m, column : column + m] = window.numpy() > 0.5
        picture = picture[half:-half, half:-half]
        assert (picture & other).sum() == foreign
        assert np.array_equal(picture & ~other, own)


@pytest.mark.parametrize("seed", range(6))
def test_labels_against_a_loop(seed):
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(30, 70)), int(rng.integers(30, 70)))
    corners = rng.integers(0, 24, (6, 2))
    sides = rng.integers(5, 60, (6, 2))
    boxes = [
        (int(x), int(y), min(int(x + w), size[1]), min(int(y + h), size[0]))
        for (x, y), (w, h) in zip(corners, sides, strict=True)
    ]
    objects = make_objects(size, boxes, empty=(2,))
    crowds = BitMasks(torch.zeros((1, *size), dtype=torch.bool))
    crowds.tensor[:, :13, 20:] = True
    levels = [WindowLevel(4, 2.0, 16.0), WindowLevel(8, 8.0, 32.0)]
    settings = WindowTraining(pos_shift=40, neg_shift=60, pos_scale=0.5, **ALL_WINDOWS)
    sizes = [tuple(math.ceil(side / level.stride) for side in size) for level in levels]
    found = sample_windows(levels, sizes, objects, crowds, settings)
    positives = 0
    for level, (cells, indices) in zip(levels, found, strict=True):
        labels = slow_labels(level, size, objects, crowds, settings)
        expected = {cell: label for cell, label in labels.items() if label != "ignored"}
        got = {
            tuple(cell): "negative" if index < 0 else index
            for cell, index in zip(cells.tolist(), indices.tolist(), strict=True)
        }
        assert len(got) == len(cells)
        assert got == expected
        assert 0 < len(expected) < len(labels)
        positives += sum(label != "negative" for label in expected.values())
    assert positives > 0


@pytest.mark.parametrize(("windows", "fraction"), [(40, 0.5), (12, 0.25), (7, 1.0), (10**6, 0.5)])
def test_samples_are_drawn_from_the_labels(windows, fraction):
    objects = make_objects(SIZE, BOXES)
    levels = make_head([4, 8], object_size=16.0).levels
    sizes = [(12, 16), (6, 8)]
    settings = {"pos_shift": 32, "neg_shift": 40, "pos_scale": 0.5}
    everything = sample_windows(
        levels, sizes, objects, None, WindowTraining(**settings, **ALL_WINDOWS)
    )
    number = {
        sign: sum(int(((x >= 0) == sign).sum()) for _, x in everything) for sign in (True, False)
    }
    chosen = WindowTraining(**settings, windows_per_image=windows, pos_fraction=fraction)
    seen = set()
    for seed in range(3):
        torch.manual_seed(seed)
        found = sample_windows(levels, sizes, objects, None, chosen)
        positives = sum(int((x >= 0).sum()) for _, x in found)
        assert positives == min(number[True], int(windows * fraction))
        total = sum(len(x) for _, x in found)
        assert total == positives + min(number[False], windows - positives)
        pairs = []
        for (cells, indices), (every_cell, every_index) in zip(found, everything, strict=True):
            rows = {(*c, i) for c, i in zip(cells.tolist(), indices.tolist(), strict=True)}
            assert len(rows) == len(cells)
            assert rows <= {
                (*c, i) for c, i in zip(every_cell.tolist(), every_index.tolist(), strict=True)
            }
            pairs.append(frozenset(rows))
        seen.add(tuple(pairs))
    assert len(seen) == (3 if windows < 100 else 1)


def test_objects_between_two_scales_are_ignored_and_not_negative():
    level = WindowLevel(8, 4.0, 64.0)
    settings = WindowTraining(**ALL_WINDOWS)
    for side, at_center in ((64, 0), (90, None), (100, None), (160, -1), (40, None), (30, -1)):
        size = (192, 192)
        box = (100 - side // 2, 100 - side // 2, 100 + side // 2, 100 + side // 2)
        ((cells, indices),) = sample_windows(
            [level], [(24, 24)], make_objects(size, [box]), None, settings
        )
        there = (cells == torch.tensor([12, 12])).all(dim=1)
        assert (indices[there].tolist() or [None]) == [at_center], side


def test_targets_are_the_share_of_a_cell_that_the_object_covers():
    torch.manual_seed(0)
    height, width, stride, m = 40, 56, 4, 5
    masks = BitMasks(torch.rand((3, height, width)) > 0.5)
    level = WindowLevel(stride, 2.0, 16.0)
    cells = torch.cartesian_prod(torch.arange(height // stride), torch.arange(width // stride))
    matched = torch.arange(len(cells)) % 3
    boxes = level.boxes(cells, m)
    targets = crop_targets(masks, matched, boxes, m)
    assert torch.equal(targets, masks[matched].crop_and_resize(boxes, m))
    compared = 0
    for (row, column), index, target in zip(cells.tolist(), matched.tolist(), targets, strict=True):
        for u in range(m):
            for v in range(m):
                y, x = stride * (row - m // 2 + u), stride * (column - m // 2 + v)
                if 0 <= y < height and 0 <= x < width:
                    share = masks.tensor[index, y : y + stride, x : x + stride].float().mean()
                    assert bool(target[u, v]) == bool(share >= 0.5)
                    compared += 1
    assert compared > 1000


def test_targets_of_polygons():
    corners = np.array([8.0, 4.0, 24.0, 4.0, 24.0, 28.0, 8.0, 28.0])
    polygons = PolygonMasks([[np.zeros(6)], [corners]])
    boxes = torch.tensor([[-4.0, -4.0, 36.0, 36.0], [8.0, 8.0, 48.0, 48.0]])
    targets = crop_targets(polygons, torch.tensor([1, 1]), boxes, 10)
    bits = make_objects((40, 40), [(8, 4, 24, 28)]).gt_masks
    assert torch.equal(targets, crop_targets(bits, torch.tensor([0, 0]), boxes, 10))
    assert targets[0].sum() == 4 * 6


LOSS_CASES = [
    {},
    {"mask_reduction": "sum"},
    {"mask_weight": 0.5, "score_weight": 3.0},
    {"pos_shift": 48, "neg_shift": 64, "pos_scale": 0.6},
]


@pytest.mark.parametrize("training", LOSS_CASES)
@pytest.mark.parametrize(("strides", "k"), [([4, 8], 3), ([8], 5), ([4], 1)])
def test_losses_against_loops_in_double_precision(training, strides, k):
    training = {"pos_shift": 24, "neg_shift": 33} | training
    head = make_head(strides, k=k, training=training, object_size=16.0)
    sizes = [SIZE, (33, 37), (20, 20)]
    objects = [
        make_objects(SIZE, BOXES, empty=(1,)),
        make_objects((33, 37), [(2, 3, 18, 12), (0, 16, 37, 33)]),
        make_objects((20, 20), []),
    ]
    crowds = [BitMasks(torch.zeros((1, *size), dtype=torch.bool)) for size in sizes]
    crowds[0].tensor[:, 20:, :20] = True
    maps = random_maps(head, 3, [(64 // s, 64 // s) for s in strides], seed=k)
    for level, found in zip(head.levels, maps, strict=True):  # padding must not be read
        for image, (height, width) in enumerate(sizes):
            for x in (found.masks[image], found.scores[image]):
                x[..., math.ceil(height / level.stride) :, :] = torch.nan
                x[..., math.ceil(width / level.stride) :] = torch.nan
    losses = head.losses(head.training_windows(maps, sizes, objects, crowds))
    expected = slow_losses(head, maps, sizes, objects, crowds)
    assert set(losses) == {"loss_instance_mask", "loss_objectness"}
    for name, value in expected.items():
        assert value > 0
        assert losses[name].dtype == torch.float32
        assert losses[name].item() == pytest.approx(value, rel=2e-6)


def test_gradients_go_to_the_cells_of_the_windows_and_not_to_padding():
    head = make_head([8], training={"windows_per_image": 4})
    maps = [LevelMaps(*(x.requires_grad_() for x in random_maps(head, 1, [(8, 8)])[0]))]
    objects = make_objects((40, 24), [(2, 4, 20, 34)])
    windows = head.training_windows(maps, [(40, 24)], [objects])
    assert windows.labels.any()
    sum(head.losses(windows).values()).backward()
    for x in maps[0]:
        assert (x.grad[..., :5, :3] != 0).any()
        assert (x.grad[..., 5:, :] == 0).all()
        assert (x.grad[..., 3:] == 0).all()


@pytest.mark.parametrize("case", ["none", "crowd", "too large", "empty mask", "all crowd"])
def test_without_positives_the_mask_loss_is_a_zero_with_a_graph(case):
    head = make_head([4])
    boxes = {"too large": [(0, 0, 62, 45)], "empty mask": [(10, 10, 26, 26)]}.get(case, [])
    objects = make_objects(SIZE, boxes, empty=(0,) if case == "empty mask" else ())
    crowds = BitMasks(torch.zeros((1, *SIZE), dtype=torch.bool))
    crowds.tensor[:, 10:30, 10:30] = case == "crowd"
    crowds.tensor |= case == "all crowd"
    maps = head({"p0": torch.randn(1, 3, 12, 16)})
    windows = head.training_windows(maps, [SIZE], [objects], [crowds])
    losses = head.losses(windows)
    assert losses["loss_instance_mask"].item() == 0
    assert (losses["loss_objectness"].item() > 0) == (case != "all crowd")
    expected = {"crowd": 12 * 16 - 25, "all crowd": 0}.get(case, 12 * 16)
    assert len(windows.scores) == expected
    sum(losses.values()).backward()
    for parameter in head.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert all((p.grad == 0).all() for p in head.mask_branch.parameters())


def test_objects_without_masks_are_refused():
    head = make_head([4])
    objects = make_objects(SIZE, BOXES)
    objects.remove("gt_masks")
    with pytest.raises(ValueError, match="MODEL.MASK_ON"):
        head.training_windows(random_maps(head, 1, [(12, 16)]), [SIZE], [objects])
    nothing = make_objects(SIZE, [])
    nothing.remove("gt_masks")  # Detectron2's mapper gives none then
    head.training_windows(random_maps(head, 1, [(12, 16)]), [SIZE], [nothing])


def test_ranked_windows_against_a_loop():
    head = make_head([4, 8], k=3, m=5)
    sizes = [(32, 48), (21, 30)]
    maps = random_maps(head, 2, [(8, 12), (4, 6)])
    maps[0].scores.copy_((maps[0].scores * 2).round())  # ties
    maps[1].scores[1, 3:] = 100  # padding
    found = head.ranked_windows(maps, sizes, 30)
    for image, (height, width) in enumerate(sizes):
        expected = []
        for level, level_maps in zip(head.levels, maps, strict=True):
            stride, own = level.stride, []
            for row in range(math.ceil(height / stride)):
                for column in range(math.ceil(width / stride)):
                    own.append((-float(level_maps.scores[image, row, column]), row, column))
            expected += [(level, level_maps, *x) for x in sorted(own)[:30]]
        result = found[image]
        assert len(result.scores) == len(result.masks) == len(result.boxes) == len(expected)
        for (level, level_maps, score, row, column), *got in zip(expected, *result, strict=True):
            s = level.stride
            x, y = s * column + s / 2, s * row + s / 2
            assert got[0].item() == -score
            assert got[2].tolist() == [x - 2.5 * s, y - 2.5 * s, x + 2.5 * s, y + 2.5 * s]
            for u in range(5):
                for v in range(5):
                    i, j = row - 2 + u, column - 2 + v
                    inside = 0 <= i < math.ceil(height / s) and 0 <= j < math.ceil(width / s)
                    channel = bin_of(u, 3, 5) * 3 + bin_of(v, 3, 5)
                    logit = float(level_maps.masks[image, channel, i, j]) if inside else -10.0
                    assert got[1][u, v].item() == pytest.approx(1 / (1 + math.exp(-logit)))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_flipped_net_on_flipped_features_gives_flipped_windows(k):
    head, other = (make_head([8], k=k, m=7, hidden=16) for _ in range(2))
    other.load_state_dict(head.state_dict())
    with torch.no_grad():
        for layer in other.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.copy_(layer.weight.flip(3))
        channels = torch.arange(k * k).view(k, k).flip(1).flatten()
        other.mask_branch[2].weight.copy_(other.mask_branch[2].weight[channels])
        other.mask_branch[2].bias.copy_(other.mask_branch[2].bias[channels])
        features = torch.randn(1, 3, 6, 9)
        (one,) = head.ranked_windows(head({"p0": features}), [(48, 72)], 54)
        (two,) = other.ranked_windows(other({"p0": features.flip(3)}), [(48, 72)], 54)
    one, two = (
        [x[found.boxes[:, 0].add(100 * found.boxes[:, 1]).argsort()] for x in found]
        for found in (one, two)
    )
    order = torch.arange(54).view(6, 9).flip(1).flatten()
    torch.testing.assert_close(two[0], one[0][order])
    torch.testing.assert_close(two[1], one[1][order].flip(2))
    assert not torch.allclose(two[1], one[1][order], atol=0.1)
    assert torch.equal(two[2], one[2])


def test_flipped_objects_have_flipped_windows():
    level, size = WindowLevel(8, 4.0, 32.0), (48, 72)
    boxes = [(9, 5, 40, 30), (33, 20, 70, 45)]
    settings = WindowTraining(pos_shift=48, neg_shift=64, pos_scale=0.5, **ALL_WINDOWS)
    found = []
    for flipped in (False, True):
        own = [(72 - x1, y0, 72 - x0, y1) for x0, y0, x1, y1 in boxes] if flipped else boxes
        ((cells, objects),) = sample_windows(
            [level], [(6, 9)], make_objects(size, own), None, settings
        )
        columns = 8 - cells[:, 1] if flipped else cells[:, 1]
        found.append(
            set(zip(cells[:, 0].tolist(), columns.tolist(), objects.tolist(), strict=True))
        )
    assert found[0] == found[1]
    assert {i for *_, i in found[0]} == {-1, 0, 1}


def test_the_config_makes_the_head():
    cfg = get_cfg()
    node = cfg.MODEL.INSTANCE_FCN
    node.IN_FEATURES, node.HIDDEN = ("p2", "p3", "p4", "p5"), 8
    shapes = {f"p{i}": ShapeSpec(channels=6, stride=2**i) for i in range(2, 7)}
    head = InstanceFCNHead(cfg, shapes)
    assert [level.object_size for level in head.levels] == [64, 128, 256, 512]
    assert [level.offset for level in head.levels] == [2, 4, 8, 16]
    assert (head.k, head.m, head.pad_logit) == (5, 21, -10)
    assert head.window_training == WindowTraining()
    assert head.window_training.rule(64.0).pos_shift == 8
    assert [tuple(p.shape) for p in head.parameters()] == [
        *((8, 6, 1, 1), (8,), (25, 8, 3, 3), (25,)),
        *((8, 6, 3, 3), (8,), (1, 8, 1, 1), (1,)),
    ]
    big = torch.cat([p.flatten() for p in InstanceFCNHead(cfg, shapes).parameters() if p.dim() > 1])
    assert big.std().item() == pytest.approx(0.01, rel=0.1)
    node.OBJECT_SIZE = 48.0
    assert [level.object_size for level in InstanceFCNHead(cfg, shapes).levels] == [
        48,
        96,
        192,
        384,
    ]
    node.IN_FEATURES = ("p3",)
    assert InstanceFCNHead(cfg, shapes, {"p3": 8.0}).levels == (WindowLevel(8, 8.0, 48.0),)
    node.CELL_OFFSET = 1.0
    assert InstanceFCNHead(cfg, shapes, {"p3": 8.0}).levels[0].offset == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("M", 20),
        ("K", 22),
        ("K", 0),
        ("HIDDEN", 0),
        ("IN_FEATURES", ("p9",)),
        ("IN_FEATURES", ()),
        ("CELL_OFFSET", 4.0),
        ("WINDOWS_PER_IMAGE", 0),
        ("POS_FRACTION", 1.5),
        ("MASK_LOSS_REDUCTION", "max"),
    ],
)
def test_errors_name_the_key(key, value):
    cfg = get_cfg()
    cfg.MODEL.INSTANCE_FCN.IN_FEATURES = ("p2", "p3")
    shapes = {f"p{i}": ShapeSpec(channels=6, stride=2**i) for i in (2, 3)}
    cfg.MODEL.INSTANCE_FCN[key] = value
    with pytest.raises(ValueError, match=rf"MODEL\.INSTANCE_FCN\..*{key}"):
        InstanceFCNHead(cfg, shapes)


def test_other_errors():
    cfg = get_cfg()
    cfg.MODEL.INSTANCE_FCN.IN_FEATURES = ("p2", "p3")
    shapes = {f"p{i}": ShapeSpec(channels=i, stride=2**i) for i in (2, 3)}
    with pytest.raises(ValueError, match=r"IN_FEATURES must have equal channels: \[2, 3\]"):
        InstanceFCNHead(cfg, shapes)
    with pytest.raises(ValueError, match="negatives must be farther away"):
        WindowTraining(pos_shift=40)
    with pytest.raises(ValueError, match="1 in_features, but 0 levels"):
        InstanceFCNHead(in_features=("p2",), in_channels=3, levels=[])
    assert len(make_levels(shapes, ("p2", "p3"), 21)) == 2


def test_losses_are_float32_under_autocast():
    head = make_head([4])
    features = {"p0": torch.randn(2, 3, 12, 16)}
    objects = [make_objects(SIZE, BOXES)] * 2
    results = []
    for enabled in (False, True):
        head.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            maps = head(features)
            windows = head.training_windows(maps, [SIZE] * 2, objects)
            losses = head.losses(windows)
        assert maps[0].masks.dtype == (torch.bfloat16 if enabled else torch.float32)
        assert windows.scores.dtype == windows.masks.dtype == torch.float32
        sum(losses.values()).backward()
        assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in head.parameters())
        results.append(torch.stack(list(losses.values())))
        (found, _) = head.ranked_windows(maps, [SIZE] * 2, 10)
        assert found.scores.dtype == found.masks.dtype == torch.float32
    assert results[1].dtype == torch.float32
    torch.testing.assert_close(results[1], results[0], rtol=0.05, atol=0.01)
