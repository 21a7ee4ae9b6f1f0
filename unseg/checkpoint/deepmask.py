"""The PyTorch port's DeepMask checkpoints under the names of ``unseg.modeling.DeepMask``."""

import logging
import re

import torch

from unseg.checkpoint.resnet import Weights, check_weights, expected_resnet

logger = logging.getLogger(__name__)

_COUNTER = ".num_batches_tracked"

# The port's names and shapes beyond the ResNet, and ours.
_HEAD = {
    "trunk.1.0": ("head.reduce", (128, 1024, 1, 1)),
    "trunk.1.2": ("head.embed", (512, 128, 10, 10)),
    "maskBranch.0.0": ("head.mask", (3136, 512, 1, 1)),
    "scoreBranch.1": ("head.score.fc1", (1024, 512, 1, 1)),
    "scoreBranch.4": ("head.score.fc2", (1, 1024, 1, 1)),
}


def _port_name(name: str) -> str:
    """The port's name of a weight of Detectron2's ResNet.

    Convolutions larger than 1x1 lie one level deeper, behind the layer that pads for them.
    """
    name = re.sub(r"^stem\.conv1\.norm\.", "trunk.0.1.", name)
    name = re.sub(r"^stem\.conv1\.", "trunk.0.0.1.", name)
    name = re.sub(r"^res([234])\.", lambda m: f"trunk.0.{int(m[1]) + 2}.", name)
    name = re.sub(r"\.shortcut\.norm\.", ".downsample.1.", name)
    name = re.sub(r"\.shortcut\.", ".downsample.0.", name)
    name = re.sub(r"\.conv(\d)\.norm\.", r".bn\1.", name)
    return name.replace(".conv2.", ".conv2.1.")


def deepmask_names() -> dict[str, tuple[str, torch.Size]]:
    """Per weight of the port its name and its shape in ``unseg.modeling.DeepMask``.

    Without the 43 batch counters: 225 of 268 tensors.
    """
    names = {
        _port_name(name): (f"backbone.{name}", shape)
        for name, shape in expected_resnet(50).items()
        if not name.startswith("res5.")
    }
    for port, (ours, shape) in _HEAD.items():
        names[f"{port}.weight"] = (f"{ours}.weight", torch.Size(shape))
        names[f"{port}.bias"] = (f"{ours}.bias", torch.Size(shape[:1]))
    return names


def convert_deepmask(weights: Weights, path: str) -> Weights:
    """The port's DeepMask (ResNet-50, 160 + 32 pixels) for MODEL.META_ARCHITECTURE "DeepMask".

    The port pads by reflection and upsamples corner-aligned: MODEL.DEEPMASK.PAD_MODE "port" and
    ALIGN_CORNERS True give its outputs, RGB images in [0, 1] with ImageNet's mean and deviation
    its inputs.

    Args:
        weights: under the port's names, all of them with or without ``module.`` before them.
        path: the file, for messages.

    Raises:
        CheckpointError: weights are missing, unknown or of another shape; the message names them.
    """
    if weights and all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    names = deepmask_names()
    # Only norms have a running mean, and beside it a counter (none in files of old torch).
    counters = {
        name.removesuffix(".running_mean") + _COUNTER
        for name in names
        if name.endswith(".running_mean")
    }
    weights = {name: value for name, value in weights.items() if name not in counters}
    expected = {name: shape for name, (_, shape) in names.items()}
    check_weights(weights, expected, f"{path} is not the PyTorch port's DeepMask")
    logger.info("%s: DeepMask, %d weights", path, len(weights))
    return {names[name][0]: value for name, value in weights.items()}
