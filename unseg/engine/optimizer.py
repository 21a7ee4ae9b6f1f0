"""The optimizer of ``cfg.SOLVER``, with the same parameter groups in every Detectron2 version."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

_OPTIMIZERS = ("SGD", "ADAMW")
_NORMS = (
    nn.modules.batchnorm._NormBase,  # batch and instance norms, also the synchronised ones
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in groups of equal learning rate and weight decay.

    Normalisation layers get WEIGHT_DECAY_NORM, other biases WEIGHT_DECAY_BIAS (unset in Detectron2
    main: WEIGHT_DECAY; 0.5 sets it to 1e-4, so a config with another WEIGHT_DECAY should name
    both). Detectron2 0.5 makes a group of every parameter and main merges them: their optimizer
    states cannot be exchanged, these can. Groups are in order of appearance in the model.
    """
    solver = cfg.SOLVER
    bias_decay = solver.WEIGHT_DECAY_BIAS
    bias_decay = solver.WEIGHT_DECAY if bias_decay is None else bias_decay
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            is_bias = name == "bias"
            rate = solver.BASE_LR * (solver.BIAS_LR_FACTOR if is_bias else 1.0)
            decay = bias_decay if is_bias else solver.WEIGHT_DECAY
            if isinstance(module, _NORMS):
                decay = solver.WEIGHT_DECAY_NORM
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW as ``cfg.SOLVER.OPTIMIZER`` says, with Detectron2's gradient clipping.

    Raises:
        ValueError: the optimizer is unknown.
    """
    name = cfg.SOLVER.OPTIMIZER.upper()
    groups = parameter_groups(cfg, model)
    if name == "SGD":
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD)
        return optimizer(
            groups,
            lr=cfg.SOLVER.BASE_LR,
            momentum=cfg.SOLVER.MOMENTUM,
            nesterov=cfg.SOLVER.NESTEROV,
        )
    if name == "ADAMW":
        # On a CPU the unfused step takes as long as a tenth of a small model's. On a GPU it would
        # get gradients that AMP has scaled, and clip those.
        on_cpu = all(p.device.type == "cpu" for group in groups for p in group["params"])
        return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(
            groups, lr=cfg.SOLVER.BASE_LR, fused=on_cpu or None
        )
    raise ValueError(f"SOLVER.OPTIMIZER {cfg.SOLVER.OPTIMIZER!r} is not one of {_OPTIMIZERS}")
