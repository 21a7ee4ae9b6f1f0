"""Backbones."""

from unseg.modeling.backbone.dino_vit import DinoViT, build_dino_vit_backbone
from unseg.modeling.backbone.filter_bank import FilterBank, build_filter_bank_backbone
from unseg.modeling.backbone.resnet_fpn import (
    FPNWithBottomUp,
    build_resnet_fpn_no_top_backbone,
    build_resnet_fpn_with_bottom_up_backbone,
)
from unseg.modeling.backbone.vgg import VGG, build_vgg_backbone

__all__ = [
    "VGG",
    "DinoViT",
    "FPNWithBottomUp",
    "FilterBank",
    "build_dino_vit_backbone",
    "build_filter_bank_backbone",
    "build_resnet_fpn_no_top_backbone",
    "build_resnet_fpn_with_bottom_up_backbone",
    "build_vgg_backbone",
]
