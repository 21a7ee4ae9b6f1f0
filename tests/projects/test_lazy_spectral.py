"""The LazyConfig of spectral segmentation is the YAML of its name; there is nothing to train."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from quick import ROOT

from unseg.config import load_config
from unseg.data import build_mapper

PATH = ROOT / "projects/DeepSpectral/configs/deep_spectral.py"
YAML = str(PATH.with_suffix(".yaml"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return instantiate(LazyConfig.load(str(PATH)).model).eval()


def test_same_model(model):
    expected = build_model(load_config(YAML, ["MODEL.DEVICE", "cpu"]))
    assert str(model) == str(expected)
    for name in ("settings", "oracle_sampling", "output_intermediates", "in_feature"):
        assert getattr(model, name) == getattr(expected, name), name
    assert model.max_patches == expected.max_patches
    assert model.backbone.out_features == expected.backbone.out_features
    assert (model.backbone.block, model.backbone.freeze) == (11, True)
    assert model.discoverer.settings == expected.discoverer.settings
    assert torch.equal(model.pixel_mean, expected.pixel_mean)
    assert torch.equal(model.pixel_std, expected.pixel_std)
    shapes = {name: x.shape for name, x in expected.state_dict().items()}
    assert {name: x.shape for name, x in model.state_dict().items()} == shapes


@pytest.mark.usefixtures("quick_datasets")
def test_evaluates(model, tmp_path):
    lazy, cfg = LazyConfig.load(str(PATH)), load_config(YAML)
    assert [lazy.dataloader.test.dataset.names.name] == list(cfg.DATASETS.TEST)
    mapper, expected = instantiate(lazy.dataloader.test.mapper), build_mapper(cfg, False)
    assert mapper.image_format == expected.image_format
    (ours,), (theirs,) = mapper.augmentations.augs, expected.augmentations.augs
    assert type(ours) is type(theirs)
    assert vars(ours) == vars(theirs)
    lazy.dataloader.test.dataset.names.name = "quick_val"
    lazy.dataloader.test.num_workers = 0
    lazy.train.output_dir = str(tmp_path)
    loader, evaluator = instantiate(lazy.dataloader.test), instantiate(lazy.dataloader.evaluator)
    assert set(inference_on_dataset(model, loader, evaluator)) == {"bbox", "segm"}
