"""The released FreeSOLO checkpoints: names and shapes, and what is known about their contents."""

import logging

import torch

from unseg.checkpoint.resnet import Weights, check_weights, expected_resnet, resnet_depth

logger = logging.getLogger(__name__)

_BACKBONE = "backbone.bottom_up."


def _conv(name: str, out: int, before: int, kernel: int, *, bias: bool) -> dict[str, torch.Size]:
    shapes = {f"{name}.weight": torch.Size((out, before, kernel, kernel))}
    return shapes | ({f"{name}.bias": torch.Size((out,))} if bias else {})


def _norm(name: str, channels: int) -> dict[str, torch.Size]:
    return {f"{name}.{part}": torch.Size((channels,)) for part in ("weight", "bias")}


def expected_freesolo(depth: int) -> dict[str, torch.Size]:
    """Names and shapes of a released FreeSOLO: 336 entries at depth 50, 591 at depth 101.

    They are those of :class:`unseg.modeling.FreeSOLO` with the preset "compat".
    """
    shapes = {"_iter": torch.Size((1,))}
    shapes |= {_BACKBONE + k: v for k, v in expected_resnet(depth).items()}
    for level, width in zip((2, 3, 4, 5), (256, 512, 1024, 2048), strict=True):
        shapes |= _conv(f"backbone.fpn_lateral{level}", 256, width, 1, bias=True)
        shapes |= _conv(f"backbone.fpn_output{level}", 256, 256, 3, bias=True)
    for tower, first in (("cate", 256), ("kernel", 258)):
        for i in range(4):  # convolution, norm, ReLU
            name = f"ins_head.{tower}_tower"
            shapes |= _conv(f"{name}.{3 * i}", 512, 512 if i else first, 3, bias=False)
            shapes |= _norm(f"{name}.{3 * i + 1}", 512)
    for name, out in (("cate", 2), ("kernel", 256), ("emb", 128)):
        shapes |= _conv(f"ins_head.{name}_pred", out, 512, 3, bias=True)
    for level in range(4):
        for i in range(max(level, 1)):
            name = f"mask_head.convs_all_levels.{level}.conv{i}"
            before = 128 if i else (258 if level == 3 else 256)
            shapes |= _conv(f"{name}.0", 128, before, 3, bias=False) | _norm(f"{name}.1", 128)
    shapes |= _conv("mask_head.conv_pred.0", 256, 128, 1, bias=False)
    return shapes | _norm("mask_head.conv_pred.1", 256)


def check_freesolo(weights: Weights, path: str) -> Weights:
    """The weights, if they are those of a released FreeSOLO; logs what to beware of.

    Raises:
        CheckpointError: weights are missing, unknown or of another shape; the message names them.
    """
    backbone = {k.removeprefix(_BACKBONE) for k in weights if k.startswith(_BACKBONE)}
    depth = resnet_depth(backbone, path)
    check_weights(weights, expected_freesolo(depth), f"{path} is not a FreeSOLO R{depth}")
    logger.info("%s: FreeSOLO, ResNet-%d, %d weights", path, depth, len(weights))
    logger.warning(
        "%s: the released code trained ins_head.emb_pred by nothing (its loss was set to 0): "
        "the embeddings of this model mean nothing",
        path,
    )
    logger.warning(
        "%s has 2 categories, of which the second is always negative: load it with "
        "MODEL.FREESOLO.NUM_CLASSES 2 (the _compat configs)",
        path,
    )
    return weights
