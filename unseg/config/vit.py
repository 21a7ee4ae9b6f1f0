"""cfg.MODEL.VIT: DINO's vision transformer (MODEL.BACKBONE.NAME build_dino_vit_backbone)."""

from detectron2.config import CfgNode


def add_vit_config(cfg: CfgNode) -> None:
    """Add the keys of the ViT to `cfg` in place.

    DINO takes RGB images (INPUT.FORMAT) normalised by MODEL.PIXEL_MEAN (123.675, 116.28, 103.53)
    and MODEL.PIXEL_STD (58.395, 57.12, 57.375); its weights, converted by
    ``unseg.tools.convert_weights dino``, go into MODEL.WEIGHTS.
    """
    vit = cfg.MODEL.VIT = CfgNode()
    # "vit_small" (384 channels, 6 heads) or "vit_base" (768 channels, 12 heads), 12 blocks each.
    vit.ARCH = "vit_small"
    # Pixels per side of a patch, 16 or 8: the stride of the features.
    vit.PATCH_SIZE = 16
    # Which maps to return: "key", "query", "value" (the parts of the block's qkv layer) and "token"
    # (the whole block's output, without the final normalisation).
    vit.OUT_FEATURES = ("key",)
    # Index of the block they come from; -1 is the last. Blocks after it are not computed.
    vit.BLOCK = -1
    # No gradients for the weights, and eval mode always.
    vit.FREEZE = True
