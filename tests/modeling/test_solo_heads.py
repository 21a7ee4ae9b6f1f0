"""SOLO's two heads against a forward pass written by hand, in float64."""

import freesolo_oracle as oracle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import nn

from unseg.modeling.solo.heads import InstanceHead, MaskHead, append_coordinates


def test_coordinates_are_x_then_y():
    found = append_coordinates(torch.zeros(2, 1, 3, 5, dtype=torch.float64))
    assert found.shape == (2, 3, 3, 5)
    for image in found:
        for y in range(3):
            for x in range(5):
                assert image[:, y, x].tolist() == pytest.approx([0, x / 2 - 1, y - 1])


def resized(x, size):
    planes = [oracle.bilinear(plane.numpy(), *size) for plane in x.flatten(0, 1)]
    return torch.from_numpy(np.stack(planes)).view(*x.shape[:2], *size)


def with_coordinates(x):
    b, _, h, w = x.shape
    out = torch.zeros(b, 2, h, w, dtype=x.dtype)
    for i in range(w):
        out[:, 0, :, i] = -1 + 2 * i / (w - 1)
    for i in range(h):
        out[:, 1, i, :] = -1 + 2 * i / (h - 1)
    return torch.cat([x, out], 1)


def block(x, weights, conv, norm, groups):
    """Convolution without bias, group norm, ReLU."""
    kernel = weights[f"{conv}.weight"]
    x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
    grouped = x.reshape(len(x), groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    variance = ((grouped - mean) ** 2).mean(-1, keepdim=True)
    x = ((grouped - mean) / (variance + 1e-5).sqrt()).view_as(x)
    x = x * weights[f"{norm}.weight"][:, None, None] + weights[f"{norm}.bias"][:, None, None]
    return x.clamp(min=0)


def randomized(head):
    """In float64, with weights that would be missed."""
    torch.manual_seed(1)
    head = head.double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head, {k: v.detach() for k, v in head.state_dict().items()}


LEVEL_SIZES = {"p2": (16, 24), "p3": (8, 12), "p4": (4, 6), "p5": (2, 3), "p6": (1, 2)}  # 64 x 96
PYRAMID = {
    name: ShapeSpec(channels=6, stride=2 ** int(name[1])) for name in ("p2", "p3", "p4", "p5", "p6")
}


def random_pyramid():
    torch.manual_seed(2)
    return {k: torch.randn(2, 6, *size, dtype=torch.float64) for k, size in LEVEL_SIZES.items()}


def make_instance_head(**changes):
    options = {
        "in_features": list(PYRAMID),
        "strides": [8, 8, 16, 32, 32],
        "num_grids": [7, 6, 5, 4, 3],
        "num_classes": 2,
        "num_kernels": 5,
        "embedding_dim": 3,
        "channels": 8,
        "num_convs": 2,
        "groups": 4,
    }
    return InstanceHead(PYRAMID, **options | changes)


def test_instance_head():
    head, weights = randomized(make_instance_head())
    features = random_pyramid()
    with torch.no_grad():
        found = head(features, (64, 96))
    # P2 halved, P6 as large as P5.
    sizes = [(8, 12), (8, 12), (4, 6), (2, 3), (2, 3)]
    for level, (name, size) in enumerate(zip(PYRAMID, sizes, strict=True)):
        x = with_coordinates(resized(features[name], size))
        x = resized(x, (7 - level, 7 - level))
        category, kernel = x[:, :6], x
        for i in (0, 3):
            category = block(category, weights, f"cate_tower.{i}", f"cate_tower.{i + 1}", 4)
            kernel = block(kernel, weights, f"kernel_tower.{i}", f"kernel_tower.{i + 1}", 4)
        for outputs, tower, out in zip(
            found, (category, kernel, category), ("cate", "kernel", "emb"), strict=True
        ):
            expected = F.conv2d(
                tower, weights[f"{out}_pred.weight"], weights[f"{out}_pred.bias"], padding=1
            )
            torch.testing.assert_close(outputs[level], expected)


def make_mask_head(**changes):
    options = {"in_features": ["p2", "p3", "p4", "p5"], "channels": 8, "num_kernels": 4}
    return MaskHead(PYRAMID, **options | {"groups": 4} | changes)


def test_mask_head():
    head, weights = randomized(make_mask_head())
    features = random_pyramid()
    with torch.no_grad():
        found = head(features)
    total = 0
    for level, name in enumerate(("p2", "p3", "p4", "p5")):
        x = with_coordinates(features[name]) if name == "p5" else features[name]
        for i in range(max(level, 1)):
            conv = f"convs_all_levels.{level}.conv{i}"
            x = block(x, weights, f"{conv}.0", f"{conv}.1", 4)
            if level:
                x = resized(x, (2 * x.shape[2], 2 * x.shape[3]))
        total = total + x
    expected = block(total, weights, "conv_pred.0", "conv_pred.1", 4)
    assert head.stride == 4
    torch.testing.assert_close(found, expected)


def test_initial_weights():
    torch.manual_seed(0)
    head = make_instance_head(channels=64, num_kernels=64, embedding_dim=64, prior_prob=0.01)
    mask_head = make_mask_head(channels=64, num_kernels=64)
    for name, parameter in (*head.named_parameters(), *mask_head.named_parameters()):
        if parameter.dim() == 4:
            assert parameter.std().item() == pytest.approx(0.01, rel=0.2), name
        elif name == "cate_pred.bias":
            torch.testing.assert_close(parameter.sigmoid(), torch.full_like(parameter, 0.01))
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert (parameter == 1).all(), name


@pytest.mark.parametrize("norm", ["", "BN"])
def test_other_norms(norm):
    head, mask_head = make_instance_head(norm=norm), make_mask_head(norm=norm)
    assert (head.cate_tower[0].bias is not None) == (norm == "")
    features = {k: v.float() for k, v in random_pyramid().items()}
    assert head(features, (64, 96))[1][2].shape == (2, 5, 5, 5)
    assert mask_head(features).shape == (2, 4, 16, 24)


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="one length, got 5, 4 and 5"):
        make_instance_head(strides=[8, 8, 16, 32])
    with pytest.raises(ValueError, match="GN_GROUPS 32 does not divide a head's 8 channels"):
        make_instance_head(groups=32)
    with pytest.raises(ValueError, match=r"must double, got \[4, 16\]"):
        make_mask_head(in_features=["p2", "p4"])
    wide = PYRAMID | {"p3": ShapeSpec(channels=7, stride=8)}
    with pytest.raises(ValueError, match=r"one width, got \[6, 7\]"):
        InstanceHead(
            wide,
            in_features=["p2", "p3"],
            strides=[8, 8],
            num_grids=[2, 2],
            num_classes=1,
            num_kernels=2,
            embedding_dim=2,
            channels=4,
            num_convs=1,
        )
