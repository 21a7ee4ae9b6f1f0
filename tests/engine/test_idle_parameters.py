"""Parameters that rest in a step: neither decay nor momentum moves them."""

import copy

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn
from toy_training import ToyModel, register_toy_dataset, toy_cfg

from unseg.config import get_cfg
from unseg.engine import Trainer
from unseg.engine.hooks import let_idle_parameters_rest
from unseg.engine.optimizer import build_optimizer


class Turns(nn.Module):
    """A trunk and two heads that learn in turns."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(3, 3)
        self.heads = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
        self.turn = 0

    def idle_parameters(self):
        return list(self.heads[1 - self.turn].parameters())

    def loss(self, turn):
        self.turn = turn
        x = self.trunk(torch.ones(2, 3))
        return self.heads[turn](x).square().sum() + 0 * self.heads[1 - turn](x).sum()


def cfg_of(optimizer, clip):
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER = optimizer
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.WEIGHT_DECAY = cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.1
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = bool(clip)
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip or "value"
    return cfg


@pytest.mark.parametrize("clip", ["", "value", "norm"])
@pytest.mark.parametrize("optimizer_name", ["SGD", "ADAMW"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_idle_parameters_do_not_move(optimizer_name, clip, wrapped):
    torch.manual_seed(0)
    model = Turns()
    optimizer = build_optimizer(cfg_of(optimizer_name, clip), model)
    let_idle_parameters_rest(optimizer, nn.Sequential(nn.ReLU(), model) if wrapped else model)
    for turn in (0, 1, 1, 0, 1, 0, 0):
        before = copy.deepcopy(model.state_dict())
        state = copy.deepcopy(optimizer.state.get(model.heads[1 - turn].weight, {}))
        optimizer.zero_grad(set_to_none=False)
        model.loss(turn).backward()
        parameters = [group["params"] for group in optimizer.param_groups]
        optimizer.step()
        assert [group["params"] for group in optimizer.param_groups] == parameters
        for name, value in model.state_dict().items():
            rests = name.startswith(f"heads.{1 - turn}")
            assert torch.equal(value, before[name]) == rests, name
        after = optimizer.state.get(model.heads[1 - turn].weight, {})
        assert state.keys() == after.keys()
        for key in state:
            assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(after[key]))


def test_without_it_zeros_as_gradients_move_them():
    """What the above is about: the same steps, and the idle head is not where it was."""
    model = Turns()
    optimizer = build_optimizer(cfg_of("SGD", ""), model)
    model.loss(0).backward()
    before = model.heads[1].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.heads[1].weight, before)


def test_other_models_are_left_alone():
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(cfg_of("SGD", ""), model)
    let_idle_parameters_rest(optimizer, model)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.fixture
def toy_dataset(tmp_path):
    register_toy_dataset(tmp_path)
    yield
    DatasetCatalog.remove("toy_train")
    MetadataCatalog.remove("toy_train")


def test_the_trainer_registers_it(tmp_path, toy_dataset, monkeypatch):
    monkeypatch.setattr(ToyModel, "idle_parameters", lambda self: [self.out.weight], raising=False)
    trainer = Trainer(toy_cfg(tmp_path, SOLVER__MAX_ITER=2, SOLVER__WEIGHT_DECAY=0.1))
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    after = trainer.model.state_dict()
    assert torch.equal(after["out.weight"], before["out.weight"])
    assert not torch.equal(after["out.bias"], before["out.bias"])
    assert not torch.equal(after["net.0.weight"], before["net.0.weight"])
