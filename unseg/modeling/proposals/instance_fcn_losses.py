"""InstanceFCN's training: which windows are sampled, what their masks should be, and the losses.

Dai et al., "Instance-sensitive fully convolutional networks" (2016), sections 3.2 and 3.3. The sums
are averages by default, over a window's cells and over windows (specs/proposals.md 2.2).

Legend: N windows, P positives among them, G objects, m cells per side of a window, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ROIAlign
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor

from unseg.modeling.proposals.instance_fcn_windows import WindowLevel, grid_cells
from unseg.structures import CanonicalRule, label_windows
from unseg.structures.canonical import IGNORED, NEGATIVE

REDUCTIONS = ("mean", "sum")
# Shifts of the config are those of windows for objects of so many pixels.
_REFERENCE_SIZE = 128.0


@dataclass(frozen=True)
class WindowTraining:
    """How windows are labelled, sampled and compared.

    Attributes:
        pos_shift, neg_shift: of :class:`unseg.structures.CanonicalRule` for objects of 128 pixels,
            for others in proportion.
        pos_scale, neg_scale: of the rule, in octaves.
        windows_per_image: sampled, or as many as there are.
        pos_fraction: share of positives among them, if there are as many.
        mask_reduction: "mean" over a window's cells inside the image, or their "sum".
        mask_weight, score_weight: of the losses.

    Raises:
        ValueError: one of them has no such value.
    """

    pos_shift: float = 16.0
    pos_scale: float = 0.3
    neg_shift: float = 32.0
    neg_scale: float = 1.0
    windows_per_image: int = 256
    pos_fraction: float = 0.5
    mask_reduction: str = "mean"
    mask_weight: float = 1.0
    score_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.mask_reduction not in REDUCTIONS:
            raise ValueError(
                f"MODEL.INSTANCE_FCN.MASK_LOSS_REDUCTION must be one of {REDUCTIONS}: "
                f"{self.mask_reduction!r}"
            )
        if self.windows_per_image < 1 or not 0 <= self.pos_fraction <= 1:
            raise ValueError(
                "MODEL.INSTANCE_FCN.WINDOWS_PER_IMAGE must be at least 1 and POS_FRACTION in 0..1: "
                f"{self.windows_per_image}, {self.pos_fraction}"
            )
        self.rule(_REFERENCE_SIZE)

    @classmethod
    def from_node(cls, node: CfgNode) -> "WindowTraining":
        """Of ``cfg.MODEL.INSTANCE_FCN``."""
        return cls(
            pos_shift=node.POS_SHIFT,
            pos_scale=node.POS_SCALE_OCT,
            neg_shift=node.NEG_SHIFT,
            neg_scale=node.NEG_SCALE_OCT,
            windows_per_image=node.WINDOWS_PER_IMAGE,
            pos_fraction=node.POS_FRACTION,
            mask_reduction=node.MASK_LOSS_REDUCTION,
            mask_weight=node.MASK_LOSS_WEIGHT,
            score_weight=node.SCORE_LOSS_WEIGHT,
        )

    def rule(self, object_size: float) -> CanonicalRule:
        """The rule of windows that are made for objects of that size."""
        scale = object_size / _REFERENCE_SIZE
        return CanonicalRule(
            object_size,
            self.pos_shift * scale,
            self.pos_scale,
            self.neg_shift * scale,
            self.neg_scale,
        )


@dataclass
class TrainingWindows:
    """Sampled windows with what a net says of them and what it should say.

    Attributes:
        scores: (N,) float32 logits.
        labels: (N,) bool, True for positives.
        masks: (P, m, m) float32 logits of the positives.
        inside: (P, m, m) bool: the cells that are compared.
        targets: (P, m, m) bool.
    """

    scores: Tensor
    labels: Tensor
    masks: Tensor
    inside: Tensor
    targets: Tensor

    @staticmethod
    def cat(parts: Sequence["TrainingWindows"]) -> "TrainingWindows":
        return TrainingWindows(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in TrainingWindows.__dataclass_fields__
            )
        )


def window_losses(windows: TrainingWindows, settings: WindowTraining) -> dict[str, Tensor]:
    """The two losses. They are averages over this process's windows, as Detectron2's are.

    Returns:
        ``loss_instance_mask``: logistic loss over the cells of a positive window that are inside
        the image, their mean or sum, averaged over the positives; zero, but with a graph, if there
        are none. ``loss_objectness``: logistic loss averaged over the windows.
    """
    masks = F.binary_cross_entropy_with_logits(
        windows.masks, windows.targets.float(), reduction="none"
    )
    masks = masks.masked_fill(~windows.inside, 0.0).sum(dim=(1, 2))
    if settings.mask_reduction == "mean":
        masks = masks / windows.inside.sum(dim=(1, 2)).clamp(min=1)
    scores = F.binary_cross_entropy_with_logits(
        windows.scores, windows.labels.float(), reduction="sum"
    )
    return {
        "loss_instance_mask": settings.mask_weight * masks.sum() / max(1, len(masks)),
        "loss_objectness": settings.score_weight * scores / max(1, len(windows.scores)),
    }


def _objects(instances: Instances) -> tuple[Tensor, Tensor]:
    """Boxes (G, 4) of objects that have a mask, and their indices (G,) among all."""
    if not len(instances):
        device = instances.gt_boxes.device
        return torch.zeros((0, 4), device=device), torch.zeros(0, dtype=torch.int64, device=device)
    if not instances.has("gt_masks"):
        raise ValueError("InstanceFCN needs masks to train on, set MODEL.MASK_ON True: no gt_masks")
    boxes = instances.gt_boxes.tensor
    indices = instances.gt_masks.nonempty().to(boxes.device).nonzero()[:, 0]
    return boxes[indices], indices


def in_region(centers: Tensor, region: Tensor) -> Tensor:
    """Bool (N,): whether the pixels under centers (N, 2), x and y, are in a region (H, W).

    Centres beyond the image count as on its border.
    """
    height, width = region.shape
    x, y = centers.floor().long().unbind(1)
    return region[y.clamp(0, height - 1), x.clamp(0, width - 1)]


def sample_windows(
    levels: Sequence[WindowLevel],
    sizes: Sequence[tuple[int, int]],
    instances: Instances,
    crowds: BitMasks | None,
    settings: WindowTraining,
) -> list[tuple[Tensor, Tensor]]:
    """Windows of one image to train on, drawn by torch's generator from those of all levels.

    Objects without a mask are left out. Windows centred in a crowd are not drawn, nor are those
    between positive and negative: an object that is between the scales of two levels is neither.

    Args:
        levels: of the maps.
        sizes: rows and columns of each level's map that are of the image.
        instances: objects with gt_boxes and gt_masks.
        crowds: regions of many objects, or None.
        settings: the rules.

    Returns:
        per level int64 (N, 2), row and column; and int64 (N,), for positives the index of the
        object, -1 for negatives. Positives come first.

    Raises:
        ValueError: the objects have no masks.
    """
    boxes, indices = _objects(instances)
    cells, labels, matched = [], [], []
    for level, (rows, columns) in zip(levels, sizes, strict=True):
        cells.append(grid_cells(rows, columns, boxes.device))
        centers = level.centers(cells[-1])
        label, match = label_windows(centers, 0.0, boxes, settings.rule(level.object_size))
        if crowds is not None and len(crowds):
            label[in_region(centers, crowds.tensor.any(dim=0))] = IGNORED
        labels.append(label)
        matched.append(match)
    positive, negative = subsample_labels(
        torch.cat(labels), settings.windows_per_image, settings.pos_fraction, NEGATIVE
    )
    chosen = torch.cat([positive, negative])
    objects = torch.cat([indices[torch.cat(matched)[positive]], torch.full_like(negative, -1)])
    of_level = torch.cat(
        [torch.full((len(c),), i, device=boxes.device) for i, c in enumerate(cells)]
    )[chosen]
    chosen_cells = torch.cat(cells)[chosen]
    return [(chosen_cells[of_level == i], objects[of_level == i]) for i in range(len(levels))]


def crop_targets(masks: BitMasks | PolygonMasks, matched: Tensor, boxes: Tensor, m: int) -> Tensor:
    """What of objects is in windows, as ``masks[matched].crop_and_resize(boxes, m)`` gives it.

    Unlike there, a bitmask is not copied for each of its windows.

    Args:
        masks: of G objects.
        matched: int64 (P,): the object of each window.
        boxes: float32 (P, 4) XYXY, may leave the image.
        m: see the legend.

    Returns:
        bool (P, m, m).
    """
    if not len(matched):
        return torch.zeros((0, m, m), dtype=torch.bool, device=boxes.device)
    if not isinstance(masks, BitMasks):
        return masks[matched].crop_and_resize(boxes, m).to(boxes.device)
    objects, index = matched.unique(return_inverse=True)
    bits = masks.tensor[objects][:, None].float()
    rois = torch.cat([index[:, None].to(boxes.dtype), boxes], dim=1)
    return ROIAlign((m, m), 1.0, 0, aligned=True)(bits, rois)[:, 0] >= 0.5
