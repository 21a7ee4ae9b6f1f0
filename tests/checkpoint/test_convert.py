"""Conversion of released backbones: the same outputs, and failure where a weight has no place."""

import argparse

import pytest
import torch
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import build_resnet_backbone

from unseg.checkpoint import CheckpointError, SafeCheckpointer, convert, save_converted
from unseg.config import get_cfg


def torchvision_resnet(depth=50, seed=0):
    torch.manual_seed(seed)
    model = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics that would be missed if lost
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, std=0.1)
    return model


def detectron2_backbone(depth=50):
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    model = torch.nn.Module()
    model.backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    return model.eval()


def trunk(model, x):
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    return model.layer4(model.layer3(model.layer2(model.layer1(x))))


def wrap(kind, state):
    """The layouts in which the weights are released."""

    def prefixed(prefix, **others):
        return {f"{prefix}{k}": v for k, v in state.items()} | others

    return {
        "torchvision": [state],
        "densecl": [
            {"state_dict": {k: v for k, v in state.items() if not k.startswith("fc.")}},
            {"state_dict": prefixed("backbone.", **{"neck.mlp.0.weight": torch.zeros(3)})},
            {"state_dict": prefixed("encoder_q.0.", queue=torch.zeros(2)), "meta": {"epoch": 200}},
        ],
        "moco": [
            {
                "epoch": 200,
                "arch": "resnet50",
                "state_dict": prefixed(
                    "module.encoder_q.",
                    **{"module.queue": torch.zeros(2, 2), "module.encoder_k.x": torch.zeros(1)},
                ),
            }
        ],
        "dino": [
            state,
            {
                "teacher": prefixed("backbone.", **{"head.mlp.0.weight": torch.zeros(1)}),
                "student": prefixed("module.backbone."),
                "epoch": 800,
                "args": argparse.Namespace(arch="resnet50"),
            },
        ],
    }[kind]


@pytest.mark.parametrize("kind", ["torchvision", "densecl", "moco", "dino"])
def test_outputs_are_those_of_the_original(tmp_path, kind):
    source = torchvision_resnet()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = trunk(source, x)
    for number, content in enumerate(wrap(kind, source.state_dict())):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        converted = convert(kind, path)
        save_converted(converted, tmp_path / "converted.pth")
        model = detectron2_backbone()
        SafeCheckpointer(model).load(str(tmp_path / "converted.pth"))
        with torch.no_grad():
            found = model.backbone(x)["res5"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [18, 101])
def test_other_depths(tmp_path, depth):
    source = torchvision_resnet(depth)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    save_converted(convert("torchvision", tmp_path / "w.pth"), tmp_path / "c.pth")
    model = detectron2_backbone(depth)
    SafeCheckpointer(model).load(str(tmp_path / "c.pth"))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            model.backbone(x)["res5"], trunk(source, x), rtol=1e-5, atol=1e-5
        )


def test_loads_into_a_model_with_fpn(tmp_path):
    source = torchvision_resnet(18)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    save_converted(convert("torchvision", tmp_path / "w.pth"), tmp_path / "c.pth")
    cfg = get_cfg()
    cfg.merge_from_file("projects/FreeSOLO/configs/pseudo_mask_rcnn_tiny.yaml")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    SafeCheckpointer(model).load(str(tmp_path / "c.pth"))
    for name in ("conv1", "layer1.0.conv1", "layer4.1.conv2"):
        weight = source.get_parameter(f"{name}.weight")
        d2_name = name.replace("layer1", "res2").replace("layer4", "res5")
        d2_name = f"stem.{name}" if name == "conv1" else d2_name
        found = model.backbone.bottom_up.get_parameter(f"{d2_name}.weight")
        torch.testing.assert_close(found, weight)


def change(key, value):
    def apply(state):
        if value is None:
            del state[key]
        else:
            state[key] = value

    return apply


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (change("layer2.3.bn1.running_var", None), r"missing res3\.3\.conv1\.norm\.running_var"),
        (change("layer2.9.conv1.weight", torch.zeros(1)), r"unknown res3\.9\.conv1\.weight"),
        (change("adapter.weight", torch.zeros(1)), r"unknown stem\.adapter\.weight"),
        (change("layer1.0.conv1.weight", torch.zeros(64, 64, 3, 3)), r"shape \(64, 64, 3, 3\)"),
        (change("conv1.weight", None), "holds no ResNet"),
        (change("layer3.6.conv1.weight", torch.zeros(1)), "7 blocks in layer3"),
    ],
)
def test_a_weight_without_a_place_fails(tmp_path, mutate, message):
    state = torchvision_resnet().state_dict()
    mutate(state)
    path = tmp_path / "w.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=message):
        convert("torchvision", path)


def test_unknown_kind_and_content(tmp_path):
    with pytest.raises(KeyError, match="densecl"):
        convert("imagenet", tmp_path / "w.pth")
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="list"):
        convert("densecl", tmp_path / "w.pth")
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="no weights"):
        convert("densecl", tmp_path / "w.pth")
