"""torchvision's VGGs for ``build_vgg_backbone``, which keeps their names."""

import logging

import torch
from torchvision.models import vgg as torchvision_vgg

from unseg.checkpoint.resnet import Weights, check_weights
from unseg.checkpoint.safe import CheckpointError

logger = logging.getLogger(__name__)

# Number of convolutions -> torchvision's letter; the name counts three linear layers more.
_CONFIGURATIONS = {8: "A", 10: "B", 13: "D", 16: "E"}


def is_vgg(weights: Weights) -> bool:
    """Whether these are the names of a torchvision VGG, whole or without its classifier."""
    return "features.0.weight" in weights


def convert_vgg(weights: Weights, path: str) -> Weights:
    """The convolutions of a torchvision VGG state dict, checked; the classifier is left out.

    Raises:
        CheckpointError: it is no VGG-11, 13, 16 or 19 without batch normalisation; the message
            names what is missing, unknown or of another shape.
    """
    kept = {k: v for k, v in weights.items() if not k.startswith("classifier.")}
    kernels = sum(v.dim() == 4 for v in kept.values())
    if kernels not in _CONFIGURATIONS:
        raise CheckpointError(f"{path}: a VGG with {kernels} convolutions is not known")
    with torch.device("meta"):
        features = torchvision_vgg.make_layers(torchvision_vgg.cfgs[_CONFIGURATIONS[kernels]])
    expected = {f"features.{k}": v.shape for k, v in features.state_dict().items()}
    check_weights(kept, expected, f"{path} is not a plain VGG-{kernels + 3}")
    logger.info("%s: VGG-%d, %d weights", path, kernels + 3, len(kept))
    return kept
