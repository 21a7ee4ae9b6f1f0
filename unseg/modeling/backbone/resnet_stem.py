"""A ResNet's first convolution as one of its maps."""

from collections.abc import Sequence

import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, ResNet
from detectron2.modeling.backbone.resnet import BasicStem
from torch import Tensor

STEM = "stem"


def shapes_with_stem(backbone: Backbone, names: Sequence[str], key: str) -> list[ShapeSpec]:
    """Channels and strides of a backbone's maps, where "stem" is what :func:`maps_with_stem` says.

    Args:
        backbone: any; "stem" needs Detectron2's ResNet with its ``BasicStem``.
        names: of maps.
        key: the config's key that names them, for messages.

    Raises:
        ValueError: there is no such map; the message names `key`.
    """
    shapes = dict(backbone.output_shape())
    # Detectron2's "stem" is the map after the pool, which nobody asks for here.
    shapes.pop(STEM, None)
    if isinstance(backbone, ResNet) and isinstance(backbone.stem, BasicStem):
        convolution = backbone.stem.conv1
        shapes[STEM] = ShapeSpec(channels=convolution.out_channels, stride=convolution.stride[0])
    missing = [name for name in names if name not in shapes]
    if missing:
        raise ValueError(
            f"{key} names {', '.join(missing)}: the backbone's maps are {', '.join(shapes)} "
            "(of a ResNet, those in MODEL.RESNETS.OUT_FEATURES and stem)"
        )
    return [shapes[name] for name in names]


def maps_with_stem(backbone: Backbone, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """A backbone's maps, with "stem" the first convolution after its norm and ReLU.

    Detectron2's own "stem" comes after the max pool, at stride 4; this one has stride 2.

    Args:
        backbone: as checked by :func:`shapes_with_stem`.
        images: (B, 3, H, W).
        names: of the maps that are wanted.

    Returns:
        by name (B, C, h, w), others of the backbone's among them.
    """
    if STEM not in names:
        return backbone(images)
    found: dict[str, Tensor] = {}
    # The stem's forward has no other place where it would let it go.
    handle = backbone.stem.conv1.register_forward_hook(
        lambda _, args, output: found.update({STEM: F.relu(output)})
    )
    try:
        return {**backbone(images), **found}
    finally:
        handle.remove()
