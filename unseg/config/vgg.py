"""cfg.MODEL.VGG: torchvision's VGG (MODEL.BACKBONE.NAME build_vgg_backbone)."""

from detectron2.config import CfgNode


def add_vgg_config(cfg: CfgNode) -> None:
    """Add the keys of the VGG to `cfg` in place.

    torchvision's weights, converted by ``unseg.tools.convert_weights torchvision``, go into
    MODEL.WEIGHTS; they take RGB images (INPUT.FORMAT) normalised by MODEL.PIXEL_MEAN
    (123.675, 116.28, 103.53) and MODEL.PIXEL_STD (58.395, 57.12, 57.375).

    MODEL.BACKBONE.FREEZE_AT, Detectron2's key, is the number of stages without gradients, 0 to 5;
    Detectron2's default is 2.
    """
    vgg = cfg.MODEL.VGG = CfgNode()
    # Layers with weights as the paper counts them: 11 (VGG-A), 13 (B), 16 (D) or 19 (E), all
    # without batch normalisation.
    vgg.DEPTH = 16
    # Stages to return, of "conv1" to "conv5": the maps before the pool that ends the stage. Later
    # stages are not built. Strides are 1, 2, 4, 8 and, by POOL4_STRIDE, 16.
    vgg.OUT_FEATURES = ("conv5",)
    # Stride of the pool between conv4 and conv5. 1 keeps conv5 at stride 8, of the size of conv4.
    vgg.POOL4_STRIDE = 2
    # Dilation of conv5's convolutions. 2 with POOL4_STRIDE 1 is the hole algorithm: conv5 sees what
    # it saw at stride 16, so that the same weights fit.
    vgg.CONV5_DILATION = 1
