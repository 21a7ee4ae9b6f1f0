"""Released checkpoints to Detectron2's names: every weight finds its place, or it fails."""

import logging
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from torch import Tensor

from unseg.checkpoint.files import atomic_write
from unseg.checkpoint.safe import CheckpointError, load_weights_file

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


def _unwrap(content: Any, path: str, keys: tuple[str, ...]) -> Weights:
    """The state dict inside a checkpoint, tried under these keys, else the checkpoint itself."""
    for key in keys:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    weights = {k: torch.as_tensor(v) for k, v in content.items() if hasattr(v, "shape")}
    if not weights:
        raise CheckpointError(f"{path} holds no weights (its keys: {sorted(content)[:5]})")
    return weights


def _under_prefix(weights: Weights, prefixes: tuple[str, ...], path: str) -> Weights:
    """Keys below the first of the prefixes under which there is a ResNet stem."""
    for prefix in prefixes:
        if f"{prefix}conv1.weight" in weights:
            return {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
    raise CheckpointError(
        f"{path} holds no ResNet: none of "
        + ", ".join(repr(f"{p}conv1.weight") for p in prefixes)
        + f" is among its {len(weights)} keys, e.g. {sorted(weights)[:3]}"
    )


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
    blocks = {m[1] for k in renamed if (m := re.match(r"res4\.(\d+)\.", k))}
    bottleneck = any(k.startswith("res2.0.conv3") for k in renamed)
    depth = _DEPTH_BY_THIRD_STAGE.get((len(blocks), bottleneck))
    if depth is None:
        raise CheckpointError(f"{path}: a ResNet with {len(blocks)} blocks in layer3 is not known")
    expected = expected_resnet(depth)
    problems = [f"missing {k}" for k in expected.keys() - renamed.keys()]
    problems += [f"unknown {k}" for k in renamed.keys() - expected.keys()]
    problems += [
        f"{k} has shape {tuple(renamed[k].shape)} instead of {tuple(shape)}"
        for k, shape in expected.items()
        if k in renamed and renamed[k].shape != shape
    ]
    if problems:
        shown = ", ".join(sorted(problems)[:8])
        raise CheckpointError(f"{path} is not a ResNet-{depth}: {len(problems)} problems: {shown}")
    logger.info("%s: ResNet-%d, %d weights", path, depth, len(renamed))
    return renamed


def _resnet_converter(
    keys: tuple[str, ...], prefixes: tuple[str, ...]
) -> Callable[[Any, str], Weights]:
    def convert_content(content: Any, path: str) -> Weights:
        weights = _unwrap(content, path, keys)
        return convert_resnet(_under_prefix(weights, prefixes, path), path)

    return convert_content


CONVERTERS: dict[str, Callable[[Any, str], Weights]] = {
    # https://github.com/WXinlong/DenseCL: whole pre-training state, or the extracted backbone
    "densecl": _resnet_converter(
        ("state_dict",), ("backbone.", "module.backbone.", "encoder_q.0.", "")
    ),
    # https://github.com/facebookresearch/moco: v1 and v2, v3 under base_encoder
    "moco": _resnet_converter(
        ("state_dict",), ("module.encoder_q.", "encoder_q.", "module.base_encoder.", "")
    ),
    # https://github.com/facebookresearch/dino: the ResNet-50, whole state or backbone only
    "dino": _resnet_converter(("teacher",), ("module.backbone.", "backbone.", "module.", "")),
    "torchvision": _resnet_converter((), ("",)),
}


def convert(kind: str, path: str | os.PathLike) -> dict[str, Any]:
    """Read a released checkpoint and give its weights Detectron2's names.

    Args:
        kind: "densecl", "moco", "dino" or "torchvision".
        path: the local file.

    Returns:
        ``{"model": {name: tensor}, "__author__": ..., "matching_heuristics": True}``: a backbone
        that Detectron2 loads into any model with that ResNet, with or without an FPN around it.

    Raises:
        KeyError: the kind is unknown.
        CheckpointError: the file is damaged, or is not of that kind.
    """
    if kind not in CONVERTERS:
        raise KeyError(f"unknown kind of checkpoint {kind!r}; there are: {', '.join(CONVERTERS)}")
    model = CONVERTERS[kind](load_weights_file(path), str(path))
    return {"model": model, "__author__": f"unseg ({kind})", "matching_heuristics": True}


def save_converted(checkpoint: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a converted checkpoint as ``.pth``, atomically."""
    with atomic_write(path, "wb") as file:
        torch.save(checkpoint, file)
