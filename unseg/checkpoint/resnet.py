"""ResNets of other projects under Detectron2's names."""

import logging
import re
from collections.abc import Iterable

import torch
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from torch import Tensor

from unseg.checkpoint.safe import CheckpointError

logger = logging.getLogger(__name__)

Weights = dict[str, Tensor]

# Number of blocks in the third stage tells the ResNets apart.
_DEPTH_BY_THIRD_STAGE = {
    (2, False): 18,
    (6, False): 34,
    (6, True): 50,
    (23, True): 101,
    (36, True): 152,
}


def resnet_name(key: str) -> str:
    """torchvision's name of a ResNet weight in Detectron2's terms."""
    key = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", key)
    key = re.sub(r"\bdownsample\.0\b", "shortcut", key)
    key = re.sub(r"\bdownsample\.1\b", "shortcut.norm", key)
    key = re.sub(r"\bbn(\d)\b", r"conv\1.norm", key)
    return key if key.startswith("res") else f"stem.{key}"


def expected_resnet(depth: int) -> dict[str, torch.Size]:
    """Names and shapes of the weights of Detectron2's ResNet of that depth."""
    with torch.device("meta"):
        stages = ResNet.make_default_stages(depth, norm="BN")
        model = ResNet(BasicStem(norm="BN"), stages)
    state = model.state_dict()
    return {k: v.shape for k, v in state.items() if not k.endswith("num_batches_tracked")}


def resnet_depth(keys: Iterable[str], path: str) -> int:
    """Depth of the ResNet whose weights have these names of Detectron2's.

    Raises:
        CheckpointError: no ResNet has them.
    """
    keys = list(keys)
    blocks = {m[1] for k in keys if (m := re.match(r"res4\.(\d+)\.", k))}
    bottleneck = any(k.startswith("res2.0.conv3") for k in keys)
    depth = _DEPTH_BY_THIRD_STAGE.get((len(blocks), bottleneck))
    if depth is None:
        raise CheckpointError(f"{path}: a ResNet with {len(blocks)} blocks in layer3 is not known")
    return depth


def check_weights(weights: Weights, expected: dict[str, torch.Size], problem: str) -> None:
    """Names and shapes must match.

    Raises:
        CheckpointError: they do not; the message is `problem` and the first differences.
    """
    problems = [f"missing {k}" for k in expected.keys() - weights.keys()]
    problems += [f"unknown {k}" for k in weights.keys() - expected.keys()]
    problems += [
        f"{k} has shape {tuple(weights[k].shape)} instead of {tuple(shape)}"
        for k, shape in expected.items()
        if k in weights and weights[k].shape != shape
    ]
    if problems:
        shown = ", ".join(sorted(problems)[:8])
        raise CheckpointError(f"{problem}: {len(problems)} problems: {shown}")


def convert_resnet(weights: Weights, path: str) -> Weights:
    """A torchvision-style ResNet state dict under Detectron2's names.

    Classifier weights (``fc``) and batch counters are left out; anything else must match the
    ResNet exactly.

    Raises:
        CheckpointError: weights are missing, unknown or of another shape; the message names them.
    """
    renamed = {
        resnet_name(k): v
        for k, v in weights.items()
        if not k.startswith("fc.") and not k.endswith("num_batches_tracked")
    }
    depth = resnet_depth(renamed, path)
    check_weights(renamed, expected_resnet(depth), f"{path} is not a ResNet-{depth}")
    logger.info("%s: ResNet-%d, %d weights", path, depth, len(renamed))
    return renamed
