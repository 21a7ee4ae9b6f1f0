"""ROI heads."""

from unseg.modeling.roi_heads.embedding_head import (
    ROI_EMBEDDING_HEAD_REGISTRY,
    HierarchicalEmbeddingHead,
    build_roi_embedding_head,
)
from unseg.modeling.roi_heads.exemplar import ExemplarROIHeads
from unseg.modeling.roi_heads.hierarchical_embedding import (
    HierarchicalEmbedding,
    HierarchicalEmbeddingCascadeROIHeads,
    HierarchicalEmbeddingRes5ROIHeads,
    HierarchicalEmbeddingROIHeads,
)

__all__ = [
    "ROI_EMBEDDING_HEAD_REGISTRY",
    "ExemplarROIHeads",
    "HierarchicalEmbedding",
    "HierarchicalEmbeddingCascadeROIHeads",
    "HierarchicalEmbeddingHead",
    "HierarchicalEmbeddingROIHeads",
    "HierarchicalEmbeddingRes5ROIHeads",
    "build_roi_embedding_head",
]
