"""The VGG backbone against torchvision's own forward, the strided net and receptive fields."""

import pytest
import torch
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn

from unseg.checkpoint import CheckpointError, SafeCheckpointer, convert, save_converted
from unseg.config import load_config
from unseg.modeling import VGG

STAGES = ("conv1", "conv2", "conv3", "conv4", "conv5")
# Indices of torchvision's pools, counted by hand in its printed models.
POOLS = {11: (2, 5, 10, 15, 20), 16: (4, 9, 16, 23, 30)}
CHANNELS = (64, 128, 256, 512, 512)


def torchvision_state(depth, seed=0):
    """torchvision's features and their weights, of a size that keeps the maps away from 0."""
    with torch.device("meta"):  # the classifier's 120 million weights are not drawn
        features = getattr(torchvision.models, f"vgg{depth}")(weights=None).features
    features = features.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for parameter in features.parameters():
        spread = 0.1 if parameter.dim() == 1 else (2 / parameter[0].numel()) ** 0.5
        parameter.data.normal_(std=spread, generator=generator)
    return features.eval(), {f"features.{k}": v for k, v in features.state_dict().items()}


def build(*opts):
    """A backbone by its config."""
    return build_backbone(
        load_config("", ["MODEL.BACKBONE.NAME", "build_vgg_backbone", "MODEL.DEVICE", "cpu", *opts])
    )


