"""The LazyConfig of long-tail discovery is long_tail_R_50_FPN.yaml, and trains the head."""

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.solver import LRMultiplier, build_lr_scheduler
from lazy_cases import modules, of_parameters
from quick import ROOT
from torch import nn

from unseg.config import load_config
from unseg.engine.optimizer import build_optimizer

PATH = ROOT / "projects/LongTail/configs/long_tail.py"
YAML = PATH.with_name("long_tail_R_50_FPN.yaml")


@pytest.fixture
def lazy():
    return LazyConfig.load(str(PATH))


def test_same_model(lazy):
    expected = build_model(load_config(str(YAML), ["MODEL.DEVICE", "cpu"]))
    found, expected = instantiate(lazy.model), expected
    assert {k: v.shape for k, v in found.state_dict().items()} == {
        k: v.shape for k, v in expected.state_dict().items()
    }
    found, expected = modules(found), modules(expected)
    for parts in (found, expected):  # {} and weights of 1 are the same
        parts["roi_heads.box_predictor"][1].pop("loss_weight")
    assert found == expected


def test_same_optimizer(lazy):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    cfg = load_config(str(YAML))
    expected = build_optimizer(cfg, model)
    lazy.optimizer.params.model = model
    optimizer = instantiate(lazy.optimizer)
    assert type(optimizer) is type(expected)
    groups = [of_parameters(x) for x in (optimizer, expected)]
    for settings in (s for group in groups for s in group.values()):
        settings.pop("fused")  # the same numbers, faster on a CPU
    assert groups[0] == groups[1]
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    schedules = [
        build_lr_scheduler(cfg, expected),
        LRMultiplier(optimizer, instantiate(lazy.lr_multiplier), lazy.train.max_iter),
    ]
    rates = []
    for schedule in schedules:
        schedule.optimizer.step()
        rates.append([])
        for _ in range(50):
            rates[-1].append(schedule.optimizer.param_groups[0]["lr"])
            schedule.step()
    np.testing.assert_allclose(*rates, rtol=1e-6)
    assert rates[0][-1] < rates[0][0] == 1e-4


@pytest.mark.usefixtures("quick_datasets")
def test_trains_the_head_alone(lazy):
    overrides = (
        "model.roi_heads.embedding_head.encoder.conv_dim=16",
        "dataloader.train.dataset.names=quick_train",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
    )
    lazy = LazyConfig.apply_overrides(lazy, list(overrides))
    stages = lazy.model.backbone.bottom_up.stages
    stages.depth = 18
    del stages.stride_in_1x1  # blocks of two convolutions have none
    torch.manual_seed(0)
    model = instantiate(lazy.model).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lazy.optimizer.params.model = model
    trainer = SimpleTrainer(model, instantiate(lazy.dataloader.train), instantiate(lazy.optimizer))
    trainer.train(0, 2)
    changed = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
    assert changed
    assert all(name.startswith("roi_heads.embedding_head.") for name in changed)
