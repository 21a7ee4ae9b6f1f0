"""Models. Importing registers backbones, heads and meta-architectures with Detectron2."""

from unseg.modeling.backbone import (
    VGG,
    DinoViT,
    FilterBank,
    FPNWithBottomUp,
    build_dino_vit_backbone,
    build_filter_bank_backbone,
    build_vgg_backbone,
)
from unseg.modeling.exemplars import (
    ExemplarContrast,
    ExemplarFeatureError,
    encode_exemplars,
    find_exemplar_head,
    with_exemplars,
)
from unseg.modeling.meta_arch import (
    DeepMask,
    DeepSpectral,
    ExemplarFreeSOLO,
    FreeSOLO,
    InstanceFCN,
    LongTailDiscoveryRCNN,
    MaskDiscovery,
    SharpMask,
)
from unseg.modeling.proposals.generator import InstanceFCNProposalGenerator
from unseg.modeling.roi_heads import (
    ROI_EMBEDDING_HEAD_REGISTRY,
    ExemplarROIHeads,
    HierarchicalEmbedding,
    HierarchicalEmbeddingCascadeROIHeads,
    HierarchicalEmbeddingHead,
    HierarchicalEmbeddingRes5ROIHeads,
    HierarchicalEmbeddingROIHeads,
    build_roi_embedding_head,
)

__all__ = [
    "ROI_EMBEDDING_HEAD_REGISTRY",
    "VGG",
    "DeepMask",
    "DeepSpectral",
    "DinoViT",
    "ExemplarContrast",
    "ExemplarFeatureError",
    "ExemplarFreeSOLO",
    "ExemplarROIHeads",
    "FPNWithBottomUp",
    "FilterBank",
    "FreeSOLO",
    "HierarchicalEmbedding",
    "HierarchicalEmbeddingCascadeROIHeads",
    "HierarchicalEmbeddingHead",
    "HierarchicalEmbeddingROIHeads",
    "HierarchicalEmbeddingRes5ROIHeads",
    "InstanceFCN",
    "InstanceFCNProposalGenerator",
    "LongTailDiscoveryRCNN",
    "MaskDiscovery",
    "SharpMask",
    "build_dino_vit_backbone",
    "build_filter_bank_backbone",
    "build_roi_embedding_head",
    "build_vgg_backbone",
    "encode_exemplars",
    "find_exemplar_head",
    "with_exemplars",
]
