"""DeepMask's PyTorch port: every weight finds its place, and the outputs are the port's."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from torch import nn
from torchvision.models import resnet50

from unseg.checkpoint import CheckpointError, SafeCheckpointer, convert, save_converted
from unseg.config import load_config

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Symmetric(nn.Module):
    """cba|abc|cba along both axes."""

    def forward(self, x):
        for axis in (2, 3):
            first, last = x.narrow(axis, 0, 3), x.narrow(axis, x.shape[axis] - 3, 3)
            x = torch.cat((first.flip(axis), x, last.flip(axis)), dim=axis)
        return x


class Port(nn.Module):
    """The port's layers under its names, as the specification's table has them: torchvision's
    ResNet-50 up to layer3, padded convolutions behind their padding."""

    def __init__(self):
        super().__init__()
        net = resnet50()
        net.conv1.padding = (0, 0)
        for layer in (net.layer1, net.layer2, net.layer3):
            for block in layer:
                block.conv2.padding = (0, 0)
                block.conv2 = nn.Sequential(nn.ReflectionPad2d(1), block.conv2)
        stem = nn.Sequential(Symmetric(), net.conv1)
        body = nn.Sequential(
            stem, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3
        )
        embed = nn.Sequential(nn.Conv2d(1024, 128, 1), nn.ReLU(), nn.Conv2d(128, 512, 10))
        self.trunk = nn.Sequential(body, embed)
        self.maskBranch = nn.Sequential(nn.Sequential(nn.Conv2d(512, 56**2, 1)))
        self.scoreBranch = nn.Sequential(
            nn.Dropout(0.5),
            nn.Conv2d(512, 1024, 1),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Conv2d(1024, 1, 1),
        )

    def forward(self, patches):
        """Masks (P, 112, 112) and scores (P,), logits, of patches (P, 3, 192, 192)."""
        vectors = self.trunk(patches)[:, :, 1:-1, 1:-1]  # (P, 512, 1, 1)
        masks = self.maskBranch(vectors).view(-1, 1, 56, 56)
        masks = F.interpolate(masks, (112, 112), mode="bilinear", align_corners=True)
        return masks[:, 0], self.scoreBranch(vectors).flatten()


@pytest.fixture(scope="module")
def port():
    torch.manual_seed(0)
    model = Port()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after a training: nothing is 0 or 1
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@pytest.fixture
def write(tmp_path):
    def write(state):
        path = tmp_path / "port.pth.tar"
        torch.save(
            {"state_dict": state, "epoch": 7, "arch": "DeepMask", "max_acc": 0.5, "optimizer": {}},
            path,
        )
        return path

    return write


def constants(model, **changes):
    """The names and shapes of `model`, each of one stored value: small files."""
    state = {
        name: torch.full((), float(i)).expand(value.shape)
        for i, (name, value) in enumerate(model.state_dict().items())
    }
    return state | changes


def test_the_table_has_268_tensors(port, write):
    state = constants(port)
    assert len(state) == 268
    converted = convert("deepmask", write(state))
    assert not converted["matching_heuristics"]
    found = converted["model"]
    assert len(found) == 225
    pairs = {
        "trunk.0.0.1.weight": "backbone.stem.conv1.weight",
        "trunk.0.1.running_var": "backbone.stem.conv1.norm.running_var",
        "trunk.0.4.2.conv1.weight": "backbone.res2.2.conv1.weight",
        "trunk.0.5.1.conv2.1.weight": "backbone.res3.1.conv2.weight",
        "trunk.0.6.5.bn3.bias": "backbone.res4.5.conv3.norm.bias",
        "trunk.0.6.0.downsample.0.weight": "backbone.res4.0.shortcut.weight",
        "trunk.0.6.0.downsample.1.running_mean": "backbone.res4.0.shortcut.norm.running_mean",
        "trunk.1.2.weight": "head.embed.weight",
        "maskBranch.0.0.bias": "head.mask.bias",
        "scoreBranch.4.weight": "head.score.fc2.weight",
    }
    for theirs, ours in pairs.items():
        assert torch.equal(found[ours], state[theirs]), theirs


def test_prefixes_and_missing_counters(port, write):
    state = constants(port)
    plain = convert("deepmask", write(state))["model"]
    prefixed = {f"module.{name}": value for name, value in state.items()}
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    for other in (prefixed, old):
        found = convert("deepmask", write(other))["model"]
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("trunk.0.4.1.conv2.1.weight"), "missing trunk.0.4.1.conv2.1.weight"),
        (lambda s: s.update({"trunk.0.7.bias": torch.ones(1)}), "unknown trunk.0.7.bias"),
        (
            lambda s: s.update({"trunk.0.3.num_batches_tracked": torch.ones(1)}),
            "unknown trunk.0.3.num_batches_tracked",
        ),
        (
            lambda s: s.update({"maskBranch.0.0.weight": torch.ones(1).expand(3136, 512)}),
            r"maskBranch.0.0.weight has shape \(3136, 512\) instead of \(3136, 512, 1, 1\)",
        ),
        (
            lambda s: s.update({"module.trunk.1.0.bias": s.pop("trunk.1.0.bias")}),
            "missing trunk.1.0.bias, unknown module.trunk.1.0.bias",
        ),
    ],
)
def test_anything_else_is_refused(port, write, change, words):
    state = constants(port)
    change(state)
    with pytest.raises(CheckpointError, match=words):
        convert("deepmask", write(state))


def test_another_network_is_refused(write):
    with pytest.raises(CheckpointError, match="port.pth.tar is not the PyTorch port's DeepMask"):
        convert("deepmask", write({"conv1.weight": torch.ones(1)}))


def test_outputs_are_those_of_the_port(port, write, tmp_path):
    save_converted(convert("deepmask", write(port.state_dict())), tmp_path / "ours.pth")
    options = {
        "MODEL.META_ARCHITECTURE": "DeepMask",
        "MODEL.DEVICE": "cpu",
        "MODEL.RESNETS.OUT_FEATURES": ["res4"],
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.DEEPMASK.PAD_MODE": "port",
        "MODEL.DEEPMASK.ALIGN_CORNERS": True,
        "MODEL.DEEPMASK.TEST.SCALES": [-1.0],
        "MODEL.DEEPMASK.TEST.TOPK": 1,
        "MODEL.PIXEL_MEAN": [255 * x for x in MEAN],
        "MODEL.PIXEL_STD": [255 * x for x in STD],
        "INPUT.FORMAT": "RGB",
    }
    model = build_model(load_config("", [x for pair in options.items() for x in pair])).eval()
    SafeCheckpointer(model).load(str(tmp_path / "ours.pth"))
    patches = torch.randint(0, 256, (2, 3, 192, 192), generator=torch.manual_seed(1)).float()
    batch = {
        "image": torch.zeros(3, 64, 64, dtype=torch.uint8),
        "height": 64,
        "width": 64,
        "patches": patches,
    }
    with torch.no_grad():
        output = model([batch])[0]
        normal = (patches / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
            3, 1, 1
        )
        masks, scores = port(normal)
    assert masks.std() > 0.01  # there is something to compare
    assert scores.std() > 1e-4
    torch.testing.assert_close(output["patch_logits"], masks, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output["patch_scores"], scores, rtol=1e-4, atol=1e-4)
