"""Models. Importing registers backbones, heads and meta-architectures with Detectron2."""

from unseg.modeling.backbone import FilterBank, build_filter_bank_backbone
from unseg.modeling.meta_arch import FreeSOLO, MaskDiscovery

__all__ = ["FilterBank", "FreeSOLO", "MaskDiscovery", "build_filter_bank_backbone"]
