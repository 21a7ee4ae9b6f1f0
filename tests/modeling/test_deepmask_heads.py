"""DeepMask's heads: each window by itself, in float64, and the papers' numbers of weights."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_backbone
from torch import nn

from unseg.config import load_config
from unseg.modeling.proposals.deepmask_heads import (
    HEADS,
    FullHead,
    PaperHead,
    SharedHead,
    build_deepmask_head,
    convolve_at,
    cut_windows,
)

SMALL = {
    "in_channels": 5,
    "cells": 4,
    "out_size": 3,
    "embed_dim": 6,
    "reduce_dim": 7,
    "score_hidden": 8,
}


def small(kind, seed=0, **changes):
    """A head of random weights of a size at which every one matters."""
    head = HEADS[kind](**SMALL | changes).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        spread = 0.5 if parameter.dim() == 1 else 2 / parameter[0].numel() ** 0.5
        parameter.data.normal_(std=spread, generator=generator)
    return head


def random_map(height=7, width=9, images=2, channels=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, channels, height, width, generator=generator, dtype=torch.float64)


def linear(x, layer):
    """A layer's weights on a vector, by loops over outputs."""
    weight, bias = layer.weight.flatten(1), layer.bias
    return torch.stack([(w * x.flatten()).sum() + b for w, b in zip(weight, bias)])


def window_outputs(head, window):
    """Score and mask of one window (C, 4, 4), from the papers' words."""
    hidden = head.score
    if head.kind == "shared":
        cells = [linear(window[:, i, j], head.reduce).relu() for i in range(4) for j in range(4)]
        vector = linear(torch.stack(cells, dim=1).reshape(-1, 4, 4), head.embed)
        mask, seen = linear(vector, head.mask), vector
    else:
        pooled = torch.stack(
            [
                window[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].amax(dim=(1, 2))
                for i in range(2)
                for j in range(2)
            ],
            dim=1,
        )
        seen = linear(pooled.reshape(-1, 2, 2), hidden.embed).relu()
        if head.kind == "full":
            mask = linear(window, head.mask)
        else:
            cells = [
                linear(window[:, i, j], head.reduce).relu() for i in range(4) for j in range(4)
            ]
            vector = linear(torch.stack(cells, dim=1).reshape(-1, 4, 4), head.embed)
            mask = linear(vector, head.mask)
    return linear(linear(seen, hidden.fc1).relu(), hidden.fc2)[0], mask.view(3, 3)


@pytest.mark.parametrize("kind", ["shared", "paper", "full"])
@torch.no_grad()
def test_all_windows_equal_each_by_itself(kind):
    head = small(kind)
    features = random_map()
    encoded = head.encode(features)
    scores = head.scores(encoded)
    assert scores.shape == (2, 4, 6)
    places = torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(6))
    masks = head.masks(encoded, places)
    assert masks.shape == (48, 3, 3)
    for (b, i, j), mask in zip(places.tolist(), masks):
        score, wanted = window_outputs(head, features[b, :, i : i + 4, j : j + 4])
        torch.testing.assert_close(scores[b, i, j], score)
        torch.testing.assert_close(mask, wanted)
    assert masks.std() > 0.1
    assert scores.std() > 0.1
    # Chosen windows in any order and number, and the same on a map of one window.
    some = torch.tensor([[1, 3, 5], [0, 0, 0], [1, 3, 5], [0, 2, 1]])
    index = (some[:, 0] * 4 + some[:, 1]) * 6 + some[:, 2]
    torch.testing.assert_close(head.masks(encoded, some), masks[index])
    alone = head.encode(features[1:, :, 3:7, 5:9])
    torch.testing.assert_close(head.masks(alone, some[1:2])[0], masks[index[0]])
    assert head.scores(alone).shape == (1, 1, 1)


