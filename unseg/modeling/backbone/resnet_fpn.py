"""A feature pyramid without a level on top."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, build_resnet_backbone


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_no_top_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ResNet-FPN with exactly the levels of ``MODEL.FPN.IN_FEATURES``.

    Detectron2's own builder puts p6 on p5, so that it cannot do without res5, which holds two
    thirds of a ResNet-18's weights: too many for small images and short trainings.

    Args:
        cfg: MODEL.RESNETS and MODEL.FPN.
        input_shape: channels of the images.
    """
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
