"""Contrast of objects with exemplars (Ishtiak et al., "Exemplar-FreeSOLO: Enhancing Unsupervised
Instance Segmentation with Exemplars", CVPR 2023, the loss of the exemplar embedding contrastive
head).

Legend: N objects, K exemplars, D embedding length.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def compare_with_exemplars(instance_embeddings: Tensor, pool_embeddings: Tensor) -> Tensor:
    """Cosines (N, K), in float32 at least, of embeddings (N, D) and (K, D) of any length.

    Rows of zeros (objects without a mask) have no direction: their cosines are NaN.

    Raises:
        ValueError: the shapes do not fit, or the pool is empty.
    """
    if instance_embeddings.dim() != 2 or pool_embeddings.dim() != 2:
        raise ValueError(
            "instance_embeddings and pool_embeddings must have shapes (N, D) and (K, D), got "
            f"{tuple(instance_embeddings.shape)} and {tuple(pool_embeddings.shape)}"
        )
    if instance_embeddings.shape[1] != pool_embeddings.shape[1]:
        raise ValueError(
            f"instance_embeddings have length {instance_embeddings.shape[1]}, pool_embeddings "
            f"{pool_embeddings.shape[1]}: they are of different backbones or features"
        )
    if len(pool_embeddings) == 0:
        raise ValueError("the exemplar pool is empty: pool_embeddings has no rows")
    dtype = torch.promote_types(instance_embeddings.dtype, torch.float32)
    instances, pool = instance_embeddings.to(dtype), pool_embeddings.to(dtype)
    cosines = F.normalize(instances, dim=1) @ F.normalize(pool, dim=1).t()
    return cosines.masked_fill(~instances.any(dim=1, keepdim=True), math.nan)


def choose_exemplars(
    similarities: Tensor, alpha: float, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Which exemplars an object is drawn to, and which it is pushed away from.

    Args:
        similarities: (N, K) cosines; rows of NaN have neither.
        alpha, beta: the positive is the most similar exemplar if it is above alpha [choice of
            ours: the paper says an exemplar above it], the negatives are all below beta.

    Returns:
        has_positive (N,) bool, positive (N,) int64 (of no meaning without one), negatives (N, K)
        bool.
    """
    best, positive = similarities.nan_to_num(nan=-math.inf).max(dim=1)
    return best > alpha, positive, similarities < beta


def exemplar_contrastive_loss(
    instance_embeddings: Tensor,
    pool_embeddings: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
    reduction: str = "mean",
) -> Tensor:
    """L = -log(pos / (pos + neg)) of each object, pos = exp(s+ / T), neg = mean of exp(s- / T).

    s+ is the cosine with its positive, s- those with its negatives, see :func:`choose_exemplars`.
    Objects without a positive or without a negative do not count.

    Args:
        instance_embeddings: (N, D) float; rows of zeros do not count.
        pool_embeddings: (K, D) float.
        alpha, beta: cosines above and below which exemplars are positive and negative.
        temperature: T.
        reduction: "mean" over the objects that count [ours], or "sum" (the paper's formula).

    Returns:
        a scalar in float32 (float64 of such embeddings); 0, and still dependent on the embeddings,
        where no object counts.

    Raises:
        ValueError: shapes do not fit, the pool is empty, ``not -1 <= beta <= alpha <= 1``, the
            temperature is not positive, or the reduction is another word.
    """
    check_thresholds(alpha, beta, temperature, reduction)
    similarities = compare_with_exemplars(instance_embeddings, pool_embeddings)
    has_positive, positive, negatives = choose_exemplars(similarities.detach(), alpha, beta)
    counts = has_positive & negatives.any(dim=1)
    # Rows that do not count are given numbers, so that no gradient of theirs is NaN.
    logits = similarities.masked_fill(~counts[:, None], 0.0) / temperature
    negatives = negatives | ~counts[:, None]
    attraction = logits.gather(1, positive[:, None])[:, 0]
    number = negatives.sum(dim=1).to(logits.dtype)
    repulsion = logits.masked_fill(~negatives, -math.inf).logsumexp(dim=1) - number.log()
    # -log(e^a / (e^a + e^r)) without the exponentials, which overflow at small temperatures.
    losses = F.softplus(repulsion - attraction) * counts
    # What does not count keeps its (zero) gradient, and passes on a NaN of the model.
    total = losses.sum() + 0.0 * instance_embeddings.to(logits.dtype).sum()
    return total / counts.sum().clamp(min=1) if reduction == "mean" else total


def largest_exemplar_loss(alpha: float, beta: float, temperature: float) -> float:
    """What no object's loss is above: its positive is above alpha, its negatives are below beta.

    With thresholds far apart and a low temperature it is so near 0 that nothing is learned.
    """
    return math.log1p(math.exp((beta - alpha) / temperature))


def check_thresholds(alpha: float, beta: float, temperature: float, reduction: str) -> None:
    """Raise ValueError, with the name, for settings of no such loss."""
    if not -1 <= beta <= alpha <= 1:
        raise ValueError(f"-1 <= beta <= alpha <= 1 is needed, got alpha {alpha}, beta {beta}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
