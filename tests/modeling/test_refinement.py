"""SharpMask's refinement against a transcription of its definition; the stem's map."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model, build_resnet_backbone
from detectron2.modeling.backbone.resnet import BasicStem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unseg.config import load_config
from unseg.modeling.backbone.resnet_stem import maps_with_stem, shapes_with_stem
from unseg.modeling.freezing import freeze
from unseg.modeling.proposals.refinement import Refinement, step_widths

NUMPY_PADDING = {"zeros": "constant", "symmetric": "replicate", "port": "reflect"}


def small(**changes):
    arguments = {"embed_dim": 6, "cells": 3, "in_channels": (5, 4, 3), "km": 16, "ks": 4}
    torch.manual_seed(0)
    return Refinement(**(arguments | changes)).double()


def conv(x, layer, pad_mode):
    """A 3x3 convolution whose padding is written out."""
    x = F.pad(x, (1, 1, 1, 1), mode=NUMPY_PADDING[pad_mode])
    return F.conv2d(x, layer.weight, layer.bias)


def across(step, x, pad_mode):
    first, _, second, _, third = step.horizontal
    x = conv(x, first, pad_mode).clamp(min=0)
    return conv(conv(x, second, pad_mode).clamp(min=0), third, pad_mode)


def downwards(model, vector, laterals, pad_mode, upsample):
    """One window: vector (E,), laterals (k/2, q, q)."""
    c = model.cells
    x = (model.encode.weight @ vector + model.encode.bias).reshape(1, -1, c, c)
    for step, lateral in zip(model.steps, laterals, strict=True):
        first, _, second = step.vertical
        x = conv(conv(x, first, pad_mode).clamp(min=0), second, pad_mode)
        x = (x + lateral[None]).clamp(min=0)
        if upsample == "nearest":
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        else:
            side = 2 * x.shape[-1]
            x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
    return conv(x, model.predict, pad_mode)[0, 0]


def maps_of(channels, height, width, batch=1):
    return [
        torch.randn(batch, C, height * 2**n, width * 2**n, dtype=torch.float64)
        for n, C in enumerate(channels)
    ]


@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
@pytest.mark.parametrize("pad_mode", NUMPY_PADDING)
def test_maps_of_one_window(pad_mode, upsample):
    model = small(upsample=upsample, pad_mode=pad_mode)
    maps = maps_of((5, 4, 3), 3, 3, batch=2)
    vectors = torch.randn(2, 6, dtype=torch.float64)
    locations = torch.tensor([[0, 0, 0], [1, 0, 0]])
    found = model.windows(vectors, model.laterals(maps), locations)
    assert found.shape == (2, 24, 24) == (2, model.out_size, model.out_size)
    for i in range(2):
        laterals = [
            across(step, x[i : i + 1], pad_mode)[0]
            for step, x in zip(model.steps, maps, strict=True)
        ]
        expected = downwards(model, vectors[i], laterals, pad_mode, upsample)
        torch.testing.assert_close(found[i], expected)


@settings(deadline=None, max_examples=15)
@given(
    height=st.integers(3, 7),
    width=st.integers(3, 7),
    chunk=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_windows(height, width, chunk, seed):
    """Slices of the dense horizontal maps."""
    model = small(chunk=chunk)
    torch.manual_seed(seed)
    maps = maps_of((5, 4, 3), height, width, batch=2)
    places = [
        (b, i, j)
        for b in range(2)
        for i in range(height - 2)
        for j in range(width - 2)
        if torch.rand(()) < 0.3
    ] + [(1, height - 3, width - 3), (0, 0, 0)]
    locations = torch.tensor(places)
    vectors = torch.randn(len(places), 6, dtype=torch.float64)
    found = model.windows(vectors, model.laterals(maps), locations)
    assert found.shape == (len(places), 24, 24)
    for mask, vector, (b, i, j) in zip(found, vectors, places, strict=True):
        laterals = []
        for n, (step, features) in enumerate(zip(model.steps, maps, strict=True)):
            lateral, f = across(step, features[b : b + 1], "symmetric")[0], 2**n
            laterals.append(lateral[:, i * f : (i + 3) * f, j * f : (j + 3) * f])
        expected = downwards(model, vector, laterals, "symmetric", "nearest")
        torch.testing.assert_close(mask, expected)


def test_no_windows():
    model = small()
    laterals = model.laterals(maps_of((5, 4, 3), 4, 5))
    vectors = torch.zeros(0, 6, dtype=torch.float64)
    found = model.windows(vectors, laterals, torch.zeros(0, 3, dtype=torch.int64))
    assert found.shape == (0, 24, 24)
    found.sum().backward()
    # Every rank of a distributed training must have a gradient for every weight.
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_size_at_the_defaults():
    model = Refinement(embed_dim=512, cells=10, in_channels=(1024, 512, 256, 64))
    assert model.out_size == 160
    assert 2_000_000 < sum(p.numel() for p in model.parameters()) < 3_000_000
    widths = [step.vertical[0].in_channels for step in model.steps]
    assert widths == [32, 16, 8, 4]
    assert [step.horizontal[0].out_channels for step in model.steps] == [64, 64, 64, 32]
    assert model.predict.in_channels == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"km": 12}, r"MODEL.SHARPMASK.KM must be a positive multiple of 8.*: 12"),
        ({"km": 0}, "MODEL.SHARPMASK.KM"),
        ({"ks": 3}, "MODEL.SHARPMASK.KS must be even and at least 2: 3"),
        ({"ks": 0}, "MODEL.SHARPMASK.KS"),
        ({"in_channels": ()}, "MODEL.SHARPMASK.IN_FEATURES"),
        ({"upsample": "cubic"}, "MODEL.SHARPMASK.UPSAMPLE .*'cubic'"),
        ({"pad_mode": "mirror"}, "MODEL.SHARPMASK.PAD_MODE .*'mirror'"),
    ],
)
def test_settings_that_do_not_work_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        small(**changes)


def test_widths():
    assert step_widths(32, 4) == [32, 16, 8, 4]
    assert step_widths(16, 4) == [16, 8, 4, 2]
    with pytest.raises(ValueError, match="multiple of 16"):
        step_widths(8, 4)


def test_maps_that_do_not_double():
    maps = maps_of((5, 4, 3), 4, 5)
    maps[1] = maps[1][:, :, :-1]
    with pytest.raises(ValueError, match=r"3 trunk maps .*\(4, 5\), \(7, 10\), \(16, 20\)"):
        small().laterals(maps)
    with pytest.raises(ValueError, match="3 trunk maps"):
        small().laterals(maps[:1])


def resnet(*features):
    cfg = load_config("", ["MODEL.RESNETS.OUT_FEATURES", list(features)])
    torch.manual_seed(0)
    cfg.defrost()
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "BN", 0
    return build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()


class CarefulStem(BasicStem):
    """Detectron2's stem with a ReLU that is not in place."""

    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv1(x)), kernel_size=3, stride=2, padding=1)


