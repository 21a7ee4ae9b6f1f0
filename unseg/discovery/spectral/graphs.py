"""Affinities between patches, and the graph of foreground patches with one node for all others.

Legend: n patches, b of them background, f = n - b foreground, C channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unseg.layers import boc_affinity

AFFINITIES = ("boc", "boc_product", "braycurtis", "chebyshev", "cosine", "dot", "l1", "l2")


def affinity(features: Tensor, metric: str = "boc") -> Tensor:
    """Affinities between all rows; what the published method uses is "boc".

    * boc: Bray-Curtis over Chebyshev, (1 + CH) / (1 + BC), see `unseg.layers.boc_affinity`. It
      grows with the Chebyshev distance, as the method has it.
    * boc_product: 1 / ((1 + BC) (1 + CH)), its counterpart that falls with both distances.
    * braycurtis, chebyshev, l1, l2: 1 / (1 + distance). The Bray-Curtis distance of two rows of
      zeros is undefined: 0 is taken for their affinity, but 1 of a row with itself.
    * cosine, dot: clipped at 0.

    Args:
        features: (n, C) float.
        metric: one of the above.

    Returns:
        (n, n) float, symmetric (cosine and dot: to rounding), not negative.

    Raises:
        ValueError: an unknown metric, or another shape.
    """
    if features.dim() != 2:
        raise ValueError(f"features must have shape (n, C), got {tuple(features.shape)}")
    if metric == "boc":
        return boc_affinity(features)
    if metric in ("boc_product", "braycurtis"):
        # BoC = (1 + CH) / (1 + BC)
        similarity = boc_affinity(features)
        chebyshev = 1 + torch.cdist(features, features, p=torch.inf)
        return similarity.div_(chebyshev if metric == "braycurtis" else chebyshev.square_())
    if metric in ("chebyshev", "l1", "l2"):
        p = {"chebyshev": torch.inf, "l1": 1.0, "l2": 2.0}[metric]
        # Not by a matrix product, whose rounding makes distances of equal rows positive.
        distance = torch.cdist(features, features, p=p, compute_mode="donot_use_mm_for_euclid_dist")
        return distance.add_(1).reciprocal_()
    if metric in ("cosine", "dot"):
        x = F.normalize(features, dim=1) if metric == "cosine" else features
        return (x @ x.t()).clamp_(min=0)
    raise ValueError(f"metric must be one of {AFFINITIES}, got {metric!r}")


@dataclass(frozen=True)
class ForegroundGraph:
    """The graph of all patches, with the background patches' rows of zeros taken together.

    The published method sets the features of background patches to zero, so that all of them look
    alike. Then every eigenvector of the whole graph is either one of this quotient graph, with one
    value for all background patches, or vanishes on the foreground.

    Attributes:
        weights: (f + 1, f + 1), or (f, f) without background; the last node is the background.
        degenerate: the eigenvalue of the vectors that vanish on the foreground.
        multiplicity: their number.
    """

    weights: Tensor
    degenerate: float = 1.0
    multiplicity: int = 0


def foreground_graph(
    features: Tensor, num_background: int, metric: str = "boc", *, drop: bool = False
) -> ForegroundGraph:
    """The quotient graph of foreground patches and `num_background` patches of zeros.

    Weights are divided by their maximum, which changes no eigenvalue.

    Args:
        features: (f, C) float, rows of the foreground patches.
        num_background: b.
        metric: see :func:`affinity`.
        drop: leave the background out of the graph.
    """
    if drop or num_background == 0:
        weights = affinity(features, metric)
        return ForegroundGraph(_scaled(weights, weights.max()))
    count = len(features)
    # Two rows of zeros stand for all: one tells the affinities to the background and of a
    # background patch with itself, two those between background patches.
    weights = affinity(torch.cat((features, features.new_zeros(2, features.shape[1]))), metric)
    peak = weights.max()
    diagonal, between = weights[count, count].clone(), weights[count, count + 1].clone()
    degree = weights[:count, count].sum() + diagonal + (num_background - 1) * between
    quotient = weights[: count + 1, : count + 1].contiguous()
    del weights
    quotient[count, :count] *= num_background
    quotient[:count, count] *= num_background
    quotient[count, count] = num_background * (diagonal + (num_background - 1) * between)
    degenerate = 1 - (diagonal - between) / torch.where(degree > 0, degree, 1.0)
    return ForegroundGraph(_scaled(quotient, peak), float(degenerate), num_background - 1)


def _scaled(weights: Tensor, peak: Tensor) -> Tensor:
    return weights.div_(torch.where(peak > 0, peak, 1.0))