@pytest.mark.parametrize("kind", ["shared", "paper", "full"])
def test_mask_pixels_are_row_by_row(kind):
    head = small(kind)
    head.mask.weight.data.zero_()
    head.mask.bias.data.copy_(torch.arange(9.0))
    mask = head.masks(head.encode(random_map()), torch.zeros((1, 3), dtype=torch.int64))
    assert mask[0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_full_masks_are_linear_in_the_trunks_map_and_of_full_rank():
    head = small("full", out_size=12).requires_grad_(False)
    x, y = random_map(4, 4, 1, seed=2), random_map(4, 4, 1, seed=3)
    place = torch.zeros((1, 3), dtype=torch.int64)

    def mask(z):
        return head.masks(head.encode(z), place)

    torch.testing.assert_close(mask(x) + mask(y) - mask(0 * x), mask(x + y))
    ranks = {}
    for kind in ("full", "paper", "shared"):
        head = small(kind, out_size=12).requires_grad_(False)
        inputs = random_map(4, 4, 100, seed=4)
        places = F.pad(torch.arange(100)[:, None], (0, 2))
        logits = head.masks(head.encode(inputs), places).flatten(1)
        ranks[kind] = int(torch.linalg.matrix_rank(logits - logits.mean(0)))
    # 80 numbers go into a window, 6 through the bottleneck.
    assert ranks == {"full": 80, "paper": 6, "shared": 6}


@pytest.mark.parametrize("kind", ["shared", "paper", "full"])
def test_dropout_in_training_only(kind):
    head = small(kind, dropout=0.5)
    encoded = head.encode(random_map())
    assert torch.equal(head.scores(encoded), head.scores(encoded))
    head.train()
    assert not torch.equal(head.scores(encoded), head.scores(encoded))
    place = torch.zeros((1, 3), dtype=torch.int64)
    assert torch.equal(head.masks(encoded, place), head.masks(encoded, place))


@pytest.mark.parametrize("kind", ["shared", "paper", "full"])
def test_branches_hold_what_serves_one_output_alone(kind):
    head = small(kind)
    encoded = head.encode(random_map())
    outputs = {
        "mask": head.masks(encoded, torch.zeros((1, 3), dtype=torch.int64)).sum(),
        "score": head.scores(encoded).sum(),
    }
    branches = {"mask": head.mask_branch(), "score": head.score_branch()}
    named = dict(head.named_parameters())
    used = {}
    for output, value in outputs.items():
        gradients = torch.autograd.grad(value, named.values(), retain_graph=True, allow_unused=True)
        used[output] = {n for n, g in zip(named, gradients) if g is not None}
    names = {id(p): n for n, p in named.items()}
    for output, other in (("mask", "score"), ("score", "mask")):
        branch = {names[id(p)] for m in branches[output] for p in m.parameters()}
        assert branch == used[output] - used[other]
    assert used["mask"] | used["score"] == set(named)


@pytest.mark.parametrize("kind", ["shared", "paper", "full"])
def test_nothing_chosen_is_connected_to_the_weights(kind):
    head = small(kind)
    features = random_map()
    empty = head.masks(head.encode(features), torch.zeros((0, 3), dtype=torch.int64))
    assert empty.shape == (0, 3, 3)
    scores = head.scores(head.encode(features[:0]))
    assert scores.shape[0] == 0
    (empty.sum() + scores.sum()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("kind", ["shared", "paper", "full"])
def test_gradients(kind):
    head = small(kind)
    places = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]])

    def outputs(features, *weights):
        encoded = head.encode(features)
        return head.masks(encoded, places), head.scores(encoded)

    features = random_map(5, 5).requires_grad_(True)
    assert torch.autograd.gradcheck(outputs, (features, *head.parameters()), fast_mode=True)


def test_windows_are_cut_in_pieces(monkeypatch):
    """However little memory there is, and never all of the map's windows."""
    features, conv = random_map(12, 12), nn.Conv2d(5, 3, 4).double()
    places = torch.tensor([[i % 2, i % 9, (2 * i) % 9] for i in range(11)])
    wanted = torch.stack([conv(features)[b, :, i, j] for b, i, j in places])
    sizes = []

    def counted(features, locations, cells):
        sizes.append(len(locations))
        return cut_windows(features, locations, cells)

    module = "unseg.modeling.proposals.deepmask_heads"
    monkeypatch.setattr(f"{module}.cut_windows", counted)
    for limit, pieces in ((1 << 20, [11]), (5 * 16 * 8 * 4, [4, 4, 3]), (1, [1] * 11)):
        monkeypatch.setattr(f"{module}._CHUNK_BYTES", limit)
        sizes.clear()
        torch.testing.assert_close(convolve_at(features, places, conv), wanted)
        assert sizes == pieces