@pytest.mark.parametrize("stem", [BasicStem, CarefulStem])
@pytest.mark.parametrize("listed", [("res3", "res2"), ("res3", "res2", "stem")])
def test_stem_is_the_first_convolution_after_its_relu(listed, stem):
    backbone = resnet(*listed)
    backbone.stem.__class__ = stem
    nn.init.normal_(backbone.stem.conv1.norm.bias)
    before = list(backbone.state_dict())
    names = ("res3", "res2", "stem")
    shapes = shapes_with_stem(backbone, names, "KEY")
    assert [(s.channels, s.stride) for s in shapes] == [(128, 8), (64, 4), (64, 2)]
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        found = maps_with_stem(backbone, images, names)
        first = backbone.stem.conv1
        by_hand = F.conv2d(images, first.weight, stride=2, padding=3)
        by_hand = first.norm(by_hand).clamp(min=0)
        below = backbone.res2(F.max_pool2d(by_hand, 3, 2, 1))
    assert found["stem"].shape == (2, 64, 32, 48)
    for name, expected in zip(names, (backbone.res3(below), below, by_hand), strict=True):
        torch.testing.assert_close(found[name], expected)
    assert list(backbone.state_dict()) == before
    assert not backbone.stem.conv1._forward_hooks


def test_stem_gives_gradients():
    """The stem's own ReLU is in place: what is kept must not be what it overwrites."""
    backbone = resnet("res2")
    maps = maps_with_stem(backbone, torch.randn(1, 3, 32, 32), ("res2", "stem"))
    sum(x.square().sum() for x in maps.values()).backward()
    assert backbone.stem.conv1.weight.grad.abs().sum() > 0


def test_maps_without_the_stem():
    backbone = resnet("res3", "res2")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        found = maps_with_stem(backbone, images, ("res2",))
        torch.testing.assert_close(found, backbone(images))


def test_a_map_that_the_backbone_lacks():
    with pytest.raises(ValueError, match="KEY names res4: .* res2, stem"):
        shapes_with_stem(resnet("res2"), ("res4", "res2"), "KEY")
    options = ["MODEL.BACKBONE.NAME", "build_vgg_backbone", "MODEL.DEVICE", "cpu"]
    options += ["MODEL.META_ARCHITECTURE", "MaskDiscovery", "DISCOVERY.IN_FEATURE", "conv5"]
    vgg = build_model(load_config("", options)).backbone
    with pytest.raises(ValueError, match="KEY names stem"):
        shapes_with_stem(vgg, ("conv5", "stem"), "KEY")


def test_frozen_parts_keep_their_statistics():
    part = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.9)).train()
    freeze(part)
    x = torch.randn(4, 2, 3, 3)
    assert torch.equal(part(x), part(x))
    assert part[1].num_batches_tracked == 0
    assert not any(p.requires_grad for p in part.parameters())
