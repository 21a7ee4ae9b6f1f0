"""What the tests of LazyConfigs share: comparing them with the YAMLs of their names."""

import dataclasses

import numpy as np
from detectron2.config import LazyConfig, instantiate
from detectron2.solver import LRMultiplier, build_lr_scheduler
from omegaconf import ListConfig
from torch import nn

from unseg.config import load_config
from unseg.engine.optimizer import build_optimizer


def plain(value):
    """Settings as comparable values; ... for what is none."""
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value)]
        return type(value), {name: plain(getattr(value, name)) for name in fields}
    if isinstance(value, ListConfig | list | tuple):
        return [plain(x) for x in value]
    if isinstance(value, dict):
        return {name: plain(x) for name, x in value.items()}
    if value is None or isinstance(value, bool | int | float | str | np.generic):
        return value
    return ...


def settings(thing):
    return {name: plain(x) for name, x in vars(thing).items() if plain(x) is not ...}


def modules(model):
    """Name of each submodule: its class and its settings."""
    return {name: (type(m), settings(m)) for name, m in model.named_modules()}


def of_parameters(optimizer):
    """The group's settings of each parameter."""
    return {
        p: {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
        for p in group["params"]
    }


def assert_same_optimizer(path, yaml=None, steps=1200):
    """Settings of each parameter, and the learning rates of the first steps, which it returns."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    cfg, lazy = load_config(str(yaml or path.with_suffix(".yaml"))), LazyConfig.load(str(path))
    expected = build_optimizer(cfg, model)
    lazy.optimizer.params.model = model
    optimizer = instantiate(lazy.optimizer)
    assert type(optimizer) is type(expected)
    assert of_parameters(optimizer) == of_parameters(expected)
    schedules = [
        build_lr_scheduler(cfg, expected),
        LRMultiplier(optimizer, instantiate(lazy.lr_multiplier), lazy.train.max_iter),
    ]
    rates = []
    for schedule in schedules:
        schedule.optimizer.step()
        rates.append([])
        for _ in range(steps):
            rates[-1].append(schedule.optimizer.param_groups[0]["lr"])
            schedule.step()
    np.testing.assert_allclose(*rates, rtol=1e-6)
    last = instantiate(lazy.lr_multiplier)(1.0)  # asked for after the last step
    np.testing.assert_allclose(last, cfg.SOLVER.GAMMA ** len(cfg.SOLVER.STEPS))
    return rates[0]