def count(module):
    return sum(p.numel() for p in module.parameters())


def config(kind, *opts):
    return load_config("", ["MODEL.DEVICE", "cpu", "MODEL.DEEPMASK.HEAD", kind, *opts])


@pytest.mark.parametrize(
    ("kind", "channels", "cells", "reduce_dim", "mask", "score", "whole"),
    [
        # specs/proposals.md 1.1 and 1.7: millions in the mask's own, the score's own, all layers.
        ("shared", 1024, 10, 128, 1.609, 0.526, 17.33),
        ("paper", 512, 14, 512, 53.25, 13.37, 75.84),
        ("full", 512, 14, 512, 314.7, 13.37, 337.30),
    ],
)
def test_numbers_of_weights(kind, channels, cells, reduce_dim, mask, score, whole):
    opts = ["MODEL.DEEPMASK.REDUCE_DIM", reduce_dim]
    if kind == "shared":
        opts += ["MODEL.RESNETS.OUT_FEATURES", ["res4"], "MODEL.BACKBONE.FREEZE_AT", 0]
    else:
        opts += ["MODEL.BACKBONE.NAME", "build_vgg_backbone", "MODEL.VGG.DEPTH", 11]
    cfg = config(kind, *opts)
    with torch.device("meta"):
        head = build_deepmask_head(cfg, in_channels=channels, cells=cells)
        backbone = build_backbone(cfg)
    millions = {
        "mask": sum(count(m) for m in head.mask_branch()) / 1e6,
        "score": sum(count(m) for m in head.score_branch()) / 1e6,
        "whole": (count(head) + count(backbone)) / 1e6,
    }
    assert millions["mask"] == pytest.approx(mask, abs=0.05 if kind == "full" else 0.005)
    assert millions["score"] == pytest.approx(score, abs=0.005)
    assert millions["whole"] == pytest.approx(whole, abs=0.01)


def test_names_of_the_released_head():
    with torch.device("meta"):
        head = build_deepmask_head(config("shared"), in_channels=1024, cells=10)
    assert {n: tuple(p.shape) for n, p in head.named_parameters() if n.endswith("weight")} == {
        "reduce.weight": (128, 1024, 1, 1),
        "embed.weight": (512, 128, 10, 10),
        "mask.weight": (3136, 512, 1, 1),
        "score.fc1.weight": (1024, 512, 1, 1),
        "score.fc2.weight": (1, 1024, 1, 1),
    }


@pytest.mark.parametrize("kind", ["shared", "paper", "full"])
def test_training_begins_near_one_half(kind):
    torch.manual_seed(0)
    head = HEADS[kind](
        in_channels=64, cells=6, out_size=16, embed_dim=64, reduce_dim=32, score_hidden=128
    )
    encoded = head.eval().encode(torch.randn(8, 64, 6, 6).relu())
    logits = head.masks(encoded, F.pad(torch.arange(8)[:, None], (0, 2)))
    assert 0.01 < logits.abs().mean() < 0.5
    assert 0.001 < head.scores(encoded).abs().mean() < 0.5


def test_bad_settings_name_the_key():
    for key, message in (
        ("embed_dim", "EMBED_DIM must be positive, got 0"),
        ("cells", "INPUT_SIZE / stride.* got 0"),
        ("out_size", "OUT_SIZE"),
    ):
        with pytest.raises(ValueError, match=message):
            SharedHead(**SMALL | {key: 0})
    with pytest.raises(ValueError, match="MODEL.DEEPMASK.DROPOUT"):
        SharedHead(**SMALL, dropout=1.0)
    for head in (PaperHead, FullHead):
        with pytest.raises(ValueError, match="even multiple of the trunk's stride.*: 5 cells"):
            head(**SMALL | {"cells": 5})
    SharedHead(**SMALL | {"cells": 5})
    with pytest.raises(ValueError, match="HEAD must be one of shared, paper, full: 'half'"):
        build_deepmask_head(config("half"), in_channels=4, cells=4)
