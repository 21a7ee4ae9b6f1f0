"""Loss functions: tensors in, tensors out."""

from unseg.modeling.losses.exemplar import (
    check_thresholds,
    choose_exemplars,
    compare_with_exemplars,
    exemplar_contrastive_loss,
    largest_exemplar_loss,
)
from unseg.modeling.losses.hierarchical import HierarchicalEmbeddingLoss
from unseg.modeling.losses.mask_relations import (
    MaskRelations,
    hierarchy_pairs,
    mask_relations,
    object_pairs,
    sample_mask_triplets,
    sample_negatives,
    sample_object_triplets,
)
from unseg.modeling.losses.pairwise import (
    color_edges,
    downsample_colors,
    half_neighbourhood,
    pairwise_affinity,
)
from unseg.modeling.losses.projection import avg_projection_loss, dice_loss, max_projection_loss

__all__ = [
    "HierarchicalEmbeddingLoss",
    "MaskRelations",
    "avg_projection_loss",
    "check_thresholds",
    "choose_exemplars",
    "color_edges",
    "compare_with_exemplars",
    "dice_loss",
    "downsample_colors",
    "exemplar_contrastive_loss",
    "half_neighbourhood",
    "hierarchy_pairs",
    "largest_exemplar_loss",
    "mask_relations",
    "max_projection_loss",
    "object_pairs",
    "pairwise_affinity",
    "sample_mask_triplets",
    "sample_negatives",
    "sample_object_triplets",
]
