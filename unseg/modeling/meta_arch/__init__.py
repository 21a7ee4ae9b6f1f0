"""Meta-architectures."""

from unseg.modeling.meta_arch.freesolo import FreeSOLO
from unseg.modeling.meta_arch.mask_discovery import MaskDiscovery

__all__ = ["FreeSOLO", "MaskDiscovery"]
