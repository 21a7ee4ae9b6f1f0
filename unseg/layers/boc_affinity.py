"""BoC, the affinity of Bray-Curtis over Chebyshev, of all pairs of rows in one pass.

Compiled kernels run where there are some (:func:`~unseg.layers.native.has_native`), plain PyTorch
elsewhere, on the features' own device: three calls of :func:`torch.cdist`.

Source: the affinity of Deep Spectral Improvement (NCR, DCR, BoC), as in specs/deep_spectral.md 1.6.

Dimensions: n rows (patches), C channels.
"""

import torch
from torch import Tensor

from unseg.layers.native import has_op

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Pairs that the plain version has in hand at a time: bounds what it takes besides the result.
_CHUNK_PAIRS = 1 << 22


def boc_affinity(features: Tensor) -> Tensor:
    """BoC of all pairs of rows: grows with the Chebyshev, falls with the Bray-Curtis distance.

    For two rows a and b, with sums and maximum over the channels::

        BoC(a, b) = (1 + max |a - b|) / (1 + BC),    BC = sum |a - b| / sum |a + b|

    It is 0 where BC is infinite (``b = -a``) or NaN (two rows of zeros), and 1 on the diagonal,
    for rows of zeros too. Values are raw, not divided by the largest, and exactly symmetric.

    Nothing here waits for a GPU, so values are not checked: a row with NaN or an infinity, or so
    large that its sums or BC overflow, has affinity 0 to every other row that this concerns. The
    compiled kernels add up in one fixed order, so that the bits depend neither on the processor nor
    on the number of threads. Memory besides the result: a copy of the features, and without the
    kernels what some rows of the result take.

    Args:
        features: ``(n, C)`` of float32 or float64; float16 and bfloat16 are taken to float32.
            n and C may be 0; without channels the result is the identity.

    Returns:
        ``(n, n)`` float32, float64 for float64 features. It carries no gradient: `features` are
        detached.

    Raises:
        TypeError: `features` is no tensor or of another dtype.
        ValueError: `features` does not have two dimensions.
    """
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a tensor, not {type(features).__name__}")
    if features.dtype not in _DTYPES:
        raise TypeError(f"features must be floating, not {features.dtype}")
    if features.dim() != 2:
        raise ValueError(f"features must have shape (n, C), not {tuple(features.shape)}")
    features = features.detach()
    if has_op("boc_affinity", features.device):
        return torch.ops.unseg.boc_affinity(features)
    return boc_affinity_reference(features)


def boc_affinity_reference(features: Tensor) -> Tensor:
    """:func:`boc_affinity` in plain PyTorch, some rows at a time.

    Args:
        features: ``(n, C)`` of a dtype that :func:`boc_affinity` takes, without gradient.

    Returns:
        ``(n, n)`` float32, float64 for float64 features.
    """
    x = features if features.dtype == torch.float64 else features.float()
    count = x.shape[0]
    affinity = x.new_empty((count, count))
    step = max(1, _CHUNK_PAIRS // max(count, 1))
    for begin in range(0, count, step):
        rows = x[begin : begin + step]
        ratio = torch.cdist(rows, x, p=1.0).div_(torch.cdist(rows, -x, p=1.0))
        chebyshev = torch.cdist(rows, x, p=float("inf"))
        raw = chebyshev.add_(1.0).div_(1.0 + ratio)
        affinity[begin : begin + step] = raw.masked_fill_(~ratio.isfinite(), 0.0)
    # cdist gives 0 / 0 there for rows of zeros.
    return affinity.fill_diagonal_(1.0)
