"""Weights of the crops' network, from torchvision's files."""

import pytest
import torch
import torchvision
from torch import nn

from unseg.checkpoint import CheckpointError, convert, save_converted
from unseg.config import get_cfg
from unseg.engine.crop_weights import load_crop_weights
from unseg.modeling.roi_heads.region_encoders import CropEncoder


def make(depth=18):
    cfg = get_cfg()
    cfg.MODEL.HIERARCHICAL_EMBEDDING.CROP_DEPTH = depth
    return cfg, nn.Sequential(CropEncoder.build(cfg))


@pytest.fixture
def resnet(tmp_path):
    """torchvision's ResNet-18 with random weights and statistics, and its file converted."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.1, 0.1)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.uniform_(part.weight, 0.5, 1.5)
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    path = tmp_path / "r18_d2.pth"
    save_converted(convert("torchvision", tmp_path / "resnet18.pth"), path)
    return net.eval(), path


def test_the_network_is_torchvisions(resnet):
    net, path = resnet
    cfg, model = make()
    cfg.MODEL.HIERARCHICAL_EMBEDDING.CROP_WEIGHTS = str(path)
    load_crop_weights(model, cfg)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = nn.Sequential(*list(net.children())[:-2])(x)
        found = model[0].stages(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_nothing_to_load(resnet):
    cfg, model = make()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    load_crop_weights(model, cfg)  # no file named
    cfg.MODEL.HIERARCHICAL_EMBEDDING.CROP_WEIGHTS = "nowhere.pth"
    load_crop_weights(nn.Linear(2, 2), cfg)  # no such network
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_wrong_files(resnet, tmp_path):
    cfg, model = make(34)
    node = cfg.MODEL.HIERARCHICAL_EMBEDDING
    node.CROP_WEIGHTS = str(resnet[1])
    with pytest.raises(CheckpointError, match=r"r18_d2.pth is no Detectron2 ResNet-34"):
        load_crop_weights(model, cfg)
    node.CROP_WEIGHTS = str(tmp_path / "gone.pth")
    with pytest.raises(FileNotFoundError, match="gone.pth"):
        load_crop_weights(model, cfg)
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    node.CROP_WEIGHTS = str(tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="list.pth"):
        load_crop_weights(model, cfg)
