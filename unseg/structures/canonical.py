"""Which windows hold an object: centred in them, and of the size that they are made for.

Source: Pinheiro et al., "Learning to segment object candidates" (NeurIPS 2015), section 3.1, and
Dai et al., "Instance-sensitive fully convolutional networks" (2016), section 3, which takes over
its rule. In a window of an image resized by ``2^-s`` an object is in its canonical place when the
window's centre is that of its box and ``s = log2(longest side / object size)``.

Legend: P windows, N objects.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1


@dataclass(frozen=True)
class CanonicalRule:
    """How far a window may be from an object's canonical place, in the resized image's pixels.

    Attributes:
        object_size: longest side of an object in its place.
        pos_shift, pos_scale: at most so many pixels along each axis, and octaves, for a positive.
        neg_shift, neg_scale: at least so many pixels along an axis, or octaves, for a negative.

    Raises:
        ValueError: a window could be positive and negative, or a number is negative.
    """

    object_size: float
    pos_shift: float = 16.0
    pos_scale: float = 0.25
    neg_shift: float = 32.0
    neg_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.object_size > 0 or not min(self.pos_shift, self.pos_scale) >= 0:
            raise ValueError(f"sizes must be positive, shifts and scales not negative: {self}")
        if not (self.pos_shift < self.neg_shift and self.pos_scale < self.neg_scale):
            raise ValueError(f"negatives must be farther away than positives: {self}")


def canonical_places(boxes: Tensor, object_size: float) -> tuple[Tensor, Tensor]:
    """Centres (N, 2), x and y, and scales ``log2(longest side / object_size)`` (N,) of boxes.

    Args:
        boxes: float (N, 4) XYXY.
        object_size: see :class:`CanonicalRule`.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    return (boxes[:, :2] + boxes[:, 2:]) / 2, (sides.amax(dim=1) / object_size).log2()


def label_windows(
    centers: Tensor, scales: Tensor | float, boxes: Tensor, rule: CanonicalRule
) -> tuple[Tensor, Tensor]:
    """Whether windows are positive, negative or neither, and which object is in them.

    Args:
        centers: float (P, 2), x and y of the windows' centres in the coordinates of `boxes`.
        scales: (P,) or a number: log2 of how many times smaller the windows' images are than the
            one that the coordinates are of; 0 if they are the same.
        boxes: float (N, 4) XYXY; N may be 0, then all windows are negative.
        rule: the distances.

    Returns:
        labels int8 (P,), 1 positive, 0 negative, -1 neither; and int64 (P,), for positives the
        index of the object, among those that fit the one with the nearest centre; else -1.
    """
    scales = torch.as_tensor(scales, dtype=centers.dtype, device=centers.device).expand(
        len(centers)
    )
    labels = torch.full((len(centers),), NEGATIVE, dtype=torch.int8, device=centers.device)
    matched = torch.full((len(centers),), -1, dtype=torch.int64, device=centers.device)
    if not len(boxes) or not len(centers):
        return labels, matched
    places, sizes = canonical_places(boxes.to(centers.dtype), rule.object_size)
    offsets = (centers[:, None] - places) * torch.exp2(-scales)[:, None, None]  # (P, N, 2)
    shift = offsets.abs().amax(dim=2)
    octaves = (scales[:, None] - sizes).abs()
    fits = (shift <= rule.pos_shift) & (octaves <= rule.pos_scale)
    far = (shift >= rule.neg_shift) | (octaves >= rule.neg_scale)
    labels[~far.all(dim=1)] = IGNORED
    positive = fits.any(dim=1)
    labels[positive] = POSITIVE
    distances = offsets.square().sum(dim=2).masked_fill(~fits, torch.inf)
    matched[positive] = distances.argmin(dim=1)[positive]
    return labels, matched
