"""ROI heads."""

from unseg.modeling.roi_heads.exemplar import ExemplarROIHeads

__all__ = ["ExemplarROIHeads"]
