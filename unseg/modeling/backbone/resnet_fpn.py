"""Feature pyramids that differ from Detectron2's in what they return."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor


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


class FPNWithBottomUp(FPN):
    """A pyramid that also returns what it is built on, e.g. res2 to res5 beside p2 to p6.

    The names of its weights are those of :class:`detectron2.modeling.FPN`.
    """

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """All maps of an image batch (B, C, H, W), by their names."""
        below: dict[str, Tensor] = {}
        # FPN.forward has no other place where it would let them go.
        handle = self.bottom_up.register_forward_hook(lambda _, args, output: below.update(output))
        try:
            return {**super().forward(x), **below}
        finally:
            handle.remove()

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {**super().output_shape(), **self.bottom_up.output_shape()}


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_with_bottom_up_backbone(
    cfg: CfgNode, input_shape: ShapeSpec
) -> FPNWithBottomUp:
    """``build_resnet_fpn_backbone`` that also returns the ResNet's ``MODEL.RESNETS.OUT_FEATURES``.

    p6 is there if the pyramid begins at res5; else its levels are those of
    :func:`build_resnet_fpn_no_top_backbone`.

    Args:
        cfg: MODEL.RESNETS and MODEL.FPN.
        input_shape: channels of the images.
    """
    levels = cfg.MODEL.FPN.IN_FEATURES
    return FPNWithBottomUp(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=levels,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool() if levels[-1] == "res5" else None,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
