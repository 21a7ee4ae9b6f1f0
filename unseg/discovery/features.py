"""Dense features of one image as rows of patches, checked and scaled.

Legend: h w patches, n = h * w, C channels.
"""

import math

import torch
from torch import Tensor

_MAX_EXPONENT = 120  # powers of two up to this, and their inverses, are exact in single precision


def patch_rows(features: Tensor) -> Tensor:
    """Features as rows, times a power of two with which squares neither overflow nor vanish.

    So nothing that follows may depend on the scale of the features.

    Args:
        features: (C, h, w) of any floating type.

    Returns:
        (n, C) float32, contiguous.

    Raises:
        ValueError: `features` is not (C, h, w) or not finite.
    """
    if features.dim() != 3:
        raise ValueError(f"features must have shape (C, h, w), got {tuple(features.shape)}")
    rows = features.float().flatten(1).t().contiguous()
    if not rows.numel():
        return rows
    peak = float(torch.stack(rows.aminmax()).abs().max())  # NaN if there is any
    if not math.isfinite(peak):
        raise ValueError("features hold NaN or infinite values")
    exponent = math.frexp(peak)[1]
    return rows * 2.0 ** max(-_MAX_EXPONENT, min(-exponent, _MAX_EXPONENT))
