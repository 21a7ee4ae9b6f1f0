"""DINO's ViT files: each weight finds its place in the backbone, or the conversion fails."""

import argparse
import logging
import math

import pytest
import torch
from detectron2.modeling import build_model
from timm.models.vision_transformer import VisionTransformer

from unseg.checkpoint import CheckpointError, SafeCheckpointer, convert, save_converted
from unseg.config import load_config

# Channels, patch side and grid of the four.
VITS = {
    ("vit_small", 16): (384, 14),
    ("vit_small", 8): (384, 28),
    ("vit_base", 16): (768, 14),
    ("vit_base", 8): (768, 28),
}


def shapes(arch, side):
    """DINO's names and shapes, as its files have them."""
    C, grid = VITS[arch, side]
    found = {
        "cls_token": (1, 1, C),
        "pos_embed": (1, 1 + grid**2, C),
        "patch_embed.proj.weight": (C, 3, side, side),
        "patch_embed.proj.bias": (C,),
        "norm.weight": (C,),
        "norm.bias": (C,),
    }
    layers = {
        "norm1": (C,),
        "attn.qkv": (3 * C, C),
        "attn.proj": (C, C),
        "norm2": (C,),
        "mlp.fc1": (4 * C, C),
        "mlp.fc2": (C, 4 * C),
    }
    for i in range(12):
        for name, shape in layers.items():
            found[f"blocks.{i}.{name}.weight"] = shape
            found[f"blocks.{i}.{name}.bias"] = shape[:1]
    return found


def constants(arch="vit_small", side=16):
    """Each weight has its own value; a stored tensor of one element keeps the files small."""
    return {
        name: torch.full((1,), 0.5 + index).expand(shape)
        for index, (name, shape) in enumerate(shapes(arch, side).items())
    }


def prefixed(state, prefix, **others):
    return {f"{prefix}{name}": value for name, value in state.items()} | others


LAYOUTS = {
    "backbone": lambda state: state,
    "teacher": lambda state: {
        "student": {"module.backbone.cls_token": torch.zeros(1)},
        "teacher": prefixed(
            state,
            "backbone.",
            **{"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_g": torch.ones(2)},
        ),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16),
    },
    "teacher of DDP": lambda state: {"teacher": prefixed(state, "module.backbone.")},
    "module": lambda state: prefixed(state, "module."),
    "timm with a head": lambda state: {
        **state,
        "head.weight": torch.zeros(1000, 384),
        "head.bias": torch.zeros(1000),
    },
}


@pytest.fixture(scope="module")
def small_16():
    """A model that each test fills with its own weights."""
    opts = {
        "MODEL.META_ARCHITECTURE": "MaskDiscovery",
        "MODEL.BACKBONE.NAME": "build_dino_vit_backbone",
        "DISCOVERY.IN_FEATURE": "key",
        "MODEL.DEVICE": "cpu",
    }
    return build_model(load_config("", [x for pair in opts.items() for x in pair])).eval()


def write(tmp_path, content):
    path = tmp_path / "released.pth"
    torch.save(content, path)
    return path


def load(model, tmp_path, converted):
    save_converted(converted, tmp_path / "converted.pth")
    SafeCheckpointer(model).load(str(tmp_path / "converted.pth"))


