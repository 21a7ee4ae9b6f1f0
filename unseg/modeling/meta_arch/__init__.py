"""Meta-architectures."""

from unseg.modeling.meta_arch.mask_discovery import MaskDiscovery

__all__ = ["MaskDiscovery"]
