"""From segments on the patch grid to masks of the image; spectral segmentation as a discoverer.

Legend: h w patches, H W image pixels, K instances.
"""

import logging
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

from unseg.discovery.registry import DISCOVERERS, FunctionDiscoverer
from unseg.discovery.spectral.segmentation import Segments, segment
from unseg.discovery.spectral.settings import SpectralSettings
from unseg.structures import PseudoMask, make_pseudo_masks

logger = logging.getLogger(__name__)


def labels_to_masks(labels: Tensor, image_size: tuple[int, int], *, mode: str) -> Tensor:
    """Masks at the size of the image; no pixel belongs to two.

    Args:
        labels: (h, w) int64, 0 for background, 1 to K.
        image_size: (H, W) pixels, which the grid covers exactly.
        mode: "nearest", or "bilinear": a pixel goes to the label whose indicator, interpolated, is
            the largest there.

    Returns:
        (K, H, W) bool.
    """
    count = int(labels.max()) if labels.numel() else 0
    if mode == "nearest":
        # Centre-sampled: torch's "nearest" would shift the masks by half a patch.
        large = F.interpolate(labels[None, None].float(), size=image_size, mode="nearest-exact")
        winner = large[0, 0].long()
    else:
        indicators = F.one_hot(labels, count + 1).permute(2, 0, 1).float()
        large = F.interpolate(
            indicators[None], size=image_size, mode="bilinear", align_corners=False
        )
        winner = large[0].argmax(dim=0)
    return winner == torch.arange(1, count + 1, device=labels.device).view(-1, 1, 1)


def segments_to_masks(
    segments: Segments, image_size: tuple[int, int], settings: SpectralSettings
) -> list[PseudoMask]:
    """The instances as pseudo-masks, in falling order of score.

    Their embeddings are resized along channels, like those of free masks.
    """
    if len(segments.scores) == 0:
        return []
    masks = labels_to_masks(segments.labels, image_size, mode=settings.upsample)
    embeddings = F.interpolate(
        segments.embeddings[:, None],
        size=settings.embedding_dim,
        mode="linear",
        align_corners=False,
    )[:, 0]
    return make_pseudo_masks(masks, segments.scores, embeddings)


def spectral_masks(
    features: Tensor,
    image_size: tuple[int, int],
    settings: SpectralSettings,
    num_instances: int | None = None,
    *,
    dropped: Counter | None = None,
) -> list[PseudoMask]:
    """Find the masks of one image by spectral segmentation of its own features.

    Args:
        features: (C, h, w) float, dense features on a grid that covers the image.
        image_size: (H, W) in pixels; the size of the masks.
        settings: of the method.
        num_instances: how many to look for, for ``clusters.mode`` "oracle".
        dropped: why an image has no masks is counted in it.

    Returns:
        pseudo-masks that do not overlap, in falling order of score.

    Raises:
        ValueError: `features` is not (C, h, w) or not finite, or the oracle's number is missing.
    """
    segments = segment(features, settings, num_instances)
    if segments.reason:
        logger.info("no instances: %s", segments.reason)
        if dropped is not None:
            dropped[f"images: {segments.reason}"] += 1
    return segments_to_masks(segments, image_size, settings)


@DISCOVERERS.register()
class Spectral(FunctionDiscoverer):
    """:func:`spectral_masks` as a discoverer, with the settings of ``cfg.MODEL.DEEP_SPECTRAL``."""

    settings_class = SpectralSettings
    find = staticmethod(spectral_masks)
