"""Choosing channels of dense features: noise channel reduction (NCR) by entropy and deviation-based
channel reduction (DCR), of "Deep Spectral Improvement for Unsupervised Image Instance Segmentation"
(Arefi, Mansourian and Kasaei, 2024).

Legend: n patches, C channels, B histogram bins.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NCR_MODES = ("paper", "reference_fg")


def channel_histograms(features: Tensor, bins: int = 30) -> Tensor:
    """Counts of each channel in equal bins between its own minimum and maximum.

    The maximum falls into the last bin, a constant channel into the first.

    Args:
        features: (n, C) float.

    Returns:
        (C, B) int64.
    """
    low, high = features.amin(dim=0), features.amax(dim=0)  # aminmax takes six times as long
    span = high - low
    # One pass for all channels: bin b of channel c is entry c * B + b.
    position = (features - low).div_(torch.where(span > 0, span, 1.0)).mul_(bins)
    index = position.to(torch.int32).clamp_(max=bins - 1)
    index += bins * torch.arange(features.shape[1], dtype=torch.int32, device=features.device)
    counts = torch.bincount(index.flatten(), minlength=bins * features.shape[1])
    return counts.view(-1, bins)


def channel_entropy(features: Tensor, bins: int = 30) -> Tensor:
    """Entropy in bits of the values of each channel; log2 of `bins` for a uniform one, 0 for a
    constant one.

    Args:
        features: (n, C) float.

    Returns:
        (C,) float64.
    """
    return _entropy(channel_histograms(features, bins), len(features))


def _entropy(counts: Tensor, total: int) -> Tensor:
    # Sorted, so that equal counts in another order give the same bits, and ties are ties.
    share = counts.sort(dim=1).values.double() / total
    return torch.special.entr(share).sum(dim=1) / torch.log(share.new_tensor(2.0))


def entropy_channel_reduction(
    features: Tensor, keep: int, *, bins: int = 30, mode: str = "paper"
) -> tuple[Tensor, Tensor]:
    """NCR: the channels of lowest entropy, the noisy ones left out.

    Args:
        features: (n, C) float, as the backbone gives them.
        keep: number of channels to keep, at most C.
        bins: of the histograms.
        mode: "paper" ranks by entropy. "reference_fg" is what the published code does for its
            foreground graph: on L2-normalised patches, channels with an empty bin come last.

    Returns:
        the kept channels (n, keep) of `features` and their indices (keep,) in the order of rising
        entropy, the lower index first where entropies are equal.

    Raises:
        ValueError: a wrong shape, number or mode.
    """
    _check(features, keep)
    if mode not in NCR_MODES:
        raise ValueError(f"mode must be one of {NCR_MODES}, got {mode!r}")
    if mode == "paper":
        entropy = channel_entropy(features, bins)
    else:
        counts = channel_histograms(F.normalize(features, dim=1), bins)
        entropy = _entropy(counts, len(features))
        entropy[(counts == 0).any(dim=1)] = torch.inf
    kept = entropy.argsort(stable=True)[:keep]
    return features.index_select(1, kept), kept


def deviation_channel_reduction(features: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """DCR: the channels of highest standard deviation over all patches.

    Args:
        features: (n, C) float.
        keep: number of channels to keep, at most C.

    Returns:
        the kept channels (n, keep) and their indices (keep,) in the order of falling deviation,
        the lower index first where deviations are equal.

    Raises:
        ValueError: a wrong shape or number.
    """
    _check(features, keep)
    variance = (features - features.mean(dim=0)).square_().mean(dim=0)
    kept = variance.argsort(descending=True, stable=True)[:keep]
    return features.index_select(1, kept), kept


def _check(features: Tensor, keep: int) -> None:
    if features.dim() != 2 or len(features) == 0:
        raise ValueError(f"features must have shape (n, C), n > 0, got {tuple(features.shape)}")
    if not 1 <= keep <= features.shape[1]:
        raise ValueError(f"keep must be from 1 to {features.shape[1]} channels, got {keep}")
