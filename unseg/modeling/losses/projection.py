"""Weak mask losses: a mask is compared by its projections on the axes (FreeSOLO, section 3.2).

Legend: P masks, h w mask pixels.
"""

import torch
from torch import Tensor


def dice_loss(a: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    """1 - 2 sum(ab) / (sum(a^2) + sum(b^2) + eps) over the last dimension: (P, n) -> (P,)."""
    overlap = (a * b).sum(dim=-1)
    return 1 - 2 * overlap / ((a * a).sum(dim=-1) + (b * b).sum(dim=-1) + eps)


def max_projection_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Dice of the maxima over columns plus dice of the maxima over rows (BoxInst, equation 4).

    The maximum is taken of logits: the sigmoid keeps their order, so that it is computed for
    h + w values instead of h * w.

    Args:
        logits: (P, h, w) float.
        targets: (P, h, w) bool.

    Returns:
        (P,) float32 in [0, 2].
    """
    total = 0
    for dim in (1, 2):
        predicted = logits.max(dim=dim).values.float().sigmoid()
        total = total + dice_loss(predicted, targets.any(dim=dim).float())
    return total


def avg_projection_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Dice of the means over columns plus dice of the means over rows (FreeSOLO, equation 5).

    Args:
        logits: (P, h, w) float.
        targets: (P, h, w) bool.

    Returns:
        (P,) float32 in [0, 2].
    """
    probabilities = logits.float().sigmoid()
    total = 0
    for dim in (1, 2):
        expected = targets.sum(dim=dim, dtype=torch.float32) / targets.shape[dim]
        total = total + dice_loss(probabilities.mean(dim=dim), expected)
    return total
