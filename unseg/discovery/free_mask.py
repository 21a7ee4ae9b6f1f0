"""Free Mask: query-key similarity of dense features as segmentation (Wang et al., "FreeSOLO:
Learning to Segment Objects without Annotations", CVPR 2022, section 3.1).

Legend: N queries, C channels, h w feature cells, H W image pixels, D embedding length.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from unseg.discovery.registry import DISCOVERERS, FunctionDiscoverer
from unseg.layers import matrix_nms
from unseg.structures import PseudoMask, make_pseudo_masks

# Similarities, and masks at the size of the image, are computed for as many queries at a time as
# fit this many floats.
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class FreeMaskSettings:
    """Constants of the method; the defaults are the paper's. See unseg/config/discovery.py."""

    scales: Sequence[float] = (1.0, 0.5, 0.25)
    mask_threshold: float = 0.5
    nms_kernel: str = "gaussian"
    nms_sigma: float = 2.0
    max_masks: int = 20
    score_threshold: float = 0.7
    min_center_y: float = 0.2
    max_width: float = 0.95
    min_area: float = 0.0
    max_area: float = 1.0
    embedding_dim: int = 128

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "FreeMaskSettings":
        return cls(**{key.lower(): value for key, value in cfg.DISCOVERY.FREE_MASK.items()})


def make_queries(features: Tensor, scales: Sequence[float]) -> Tensor:
    """L2-normalised queries: the features at several scales, flattened row by row.

    Args:
        features: (C, h, w).
        scales: factors; grid sides are rounded down, a scale that leaves nothing is skipped.

    Returns:
        (N, C).
    """
    queries = []
    for scale in scales:
        if min(features.shape[-2:]) * scale < 1:
            continue
        # By factor, not by size: that fixes where odd grids are sampled.
        resized = F.interpolate(
            features[None], scale_factor=scale, mode="bilinear", align_corners=False
        )
        queries.append(resized[0].flatten(1).t())
    return F.normalize(torch.cat(queries), dim=1)


def _soft_masks(queries: Tensor, keys: Tensor) -> Tensor:
    """Similarities (N, h*w), each row scaled to [0, 1]; a constant row becomes zeros."""
    similarity = queries @ keys
    similarity = similarity - similarity.amin(dim=1, keepdim=True)
    peak = similarity.amax(dim=1, keepdim=True)
    return torch.where(peak > 0, similarity / peak, 0.0)


def _score_queries(queries: Tensor, keys: Tensor, threshold: float) -> Iterator[tuple[Tensor, ...]]:
    """Binary masks (n, h*w) and maskness (n,), chunk by chunk of the queries."""
    for chunk in queries.split(max(1, _CHUNK_ELEMENTS // keys.shape[1])):
        soft = _soft_masks(chunk, keys)
        binary = soft >= threshold
        area = binary.sum(dim=1)
        maskness = (soft * binary).sum(dim=1) / area.clamp(min=1)
        yield binary, torch.where(area > 1, maskness, -1.0)


def _select(features: Tensor, settings: FreeMaskSettings, dropped: Counter) -> tuple[Tensor, ...]:
    """The best queries after matrix NMS at feature resolution: queries, scores, soft masks."""
    queries = make_queries(features, settings.scales)
    keys = F.normalize(features.flatten(1), dim=0)
    binary, maskness = map(
        torch.cat, zip(*_score_queries(queries, keys, settings.mask_threshold), strict=True)
    )
    order = maskness.argsort(descending=True, stable=True)
    order = order[: int((maskness >= 0).sum())]
    dropped["single cell"] += len(queries) - len(order)
    scores = matrix_nms(
        binary[order].view(len(order), *features.shape[-2:]),
        maskness[order],
        kernel=settings.nms_kernel,
        sigma=settings.nms_sigma,
    )
    best = scores.argsort(descending=True, stable=True)[: settings.max_masks]
    dropped["beyond the best"] += len(order) - len(best)
    confident = best[scores[best] >= settings.score_threshold]
    dropped["low score"] += len(best) - len(confident)
    chosen = queries[order[confident]]
    return chosen, scores[confident], _soft_masks(chosen, keys).view(-1, *features.shape[-2:])


def _plausible(masks: Tensor, settings: FreeMaskSettings, dropped: Counter) -> Tensor:
    """Which masks (N, H, W) have a likely position, width and area; (N,) bool."""
    height, width = masks.shape[-2:]
    rows, columns = masks.any(dim=2), masks.any(dim=1)
    y = torch.arange(height, device=masks.device)
    # The method's own centre and width: mean and number of the occupied rows and columns.
    center_y = (rows * y).sum(1) / rows.sum(1).clamp(min=1)
    area = masks.flatten(1).sum(1)
    reasons = {
        "empty": area > 0,
        "high centre": center_y > settings.min_center_y * height,
        "too wide": columns.sum(1) < settings.max_width * width,
        "too small": area >= settings.min_area * height * width,
        "too large": area <= settings.max_area * height * width,
    }
    keep = torch.ones(len(masks), dtype=torch.bool, device=masks.device)
    for reason, passed in reasons.items():
        dropped[reason] += int((keep & ~passed).sum())
        keep &= passed
    return keep


@torch.no_grad()
def free_masks(
    features: Tensor,
    image_size: tuple[int, int],
    settings: FreeMaskSettings,
    *,
    dropped: Counter | None = None,
) -> list[PseudoMask]:
    """Find the masks of one image by similarity of its own features.

    Args:
        features: (C, h, w) float, dense features on a grid that covers the image.
        image_size: (H, W) in pixels; the size of the masks.
        settings: constants of the method.
        dropped: counts, by reason, of the candidates that were dropped are added to it.

    Returns:
        at most ``settings.max_masks`` pseudo-masks in falling order of maskness after matrix NMS,
        with embeddings of length ``settings.embedding_dim``.

    Raises:
        ValueError: `features` is not (C, h, w) or not finite.
    """
    if features.dim() != 3:
        raise ValueError(f"features must have shape (C, h, w), got {tuple(features.shape)}")
    features = features.float()
    if not bool(features.isfinite().all()):
        raise ValueError("features hold NaN or infinite values")
    dropped = Counter() if dropped is None else dropped
    queries, scores, soft = _select(features, settings, dropped)
    if len(queries) == 0:
        return []
    # The embedding is the normalised query resized along its channels, not normalised again.
    embeddings = F.interpolate(
        queries[:, None], size=settings.embedding_dim, mode="linear", align_corners=False
    )[:, 0]
    found = []
    at_once = max(1, _CHUNK_ELEMENTS // (image_size[0] * image_size[1]))
    for begin in range(0, len(queries), at_once):
        part = slice(begin, begin + at_once)
        upsampled = F.interpolate(
            soft[None, part], size=image_size, mode="bilinear", align_corners=False
        )
        masks = upsampled[0] >= settings.mask_threshold
        keep = _plausible(masks, settings, dropped)
        found += make_pseudo_masks(masks[keep], scores[part][keep], embeddings[part][keep])
    return found


@DISCOVERERS.register()
class FreeMask(FunctionDiscoverer):
    """:func:`free_masks` as a discoverer, with the settings of ``cfg.DISCOVERY.FREE_MASK``."""

    settings_class = FreeMaskSettings
    find = staticmethod(free_masks)
