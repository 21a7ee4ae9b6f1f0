"""Loss functions: tensors in, tensors out."""

from unseg.modeling.losses.pairwise import (
    color_edges,
    downsample_colors,
    half_neighbourhood,
    pairwise_affinity,
)
from unseg.modeling.losses.projection import avg_projection_loss, dice_loss, max_projection_loss

__all__ = [
    "avg_projection_loss",
    "color_edges",
    "dice_loss",
    "downsample_colors",
    "half_neighbourhood",
    "max_projection_loss",
    "pairwise_affinity",
]
