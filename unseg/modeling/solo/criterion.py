"""The training losses of FreeSOLO (section 3.2): weak mask losses, focal loss, embeddings.

Legend: B images, N objects of the batch, P (cell, object) pairs, L levels, K cells of all levels,
E kernel channels, D embedding length, h w mask pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor

from unseg.modeling.losses import (
    avg_projection_loss,
    color_edges,
    half_neighbourhood,
    max_projection_loss,
    pairwise_affinity,
)
from unseg.modeling.solo.targets import Pairs, last_object_of_cells


@dataclass(frozen=True)
class FreeSOLOLossSettings:
    """Weights and constants of the losses; see unseg/config/freesolo.py."""

    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    focal_weight: float = 1.0
    max_projection_weight: float = 1.0
    avg_projection_weight: float = 0.1
    pairwise_weight: float = 1.0
    pairwise_size: int = 3
    pairwise_dilation: int = 2
    pairwise_color_thr: float = 0.3
    pairwise_warmup_iters: int = 1000
    bottom_pixels_removed: int = 10
    semantic_weight: float = 4.0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "FreeSOLOLossSettings":
        return cls(**{key.lower(): value for key, value in cfg.MODEL.FREESOLO.LOSS.items()})


@dataclass(frozen=True)
class Predictions:
    """What the heads say about a batch, in float32.

    Attributes:
        category_logits: (B, K, classes).
        kernels: (B, K, E).
        embeddings: (B, K, D).
        features: (B, E, h, w).
    """

    category_logits: Tensor
    kernels: Tensor
    embeddings: Tensor
    features: Tensor


@dataclass(frozen=True)
class Targets:
    """What a batch should be.

    Attributes:
        counts: objects of each of the B images, on the host.
        pairs: which cells learn which objects.
        centers: (N, 2), the objects' centres of mass as (x, y) pixel indices of the images.
        masks: (N, h, w) bool.
        embeddings: (N, D) float32; rows of zeros where an object has none.
        lab: (B, 3, h, w), colours of the image at mask resolution.
        valid: (B, h, w) bool, pixels that pairwise terms may use as neighbours.
    """

    counts: Sequence[int]
    pairs: Pairs
    centers: Tensor
    masks: Tensor
    embeddings: Tensor
    lab: Tensor
    valid: Tensor


def flatten_levels(levels: Sequence[Tensor]) -> Tensor:
    """L maps (B, C, S, S) -> (B, K, C) float32, level by level and row by row."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in levels], dim=1).float()


def mask_logits(kernels: Tensor, features: Tensor, counts: Sequence[int]) -> Tensor:
    """Dynamic 1x1 convolutions (SOLOv2, section 3.1).

    Args:
        kernels: (P, E), image after image.
        features: (B, E, h, w).
        counts: kernels per image.

    Returns:
        (P, h, w).
    """
    parts = [
        part @ feature.flatten(1)
        for part, feature in zip(kernels.split(list(counts)), features, strict=True)
    ]
    return torch.cat(parts).view(-1, *features.shape[-2:])


def mean_over_levels(values: Tensor, levels: Tensor, num_levels: int) -> Tensor:
    """Mean of values (P,) within each level, then over the levels that have any; a scalar."""
    sums = values.new_zeros(num_levels).index_add(0, levels, values)
    counts = values.new_zeros(num_levels).index_add(0, levels, torch.ones_like(values))
    return (sums / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)


def focal_loss(logits: Tensor, owner: Tensor, settings: FreeSOLOLossSettings) -> Tensor:
    """Sigmoid focal loss over all cells and channels, by the number of positive cells + 1.

    Args:
        logits: (B, K, classes); objects are of class 0, other channels always negative.
        owner: (B, K), -1 for background.
    """
    positive = owner >= 0
    target = torch.zeros_like(logits)
    target[..., 0] = positive.float()
    total = sigmoid_focal_loss(
        logits, target, alpha=settings.focal_alpha, gamma=settings.focal_gamma, reduction="sum"
    )
    return total / (positive.sum() + 1)


def semantic_loss(predicted: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """Mean of 1 - cosine over the rows (P, D) that count ((P,) bool) and have a target not 0."""
    counts = (counts & target.any(dim=1)).float()
    distance = 1 - F.cosine_similarity(predicted, target, dim=1)
    return (distance * counts).sum() / counts.sum().clamp(min=1)


def freesolo_losses(
    predictions: Predictions,
    targets: Targets,
    num_levels: int,
    settings: FreeSOLOLossSettings,
    pairwise_factor: Tensor | float = 1.0,
) -> dict[str, Tensor]:
    """All losses of a batch, weighted.

    Args:
        predictions: of the heads.
        targets: see :class:`Targets`.
        num_levels: L.
        settings: weights.
        pairwise_factor: share of the pairwise weight in this step (warm-up).

    Returns:
        scalars ``loss_category``, ``loss_max_projection``, ``loss_avg_projection``,
        ``loss_pairwise`` and, with a weight, ``loss_semantic``. Without objects the mask losses are
        0 and still depend on the predictions, so that every parameter has a gradient.
    """
    pairs = targets.pairs
    owner = last_object_of_cells(pairs, *predictions.category_logits.shape[:2])
    losses = {
        "loss_category": settings.focal_weight
        * focal_loss(predictions.category_logits, owner, settings)
    }
    # Parameters that no loss reaches (no objects, no semantic loss) get zeros for a gradient.
    zero = 0.0 * (
        predictions.kernels.sum() + predictions.embeddings.sum() + predictions.features.sum()
    )
    if settings.semantic_weight:
        is_last = owner[pairs.image, pairs.cell] == pairs.target
        predicted = predictions.embeddings[pairs.image, pairs.cell]
        losses["loss_semantic"] = zero + settings.semantic_weight * semantic_loss(
            predicted, targets.embeddings[pairs.target], is_last
        )
    logits = mask_logits(
        predictions.kernels[pairs.image, pairs.cell], predictions.features, pairs.counts
    )
    masks = targets.masks[pairs.target]
    for name, weight, function in (
        ("loss_max_projection", settings.max_projection_weight, max_projection_loss),
        ("loss_avg_projection", settings.avg_projection_weight, avg_projection_loss),
    ):
        value = mean_over_levels(function(logits, masks), pairs.level, num_levels)
        losses[name] = zero + weight * value
    shifts = half_neighbourhood(settings.pairwise_size, settings.pairwise_dilation)
    edges = color_edges(targets.lab, targets.valid, shifts, settings.pairwise_color_thr)
    sums, numbers = pairwise_affinity(logits, masks, pairs.image, edges, shifts)
    # Pairs, not masks, are averaged within a level.
    by_level = sums.new_zeros(num_levels).index_add(0, pairs.level, sums)
    number = numbers.new_zeros(num_levels).index_add(0, pairs.level, numbers)
    present = torch.zeros_like(number).index_add(0, pairs.level, torch.ones_like(sums)) > 0
    pairwise = (by_level / number.clamp(min=1)).sum() / present.sum().clamp(min=1)
    losses["loss_pairwise"] = zero + settings.pairwise_weight * pairwise_factor * pairwise
    return losses
