"""Mirror padding against numpy's, and whole backbones against convolutions that pad by numpy."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_backbone
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from unseg.config import load_config
from unseg.modeling.proposals.mirror_padding import mirror_pad, set_padding


def numpy_pad(x, pad, mode):
    widths = ((0, 0), (0, 0), (pad[0], pad[0]), (pad[1], pad[1]))
    return torch.from_numpy(np.pad(x.detach().numpy(), widths, mode=mode))


@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    pad=st.tuples(st.integers(0, 13), st.integers(0, 13)),
    mode=st.sampled_from(["symmetric", "reflect"]),
)
def test_equals_numpy(height, width, pad, mode):
    x = torch.arange(2.0 * height * width).view(1, 2, height, width)
    got = mirror_pad(x, pad, mode == "symmetric")
    assert torch.equal(got, numpy_pad(x, pad, mode))


def test_width_one_is_replicated():
    x = torch.tensor([1.0, 2, 3]).view(1, 1, 1, 3)
    assert mirror_pad(x, (0, 1), True).flatten().tolist() == [1, 1, 2, 3, 3]
    assert mirror_pad(x, (0, 1), False).flatten().tolist() == [2, 1, 2, 3, 2]
    assert mirror_pad(x, (0, 3), True).flatten().tolist() == [3, 2, 1, 1, 2, 3, 3, 2, 1]


@pytest.mark.parametrize("repeat_edge", [False, True])
@pytest.mark.parametrize("pad", [(1, 1), (3, 2), (6, 9)])
def test_gradients(repeat_edge, pad):
    x = torch.rand(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mirror_pad(x, pad, repeat_edge), (x,))


def test_maps_without_cells_are_refused():
    with pytest.raises(ValueError, match=r"without cells cannot be mirrored: \(1, 2, 0, 3\)"):
        mirror_pad(torch.zeros(1, 2, 0, 3), (1, 1), True)


def resnet(*opts):
    torch.manual_seed(0)
    return build_backbone(
        load_config(
            "",
            [
                "MODEL.DEVICE",
                "cpu",
                "MODEL.RESNETS.DEPTH",
                50,
                "MODEL.RESNETS.STEM_OUT_CHANNELS",
                8,
                "MODEL.RESNETS.RES2_OUT_CHANNELS",
                16,
                "MODEL.RESNETS.WIDTH_PER_GROUP",
                8,
                "MODEL.RESNETS.OUT_FEATURES",
                ["res2", "res4"],
                *opts,
            ],
        )
    )


def vgg():
    torch.manual_seed(0)
    return build_backbone(
        load_config("", ["MODEL.BACKBONE.NAME", "build_vgg_backbone", "MODEL.VGG.DEPTH", 11])
    )


class NumpyConv(nn.Module):
    """A convolution that pads by numpy."""

    def __init__(self, conv, mode):
        super().__init__()
        self.conv, self.mode = conv, mode

    def forward(self, x):
        conv = self.conv
        x = F.conv2d(
            numpy_pad(x, conv.padding, self.mode),
            conv.weight,
            conv.bias,
            conv.stride,
            0,
            conv.dilation,
        )
        norm = getattr(conv, "norm", None)
        return x if norm is None else norm(x)


def replace(module, modes):
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and child.kernel_size[0] > 1:
            setattr(module, name, NumpyConv(child, modes[child.kernel_size[0]]))
        else:
            replace(child, modes)


# By the kernel's size, as the two releases have it.
MODES = {
    "symmetric": {3: "symmetric", 7: "symmetric"},
    "port": {3: "reflect", 7: "symmetric"},
}


@pytest.mark.parametrize("mode", ["symmetric", "port"])
@pytest.mark.parametrize("build", [resnet, vgg])
@torch.no_grad()
def test_backbones(build, mode):
    plain = build()
    wanted_model = copy.deepcopy(plain)
    replace(wanted_model, MODES[mode])
    model = copy.deepcopy(plain)
    set_padding(model, mode)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    for size in ((48, 64), (17, 33)):  # the small one has maps narrower than a dilated padding
        x = torch.randn(1, 3, *size)
        wanted, got, zeros = wanted_model(x.clone()), model(x.clone()), plain(x.clone())
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name])
            assert got[name].shape == zeros[name].shape
            assert not torch.allclose(got[name], zeros[name], rtol=1e-2)


@torch.no_grad()
def test_inner_cells_and_zeros_are_as_before():
    plain = resnet("MODEL.RESNETS.OUT_FEATURES", ["res2"])
    x = torch.randn(1, 3, 96, 96)
    wanted = plain(x)["res2"]
    for mode in ("symmetric", "port"):
        model = copy.deepcopy(plain)
        set_padding(model, mode)
        got = model(x)["res2"]
        torch.testing.assert_close(got[..., 6:-6, 6:-6], wanted[..., 6:-6, 6:-6])
        assert not torch.allclose(got, wanted)
    model = copy.deepcopy(plain)
    set_padding(model, "zeros")
    assert torch.equal(model(x)["res2"], wanted)


@torch.no_grad()
def test_the_pool_does_not_mirror():
    """A ResNet's pool sees minus infinity beyond the border: a bright map stays what it is."""
    stem = resnet().stem
    x = torch.randn(1, 3, 16, 16)
    set_padding(stem, "symmetric")
    conv = F.relu(stem.conv1(x))
    assert torch.equal(stem(x), F.max_pool2d(conv, 3, 2, 1))


def test_copies_and_pickles_pad_as_well():
    model = resnet()
    set_padding(model, "symmetric")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = model(x)["res4"]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x)["res4"], wanted)


def test_dilated_convolutions():
    conv = nn.Sequential(nn.Conv2d(1, 1, 3, padding=2, dilation=2, bias=False))
    conv[0].weight.data.fill_(1.0)
    set_padding(conv, "symmetric")
    x = torch.arange(6.0).view(1, 1, 1, 6)
    wanted = F.conv2d(numpy_pad(x, (2, 2), "symmetric"), conv[0].weight, dilation=2)
    assert torch.equal(conv(x), wanted)


def test_what_cannot_be_padded_is_refused():
    with pytest.raises(ValueError, match="PAD_MODE must be one of zeros, symmetric, port: 'ring'"):
        set_padding(resnet(), "ring")
    with pytest.raises(ValueError, match="pads no convolution"):
        set_padding(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 4, stride=4)), "port")
    once = resnet()
    set_padding(once, "port")
    with pytest.raises(ValueError, match="pads no convolution"):  # a second time
        set_padding(once, "symmetric")
    own = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"))
    with pytest.raises(ValueError, match="circular"):
        set_padding(own, "symmetric")
    with pytest.raises(ValueError, match="same"):
        set_padding(nn.Sequential(nn.Conv2d(3, 3, 3, padding="same")), "symmetric")
    deformable = resnet("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, True, False])
    with pytest.raises(ValueError, match="deformable convolutions: res4.0.conv2"):
        set_padding(deformable, "symmetric")