def images(height, width, seed=1, dtype=torch.float32):
    return torch.randn(
        2, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


@pytest.mark.parametrize("size", [(32, 48), (45, 31)])
@pytest.mark.parametrize("depth", [11, 16])
def test_equals_torchvision(depth, size):
    features, state = torchvision_state(depth)
    model = build("MODEL.VGG.DEPTH", depth, "MODEL.VGG.OUT_FEATURES", STAGES)
    missing, unexpected = model.load_state_dict(state, strict=True)
    assert not missing
    assert not unexpected
    x = images(*size)
    with torch.no_grad():
        got = model(x.clone())
        wanted = {s: features[:p](x.clone()) for s, p in zip(STAGES, POOLS[depth])}
    assert list(got) == list(STAGES)
    shapes = model.output_shape()
    for i, name in enumerate(STAGES):
        assert wanted[name].std() > 0.01
        assert torch.equal(got[name], wanted[name])
        assert shapes[name] == ShapeSpec(channels=CHANNELS[i], stride=2**i)
        assert got[name].shape == (2, CHANNELS[i], size[0] >> i, size[1] >> i)


@pytest.mark.parametrize("depth", [11, 16])
def test_hole_algorithm_holds_the_strided_net(depth):
    """Every second cell of the dense map is a cell of the strided one."""
    _, state = torchvision_state(depth)
    x = images(64, 96, dtype=torch.float64)
    out = {}
    for stride, dilation in ((2, 1), (1, 2), (1, 1)):
        model = VGG(depth=depth, pool4_stride=stride, conv5_dilation=dilation).double()
        model.load_state_dict(state)
        with torch.no_grad():
            out[stride, dilation] = model(x)["conv5"]
        assert model.output_shape()["conv5"].stride == 8 * stride
    strided = out[2, 1]
    assert strided.shape[2:] == (4, 6)
    assert out[1, 2].shape[2:] == (8, 12)
    torch.testing.assert_close(out[1, 2][:, :, ::2, ::2], strided, rtol=1e-9, atol=1e-9)
    # Neither another phase nor the stride without the holes does it.
    for other in (out[1, 2][:, :, 1::2, 1::2], out[1, 1][:, :, ::2, ::2]):
        assert (other - strided).abs().mean() > 0.1 * strided.abs().mean()


def test_dense_map_keeps_the_size_of_conv4():
    opts = ("MODEL.VGG.OUT_FEATURES", ("conv5", "conv4"), "MODEL.VGG.POOL4_STRIDE", 1)
    model = build("MODEL.VGG.DEPTH", 11, *opts, "MODEL.VGG.CONV5_DILATION", 2)
    for height, width in ((8, 8), (40, 56), (47, 65)):
        got = model(images(height, width))
        assert list(got) == ["conv5", "conv4"]
        assert got["conv5"].shape == got["conv4"].shape == (2, 512, height // 8, width // 8)
    assert {k: v.stride for k, v in model.output_shape().items()} == {"conv5": 8, "conv4": 8}


def receptive_field(model, name, length, cell):
    """First and last pixel row that an output row reads. Maxima, which choose, become means."""

    def with_means(module):
        for child_name, child in module.named_children():
            if isinstance(child, nn.MaxPool2d):
                mean = nn.AvgPool2d(child.kernel_size, child.stride, child.padding)
                setattr(module, child_name, mean)
            with_means(child)

    with_means(model)
    for parameter in model.parameters():
        parameter.data.fill_(1.0 if parameter.dim() == 1 else 1 / parameter[0].numel())
    x = torch.ones(1, 3, length, 16, requires_grad=True)
    model(x)[name][0, :, cell].sum().backward()
    rows = x.grad.abs().sum(dim=(0, 1, 3)).nonzero()[:, 0]
    return int(rows[0]), int(rows[-1])


@pytest.mark.parametrize(("stride", "dilation"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("name", ["conv3", "conv4", "conv5"])
def test_cells_are_centred_where_the_offsets_say(name, stride, dilation):
    model = VGG(depth=11, out_features=(name,), pool4_stride=stride, conv5_dilation=dilation)
    per_cell = model.output_shape()[name].stride
    cell = 192 // per_cell
    first, last = receptive_field(model, name, 384, cell)
    assert first > 0
    assert last < 383
    centre = (first + last + 1) / 2  # pixel p covers [p, p + 1)
    assert centre == per_cell * cell + model.cell_offsets()[name]
    if name == "conv5":
        assert model.cell_offsets()[name] == 8  # also at stride 8: not half a stride


@pytest.mark.parametrize("freeze_at", range(6))
def test_freezing(freeze_at):
    model = build(
        "MODEL.VGG.DEPTH",
        11,
        "MODEL.BACKBONE.FREEZE_AT",
        freeze_at,
        "MODEL.VGG.OUT_FEATURES",
        STAGES,
    )
    out = model(images(16, 16))["conv5"]
    assert out.requires_grad == (freeze_at < 5)
    if out.requires_grad:
        out.sum().backward()
    frozen = 0 if freeze_at == 0 else POOLS[11][freeze_at - 1]
    for name, parameter in model.named_parameters():
        wants = int(name.split(".")[1]) >= frozen
        assert parameter.requires_grad == wants
        assert (parameter.grad is not None) == wants


def test_later_stages_are_not_built():
    """Distributed training would wait for their gradients."""
    model = VGG(depth=16, out_features=("conv4",), freeze_at=5)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 10
    assert not any(p.requires_grad for p in model.parameters())
    model = VGG(depth=11, out_features=("conv2", "conv1"))
    assert list(model(images(7, 9))) == ["conv2", "conv1"]


def test_drawn_weights_keep_the_scale():
    """He's normal by the outputs, as torchvision's; no bias."""
    torch.manual_seed(0)
    for name, parameter in VGG(depth=11).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            wanted = (2 / (parameter.shape[0] * 9)) ** 0.5
            assert parameter.std().item() == pytest.approx(wanted, rel=0.06)


@pytest.mark.parametrize(
    ("message", "opts"),
    [
        ("MODEL.VGG.DEPTH must be 11, 13, 16 or 19: 12", ("MODEL.VGG.DEPTH", 12)),
        ("OUT_FEATURES must name some of conv1, .*pool5", ("MODEL.VGG.OUT_FEATURES", ("pool5",))),
        ("OUT_FEATURES", ("MODEL.VGG.OUT_FEATURES", ())),
        ("MODEL.VGG.POOL4_STRIDE must be 1 or 2: 3", ("MODEL.VGG.POOL4_STRIDE", 3)),
        ("MODEL.VGG.CONV5_DILATION must be .*: 0", ("MODEL.VGG.CONV5_DILATION", 0)),
        ("MODEL.BACKBONE.FREEZE_AT must be 0 to 5.*: 6", ("MODEL.BACKBONE.FREEZE_AT", 6)),
        ("3 channels for a VGG: 1", ("MODEL.PIXEL_MEAN", [0.0], "MODEL.PIXEL_STD", [1.0])),
    ],
)
def test_bad_settings_name_the_key(message, opts):
    with pytest.raises(ValueError, match=message):
        build(*opts)


def test_bad_images():
    model = VGG(depth=11)
    for shape in ((3, 32, 32), (1, 1, 32, 32), (1, 3, 15, 32), (1, 3, 32, 15)):
        with pytest.raises(ValueError, match=r"at least 16 pixels high and wide: \("):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="at least 8 pixels"):
        VGG(depth=11, pool4_stride=1)(torch.zeros(1, 3, 7, 32))


@pytest.mark.parametrize("depth", [11, 16])
def test_converted_checkpoint_loads(depth, tmp_path):
    _, state = torchvision_state(depth)
    torch.save(state | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "w.pth")
    converted = convert("torchvision", tmp_path / "w.pth")
    assert set(converted["model"]) == set(state)
    save_converted(converted, tmp_path / "c.pth")
    model = nn.Module()
    model.backbone = build("MODEL.VGG.DEPTH", depth)
    SafeCheckpointer(model, str(tmp_path)).load(str(tmp_path / "c.pth"))
    for name, parameter in model.backbone.named_parameters():
        assert torch.equal(parameter, state[name])


def test_other_vggs_are_refused(tmp_path):
    _, state = torchvision_state(11)

    def refused(weights, message):
        torch.save(weights, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=message):
            convert("torchvision", tmp_path / "w.pth")

    refused(
        {k: v for k, v in state.items() if k != "features.3.bias"}, r"missing features\.3\.bias"
    )
    refused(state | {"features.1.weight": torch.zeros(64)}, r"unknown features\.1\.weight")
    refused(state | {"features.3.bias": torch.zeros(5)}, r"features\.3\.bias has shape \(5,\)")
    refused({k: v for k, v in state.items() if "18" not in k}, "7 convolutions is not known")
