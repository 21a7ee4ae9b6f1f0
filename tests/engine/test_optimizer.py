"""The optimizer: the settings of each parameter, independent of Detectron2's grouping."""

import pytest
import torch
from detectron2.solver import build_optimizer as detectron2_build_optimizer
from torch import nn

from unseg.config import get_cfg
from unseg.engine import build_optimizer


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.GroupNorm(2, 4)
        self.batch_norm = nn.BatchNorm2d(4)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.head = nn.Linear(4, 2)
        self.tied = self.head


def settings(optimizer, model):
    """Parameter name -> (learning rate, weight decay)."""
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_every_trainable_parameter_has_its_own_settings():
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.WEIGHT_DECAY = 0.05
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.002
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.003
    cfg.SOLVER.BIAS_LR_FACTOR = 2.0
    model = Model()
    for name in ("SGD", "adamw"):
        cfg.SOLVER.OPTIMIZER = name
        optimizer = build_optimizer(cfg, model)
        assert settings(optimizer, model) == {
            "conv.weight": (0.01, 0.05),
            "conv.bias": (0.02, 0.003),
            "norm.weight": (0.01, 0.002),
            "norm.bias": (0.02, 0.002),
            "batch_norm.weight": (0.01, 0.002),
            "batch_norm.bias": (0.02, 0.002),
            "head.weight": (0.01, 0.05),
            "head.bias": (0.02, 0.003),
        }


def test_sgd_steps_are_detectron2s():
    """With Detectron2's default decays both optimizers move a model the same way."""
    cfg = get_cfg()
    cfg.SOLVER.WEIGHT_DECAY_NORM = cfg.SOLVER.WEIGHT_DECAY  # 0.5 and main differ in norm biases
    cfg.SOLVER.BASE_LR = 0.1
    results = []
    for build in (build_optimizer, detectron2_build_optimizer):
        torch.manual_seed(0)
        model = Model()
        optimizer = build(cfg, model)
        for _ in range(3):
            optimizer.zero_grad()
            model.head(model.norm(model.conv(torch.ones(2, 3, 5, 5))).mean((2, 3))).sum().backward()
            optimizer.step()
        results.append(model.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], msg=key)


def test_clipping_is_applied():
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR = 1.0
    cfg.SOLVER.MOMENTUM = 0.0
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    model = nn.Linear(3, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(cfg, model)
    model.weight.grad = torch.tensor([[30.0, 40.0, 0.0]])
    optimizer.step()
    torch.testing.assert_close(before - model.weight.detach(), torch.tensor([[0.3, 0.4, 0.0]]))


def test_unknown_optimizer():
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER = "LION"
    with pytest.raises(ValueError, match="LION"):
        build_optimizer(cfg, Model())