@pytest.fixture
def warnings():
    """What Detectron2 and fvcore say while loading."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    names = ("fvcore.common.checkpoint", "detectron2.checkpoint.c2_model_loading")
    for name in names:
        logging.getLogger(name).addHandler(handler)
    yield lines
    for name in names:
        logging.getLogger(name).removeHandler(handler)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(tmp_path, layout):
    state = constants()
    converted = convert("dino", write(tmp_path, LAYOUTS[layout](state)))
    assert converted["matching_heuristics"]
    found = converted["model"]
    assert found.keys() == {f"vit.{name}" for name in state}
    assert len(found) == 150
    assert all(torch.equal(found[f"vit.{name}"], value) for name, value in state.items())


@pytest.mark.parametrize("vit", VITS)
def test_the_four_are_recognised(tmp_path, vit):
    state = constants(*vit)
    found = convert("dino", write(tmp_path, state))["model"]
    assert {k: tuple(v.shape) for k, v in found.items()} == {
        f"vit.{name}": shape for name, shape in shapes(*vit).items()
    }


def test_every_parameter_is_overwritten(tmp_path, warnings, small_16):
    state = constants()
    load(small_16, tmp_path, convert("dino", write(tmp_path, state)))
    parameters = dict(small_16.named_parameters())
    assert parameters.keys() == {f"backbone.vit.{name}" for name in state}
    for name, value in state.items():
        assert (parameters[f"backbone.vit.{name}"] == value.flatten()[0]).all(), name
    assert warnings == []


def test_outputs_are_those_of_the_released_model(tmp_path, small_16):
    torch.manual_seed(0)
    source = VisionTransformer(
        patch_size=16, embed_dim=384, depth=12, num_heads=6, num_classes=0
    ).eval()
    load(small_16, tmp_path, convert("dino", write(tmp_path, source.state_dict())))
    caught = []
    source.blocks[-1].attn.qkv.register_forward_hook(lambda *args: caught.append(args[2]))
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        source(x)
        found = small_16.backbone(x)["key"].flatten(2).mT
    torch.testing.assert_close(found, caught[0][:, 1:, 384:768], rtol=1e-4, atol=1e-5)


def test_a_file_of_another_vit_is_reported_when_loaded(tmp_path, warnings, small_16):
    load(small_16, tmp_path, convert("dino", write(tmp_path, constants("vit_small", 8))))
    text = "\n".join(warnings)
    assert "Shape of vit.pos_embed in checkpoint is torch.Size([1, 785, 384])" in text
    assert "vit.patch_embed.proj.weight will not be loaded" in text
    assert "are not found in the checkpoint" in text


def test_a_missing_weight_is_reported_when_loaded(tmp_path, warnings, small_16):
    converted = convert("dino", write(tmp_path, constants()))
    del converted["model"]["vit.blocks.7.norm2.bias"]
    load(small_16, tmp_path, converted)
    text = "\n".join(warnings)
    assert "are not found in the checkpoint" in text
    assert "vit.blocks.7.norm2" in text


def sampled(n, side):
    """(n, side): the bicubic weights (a = -0.75, clamped) of sampling by (n + 0.1) / side."""
    weights = torch.zeros(n, side, dtype=torch.float64)
    for i in range(n):
        x = (i + 0.5) * side / (n + 0.1) - 0.5
        for k in range(math.floor(x) - 1, math.floor(x) + 3):
            t, a = abs(x - k), -0.75
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            weights[i, min(max(k, 0), side - 1)] += near if t <= 1 else far
    return weights


@pytest.mark.parametrize("side", [30, 7])
def test_positions_of_another_image_size(tmp_path, side):
    state = constants()
    state["pos_embed"] = torch.randn(1, 1 + side**2, 384)
    found = convert("dino", write(tmp_path, state))["model"]["vit.pos_embed"]
    assert torch.equal(found[:, 0], state["pos_embed"][:, 0])
    grid = state["pos_embed"][0, 1:].double().view(side, side, 384)
    expected = torch.einsum("yi,xj,ijc->yxc", sampled(14, side), sampled(14, side), grid)
    torch.testing.assert_close(found[0, 1:].double(), expected.flatten(0, 1), rtol=0, atol=1e-5)


def change(name, value):
    def apply(state):
        if value is None:
            del state[name]
        else:
            state[name] = torch.zeros(value)

    return apply


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (change("blocks.3.norm1.bias", None), r"missing blocks\.3\.norm1\.bias"),
        (change("cls_token", None), "vit_small with patches of 16 pixels.*missing cls_token"),
        (change("pos_embed", None), "missing pos_embed"),
        (change("patch_embed.proj.weight", None), r"holds no ViT.*'patch_embed\.proj\.weight'"),
        (change("blocks.12.norm1.bias", (384,)), r"unknown blocks\.12\.norm1\.bias"),
        (change("reg_token", (1, 4, 384)), "unknown reg_token"),
        (change("blocks.0.attn.qkv.weight", (384, 384)), r"qkv\.weight has shape \(384, 384\)"),
        (change("cls_token", (1, 2, 384)), r"cls_token has shape \(1, 2, 384\)"),
        (change("patch_embed.proj.weight", (384, 3, 14, 14)), r"\(384, 3, 14, 14\) is not known"),
        (change("patch_embed.proj.weight", (192, 3, 16, 16)), r"\(192, 3, 16, 16\) is not known"),
        (change("patch_embed.proj.weight", (384, 768)), r"\(384, 768\) is not known"),
        (change("patch_embed.proj.weight", (384, 1, 16, 16)), r"has shape \(384, 1, 16, 16\)"),
        (
            change("pos_embed", (1, 1 + 14 * 28, 384)),
            r"pos_embed has shape \(1, 393, 384\).*square",
        ),
        (change("pos_embed", (1, 196, 384)), "square"),
        (change("pos_embed", (197, 384)), "square"),
        (change("pos_embed", (1, 1, 384)), "square"),
        (change("pos_embed", (1, 901, 192)), r"pos_embed has shape \(1, 197, 192\)"),
        (change("pos_embed", (2, 901, 384)), "pos_embed has shape"),
    ],
)
def test_a_weight_without_a_place_fails(tmp_path, mutate, message):
    state = constants()
    mutate(state)
    path = write(tmp_path, state)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert("dino", path)
    assert str(path) in str(caught.value)


def test_the_student_is_not_taken(tmp_path):
    content = {"student": prefixed(constants(), "module.backbone."), "epoch": 3}
    with pytest.raises(CheckpointError, match="holds no weights"):
        convert("dino", write(tmp_path, content))
