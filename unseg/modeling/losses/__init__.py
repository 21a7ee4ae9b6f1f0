"""Loss functions: tensors in, tensors out."""

from unseg.modeling.losses.exemplar import (
    check_thresholds,
    choose_exemplars,
    compare_with_exemplars,
    exemplar_contrastive_loss,
    largest_exemplar_loss,
)
from unseg.modeling.losses.pairwise import (
    color_edges,
    downsample_colors,
    half_neighbourhood,
    pairwise_affinity,
)
from unseg.modeling.losses.projection import avg_projection_loss, dice_loss, max_projection_loss

__all__ = [
    "avg_projection_loss",
    "check_thresholds",
    "choose_exemplars",
    "color_edges",
    "compare_with_exemplars",
    "dice_loss",
    "downsample_colors",
    "exemplar_contrastive_loss",
    "half_neighbourhood",
    "largest_exemplar_loss",
    "max_projection_loss",
    "pairwise_affinity",
]
