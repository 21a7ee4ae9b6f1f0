"""Released checkpoints to Detectron2's names: every weight finds its place, or it fails."""

import os
from collections.abc import Callable
from typing import Any

import torch

from unseg.checkpoint.deepmask import convert_deepmask
from unseg.checkpoint.files import atomic_write
from unseg.checkpoint.freesolo import check_freesolo
from unseg.checkpoint.resnet import Weights, convert_resnet
from unseg.checkpoint.safe import CheckpointError, load_weights_file
from unseg.checkpoint.vgg import convert_vgg, is_vgg
from unseg.checkpoint.vit import convert_vit


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


def _under_prefix(
    weights: Weights,
    prefixes: tuple[str, ...],
    path: str,
    first: str = "conv1.weight",
    what: str = "ResNet",
) -> Weights:
    """Keys below the first of the prefixes under which there is `first`, a weight of `what`."""
    for prefix in prefixes:
        if f"{prefix}{first}" in weights:
            return {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
    raise CheckpointError(
        f"{path} holds no {what}: none of "
        + ", ".join(repr(f"{p}{first}") for p in prefixes)
        + f" is among its {len(weights)} keys, e.g. {sorted(weights)[:3]}"
    )


def _resnet_converter(
    keys: tuple[str, ...], prefixes: tuple[str, ...]
) -> Callable[[Any, str], Weights]:
    def convert_content(content: Any, path: str) -> Weights:
        weights = _unwrap(content, path, keys)
        return convert_resnet(_under_prefix(weights, prefixes, path), path)

    return convert_content


def _convert_dino(content: Any, path: str) -> Weights:
    """DINO's ResNet-50 or one of its ViTs, from a whole training state or the backbone only."""
    weights = _unwrap(content, path, ("teacher",))
    prefixes = ("module.backbone.", "backbone.", "module.", "")
    stem = "patch_embed.proj.weight"
    if any(name.endswith((stem, "cls_token")) for name in weights):
        return convert_vit(_under_prefix(weights, prefixes, path, stem, "ViT"), path)
    return convert_resnet(_under_prefix(weights, prefixes, path), path)


def _convert_torchvision(content: Any, path: str) -> Weights:
    """torchvision's ResNets and plain VGGs."""
    weights = _unwrap(content, path, ())
    if is_vgg(weights):
        return convert_vgg(weights, path)
    return convert_resnet(_under_prefix(weights, ("",), path), path)


def _convert_freesolo(content: Any, path: str) -> Weights:
    return check_freesolo(_unwrap(content, path, ("model",)), path)


def _convert_deepmask(content: Any, path: str) -> Weights:
    return convert_deepmask(_unwrap(content, path, ("state_dict",)), path)


# These are whole models, to be loaded by their names.
_WHOLE = ("freesolo", "deepmask")

CONVERTERS: dict[str, Callable[[Any, str], Weights]] = {
    # https://github.com/WXinlong/DenseCL: whole pre-training state, or the extracted backbone
    "densecl": _resnet_converter(
        ("state_dict",), ("backbone.", "module.backbone.", "encoder_q.0.", "")
    ),
    # https://github.com/facebookresearch/moco: v1 and v2, v3 under base_encoder
    "moco": _resnet_converter(
        ("state_dict",), ("module.encoder_q.", "encoder_q.", "module.base_encoder.", "")
    ),
    # https://github.com/facebookresearch/dino: whole state or backbone only; timm's files of it
    "dino": _convert_dino,
    "torchvision": _convert_torchvision,
    # https://github.com/NVlabs/FreeSOLO: a whole model under our names already
    "freesolo": _convert_freesolo,
    # A PyTorch port of DeepMask (ResNet-50): a training state
    "deepmask": _convert_deepmask,
}


def convert(kind: str, path: str | os.PathLike) -> dict[str, Any]:
    """Read a released checkpoint and give its weights Detectron2's names.

    Args:
        kind: "densecl", "moco", "dino" or "torchvision", for a backbone; "freesolo" or
            "deepmask" (its PyTorch port).
        path: the local file.

    Returns:
        ``{"model": {name: tensor}, "__author__": ..., "matching_heuristics": bool}``. A backbone
        has heuristics on: Detectron2 loads it into any model with that ResNet, with or without an
        FPN around it, or with that ViT (``build_dino_vit_backbone``) or VGG
        (``build_vgg_backbone``). A FreeSOLO or DeepMask is loaded by its names, without optimizer
        and schedule.

    Raises:
        KeyError: the kind is unknown.
        CheckpointError: the file is damaged, or is not of that kind.
    """
    if kind not in CONVERTERS:
        raise KeyError(f"unknown kind of checkpoint {kind!r}; there are: {', '.join(CONVERTERS)}")
    model = CONVERTERS[kind](load_weights_file(path), str(path))
    return {
        "model": model,
        "__author__": f"unseg ({kind})",
        "matching_heuristics": kind not in _WHOLE,
    }


def save_converted(checkpoint: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a converted checkpoint as ``.pth``, atomically."""
    with atomic_write(path, "wb") as file:
        torch.save(checkpoint, file)
