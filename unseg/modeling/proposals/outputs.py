"""From masks and objectness to the outputs of a proposal method.

Legend: N windows, K proposals.
"""

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import nms

from unseg.layers import mask_nms
from unseg.structures import WindowMasks

NMS_TYPES = ("none", "box", "mask")


@dataclass(frozen=True)
class ProposalSettings:
    """How proposals are made of windows.

    Attributes:
        topk: at most so many proposals per image.
        mask_threshold: probability from which a pixel is in a mask, in (0, 1].
        nms_type: "none", "box" (overlap of the masks' tight boxes, as InstanceFCN) or "mask".
        nms_threshold: a proposal is dropped if its IoU with a better one is higher, in [0, 1].

    Raises:
        ValueError: a value that is none of these.
    """

    topk: int = 1000
    mask_threshold: float = 0.5
    nms_type: str = "none"
    nms_threshold: float = 0.8

    def __post_init__(self) -> None:
        if isinstance(self.topk, bool) or not isinstance(self.topk, int) or self.topk < 1:
            raise ValueError(f"topk (TOPK) must be a positive integer, not {self.topk!r}")
        if not 0 < self.mask_threshold <= 1:
            raise ValueError(
                f"mask_threshold (MASK_THRESH) must be in (0, 1], not {self.mask_threshold}"
            )
        if self.nms_type not in NMS_TYPES:
            raise ValueError(f"nms_type (NMS_TYPE) must be of {NMS_TYPES}, not {self.nms_type!r}")
        if not 0 <= self.nms_threshold <= 1:
            raise ValueError(
                f"nms_threshold (NMS_THRESH) must be in [0, 1], not {self.nms_threshold}"
            )

    @classmethod
    def from_node(cls, node: CfgNode) -> "ProposalSettings":
        """From ``cfg.MODEL.DEEPMASK.TEST`` or ``cfg.MODEL.INSTANCE_FCN.TEST``."""
        return cls(node.TOPK, node.MASK_THRESH, node.NMS_TYPE, node.NMS_THRESH)


def make_proposals(masks: WindowMasks, logits: Tensor, settings: ProposalSettings) -> Instances:
    """Ranked proposals of one image: empty masks are dropped, then NMS, then the best are taken.

    Ranked by logits in float32: probabilities near 1 would be equal in half precision.

    Args:
        masks: N masks in the output image.
        logits: floating (N,), objectness.
        settings: see there.

    Returns:
        Instances of the masks' image with ``proposal_boxes`` (K, 4), tight boxes of the masks;
        ``objectness_logits`` float32 (K,), falling, equal ones in the order of the input; and
        ``pred_masks``, WindowMasks.

    Raises:
        ValueError: the numbers of masks and logits differ, logits are NaN, or the masks have
            another threshold than the settings.
    """
    if logits.shape != (len(masks),):
        raise ValueError(f"logits must be ({len(masks)},), as the masks, not {tuple(logits.shape)}")
    if masks.threshold != settings.mask_threshold:
        raise ValueError(
            f"masks have the threshold {masks.threshold}, the settings {settings.mask_threshold}"
        )
    logits = logits.detach().float()
    if logits.isnan().any():
        raise ValueError(f"{int(logits.isnan().sum())} of {len(logits)} logits are NaN")
    order = torch.sort(logits, descending=True, stable=True).indices
    masks, logits = masks[order], logits[order]
    packed = masks.pack() if settings.nms_type == "mask" else None
    boxes = masks.tight_boxes().tensor if packed is None else packed.box.float()
    kept = (boxes[:, 2] > boxes[:, 0]).nonzero()[:, 0]
    if settings.nms_type == "box":
        kept = kept[_falling_nms(boxes[kept], settings.nms_threshold)]
    elif packed is not None:
        kept = kept[mask_nms(packed[kept], logits[kept], settings.nms_threshold)]
    kept = kept[: settings.topk]
    return Instances(
        masks.image_size,
        proposal_boxes=Boxes(boxes[kept]),
        objectness_logits=logits[kept],
        pred_masks=masks[kept],
    )


def _falling_nms(boxes: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes that stay, int64; boxes come in falling order.

    Ranks stand for the scores, so that equal scores keep their order on every device; in double
    precision an IoU of exactly the threshold is not above it.
    """
    ranks = torch.arange(len(boxes), 0, -1, dtype=torch.float64, device=boxes.device)
    return nms(boxes.double(), ranks, threshold)


def as_outputs(proposals: Instances) -> dict[str, Instances]:
    """A model's output for one image: the proposals, and the same as instances of one class.

    Args:
        proposals: of :func:`make_proposals`.

    Returns:
        ``proposals`` as they are; ``instances`` with ``pred_boxes``, ``scores`` (sigmoid of the
        logits), ``pred_classes`` (0) and ``pred_masks``, in the same order.
    """
    logits = proposals.objectness_logits
    instances = Instances(
        proposals.image_size,
        pred_boxes=proposals.proposal_boxes,
        scores=logits.sigmoid(),
        pred_classes=torch.zeros(len(logits), dtype=torch.int64, device=logits.device),
        pred_masks=proposals.pred_masks,
    )
    return {"proposals": proposals, "instances": instances}
