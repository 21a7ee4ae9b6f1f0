"""Which masks overlap or lie in each other, and the triplets that are drawn from this (Weng et al.,
"Unsupervised Discovery of the Long-Tail in Instance Segmentation Using Hierarchical
Self-Supervision", CVPR 2021).

Legend: N masks, of one image or of a batch; m cells per side of a window; P pairs; T triplets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unseg.layers import mask_iou
from unseg.structures import WindowMasks

# A negative of the anchor's image neither holds nor lies in the anchor by more than this [ours].
NEG_MAX_CONTAINMENT = 0.5


@dataclass(frozen=True, eq=False)
class MaskRelations:
    """How N masks lie to each other. Made by :func:`mask_relations`; batches by :meth:`cat`.

    Attributes:
        valid: bool (N,), masks that are large enough to take part in anything.
        area: int64 (N,), cells of the common grid.
        iou: float64 (N, N), quotients of whole numbers; 0 for pairs with an invalid mask, and for
            masks of different images.
        containment: float64 (N, N): [i, j] is the share of mask j that lies in mask i. 0 as above.
        image: int64 (N,), rising: which image of the batch each mask is of.
    """

    valid: Tensor
    area: Tensor
    iou: Tensor
    containment: Tensor
    image: Tensor

    def __len__(self) -> int:
        return len(self.valid)

    @property
    def device(self) -> torch.device:
        return self.valid.device

    @staticmethod
    def cat(parts: Sequence["MaskRelations"]) -> "MaskRelations":
        """The relations of a batch from those of each image, in this order.

        Raises:
            ValueError: there are no parts.
        """
        if not parts:
            raise ValueError("parts must hold the relations of at least one image")
        return MaskRelations(
            valid=torch.cat([part.valid for part in parts]),
            area=torch.cat([part.area for part in parts]),
            iou=torch.block_diag(*(part.iou for part in parts)),
            containment=torch.block_diag(*(part.containment for part in parts)),
            image=torch.cat([torch.full_like(part.area, i) for i, part in enumerate(parts)]),
        )


@torch.no_grad()
def mask_relations(
    soft_masks: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    stride: int = 4,
    min_area: int = 16,
) -> MaskRelations:
    """Relations of the masks of one image, compared on a grid of ceil(H / stride) rows.

    A cell is in a mask iff the probability interpolated at its centre is at least 0.5, as when
    Detectron2 pastes masks into an image that is `stride` times smaller.

    Args:
        soft_masks: floating (N, m, m) or (N, 1, m, m), probabilities in the boxes.
        boxes: floating (N, 4) XYXY in pixels. Boxes without extent have empty masks.
        image_size: (H, W) in pixels.
        stride: side of a cell in pixels.
        min_area: masks of fewer cells are invalid. Empty ones always are: they lie in everything.

    Raises:
        ValueError: wrong shapes, NaN/inf, probabilities outside 0..1, a size or stride below 1, a
            negative area.
        RuntimeError: masks and boxes are on different devices.
    """
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if min_area < 0:
        raise ValueError(f"min_area must be at least 0, got {min_area}")
    if soft_masks.dim() == 4 and soft_masks.shape[1] == 1:
        soft_masks = soft_masks[:, 0]
    if soft_masks.dim() != 3:
        raise ValueError(
            f"soft_masks must be (N, m, m) or (N, 1, m, m), got {tuple(soft_masks.shape)}"
        )
    if boxes.shape != (len(soft_masks), 4):
        raise ValueError(f"boxes must be ({len(soft_masks)}, 4), got {tuple(boxes.shape)}")
    height, width = image_size
    grid = (math.ceil(height / stride), math.ceil(width / stride))
    scaled = boxes.float() / stride
    # Boxes that were cut off at the image's border may have no extent; NaN is left for the check.
    flat = (scaled[:, 2:] <= scaled[:, :2]).any(dim=1)
    scaled = torch.where(flat[:, None], scaled.new_tensor([0.0, 0.0, 1.0, 1.0]), scaled)
    soft_masks = soft_masks.masked_fill(flat[:, None, None], 0.0)
    packed = WindowMasks(soft_masks, scaled, grid).pack()
    return _from_intersections(mask_iou(packed, mode="inter"), packed.area, min_area)


def _from_intersections(inter: Tensor, area: Tensor, min_area: int) -> MaskRelations:
    """Relations of one image from cells that masks share, int32 (N, N), and have, (N,)."""
    inter, area = inter.double(), area.long()
    valid = area >= max(min_area, 1)
    both = valid[:, None] & valid
    union = area[:, None] + area - inter
    return MaskRelations(
        valid=valid,
        area=area,
        iou=torch.where(both, inter / union.clamp(min=1), 0.0),
        containment=torch.where(both, inter / area.clamp(min=1), 0.0),
        image=torch.zeros_like(area),
    )


def sample_mask_triplets(
    relations: MaskRelations, generator: torch.Generator, per_image: int
) -> Tensor:
    """For L_mask: `per_image` valid masks of each image, or all if there are fewer.

    Drawn without replacement, all alike. The triplet of a mask is that of its views.

    Returns:
        int64 (T,), indices of masks, those of the first image first.
    """
    keys = _uniform((len(relations),), generator, relations.device)
    order = keys.masked_fill(~relations.valid, 2.0).argsort()
    order = order[relations.image[order].argsort(stable=True)]
    image = relations.image[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(image, image)
    return order[(rank < per_image) & relations.valid[order]]


def object_pairs(relations: MaskRelations, min_iou: float) -> Tensor:
    """For L_object: anchors and positives, different masks of IoU > min_iou, in both orders.

    Returns:
        int64 (P, 2), by rising anchor, then positive.
    """
    return (relations.iou > min_iou).fill_diagonal_(False).nonzero()


def hierarchy_pairs(
    relations: MaskRelations, min_containment: float, min_area_ratio: float
) -> Tensor:
    """For L_hierarchical: wholes and their parts.

    At least `min_containment` of the part lies in the whole, which is the larger one, by at least
    the factor `min_area_ratio`. (The authors': 1 and 1.)

    Returns:
        int64 (P, 2) of (whole, part), by rising whole, then part.
    """
    area = relations.area.double()
    larger = area[:, None] > area
    # Invalid masks and those of other images are contained by 0, which min_containment may be.
    both = relations.valid[:, None] & relations.valid
    both = both & (relations.image[:, None] == relations.image)
    ratio = area[:, None] / area.clamp(min=1)
    return (
        both & larger & (relations.containment >= min_containment) & (ratio >= min_area_ratio)
    ).nonzero()


def allowed_negatives(relations: MaskRelations, max_iou: float) -> Tensor:
    """bool (N, N): [i, n], whether the valid mask n may be a negative of the anchor i.

    All masks of other images may. Of the same image those that have at most the IoU `max_iou` with
    the anchor and neither hold nor lie in it by more than a half [ours: the authors take any].
    """
    contained = relations.containment > NEG_MAX_CONTAINMENT
    near = (relations.iou > max_iou) | contained | contained.t()
    allowed = ~near & relations.valid & relations.valid[:, None]
    return allowed.fill_diagonal_(False)


def sample_negatives(
    relations: MaskRelations,
    pairs: Tensor,
    generator: torch.Generator,
    *,
    per_pair: int,
    max_iou: float,
) -> Tensor:
    """Negatives of pairs (P, 2) of anchor and positive, see :func:`allowed_negatives`.

    They are drawn without replacement, all alike; never the positive. Pairs with fewer allowed
    negatives than `per_pair` get them all; those with none are dropped.

    Returns:
        int64 (T, 3) of anchor, positive, negative, in the order of the pairs.
    """
    allowed = allowed_negatives(relations, max_iou)[pairs[:, 0]]
    allowed = allowed.scatter(1, pairs[:, 1:], False)
    # The highest of random numbers, so no row is drawn from by itself.
    keys = _uniform(tuple(allowed.shape), generator, relations.device)
    count = min(per_pair, len(relations))
    keys, negatives = keys.masked_fill(~allowed, -1.0).topk(count, dim=1)
    repeated = pairs[:, None].expand(-1, count, -1)
    return torch.cat([repeated, negatives[:, :, None]], dim=2)[keys >= 0]


def sample_object_triplets(
    relations: MaskRelations,
    generator: torch.Generator,
    *,
    min_iou: float,
    per_pair: int,
    max_iou: float,
) -> Tensor:
    """For L_object: all pairs of :func:`object_pairs` with negatives of :func:`sample_negatives`.

    Returns:
        int64 (T, 3) of anchor, positive, negative.
    """
    pairs = object_pairs(relations, min_iou)
    return sample_negatives(relations, pairs, generator, per_pair=per_pair, max_iou=max_iou)


def _uniform(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """float32 from [0, 1), drawn where the generator is."""
    drawn = torch.rand(shape, generator=generator, device=generator.device)
    return drawn.to(device)
