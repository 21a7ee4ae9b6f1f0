"""Backbones."""

from unseg.modeling.backbone.filter_bank import FilterBank, build_filter_bank_backbone

__all__ = ["FilterBank", "build_filter_bank_backbone"]
