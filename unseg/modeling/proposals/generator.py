"""InstanceFCN in the place of a region proposal network.

Legend: B images, L levels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from unseg.modeling.proposals.instance_fcn_head import InstanceFCNHead, LevelMaps, RankedWindows
from unseg.modeling.proposals.outputs import ProposalSettings, make_proposals
from unseg.structures import WindowMasks


@PROPOSAL_GENERATOR_REGISTRY.register()
class InstanceFCNProposalGenerator(nn.Module):
    """Boxes around InstanceFCN's masks, from a feature pyramid, for Detectron2's models.

    It answers as Detectron2's ``RPN`` does and takes ``MODEL.INSTANCE_FCN`` instead of
    ``MODEL.RPN``, with the same numbers of proposals in training and testing. It is not told of
    crowds, so windows in them are negative; nor of where a backbone's cells lie, which is half a
    stride from the border unless MODEL.INSTANCE_FCN.CELL_OFFSET says otherwise. It makes no image
    pyramid: SHORT_SIDES is not read.
    """

    @configurable
    def __init__(self, *, head: InstanceFCNHead, proposals: ProposalSettings, pre_nms_topk: int):
        """
        Args:
            head: the two branches.
            proposals: how proposals are made of windows.
            pre_nms_topk: windows kept per level.

        Raises:
            ValueError: `pre_nms_topk` is not positive.
        """
        super().__init__()
        if pre_nms_topk < 1:
            raise ValueError(
                f"MODEL.INSTANCE_FCN.TEST.PRE_NMS_TOPK must be positive: {pre_nms_topk}"
            )
        self.head = head
        self.proposals = proposals
        self.pre_nms_topk = pre_nms_topk

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        node = cfg.MODEL.INSTANCE_FCN
        if node.TRAIN_ON != "image":
            raise ValueError(
                "MODEL.INSTANCE_FCN.TRAIN_ON must be 'image' for a proposal generator: "
                f"{node.TRAIN_ON!r}"
            )
        return {
            "head": InstanceFCNHead(cfg, input_shape),
            "proposals": ProposalSettings.from_node(node.TEST),
            "pre_nms_topk": node.TEST.PRE_NMS_TOPK,
        }

    def forward(
        self,
        images: ImageList,
        features: Mapping[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """
        Args:
            images: B images; only their sizes are read.
            features: holds the L maps of the padded batch.
            gt_instances: of each image, with gt_boxes and gt_masks; needed in training.

        Returns:
            per image proposals with ``proposal_boxes`` in its pixels and ``objectness_logits``,
            falling, without gradients; and in training the losses of :class:`InstanceFCNHead`,
            else none.

        Raises:
            ValueError: in training there are no objects given, or they have no masks.
            FloatingPointError: in training a score or mask is not finite. In testing its window is
                left out.
        """
        maps = self.head(features)
        losses: dict[str, Tensor] = {}
        if self.training:
            if gt_instances is None:
                raise ValueError("InstanceFCNProposalGenerator needs gt_instances in training")
            windows = self.head.training_windows(maps, images.image_sizes, gt_instances)
            device_type = windows.scores.device.type
            with torch.autocast(device_type, enabled=False):
                losses = self.head.losses(windows)
        return self._propose(maps, images.image_sizes), losses

    @torch.no_grad()
    def _propose(
        self, maps: list[LevelMaps], image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        found = self.head.ranked_windows(maps, image_sizes, self.pre_nms_topk)
        results = []
        for size, windows in zip(image_sizes, found, strict=True):
            finite = windows.scores.isfinite() & windows.masks.isfinite().flatten(1).all(dim=1)
            if self.training and not finite.all():
                raise FloatingPointError(
                    "InstanceFCN's scores or masks are not finite. Training has diverged."
                )
            windows = RankedWindows(*(x[finite] for x in windows))
            masks = WindowMasks(windows.masks, windows.boxes, size, self.proposals.mask_threshold)
            proposals = make_proposals(masks, windows.scores, self.proposals)
            # ROI heads add ground truth, which has no such field.
            proposals.remove("pred_masks")
            results.append(proposals)
        return results
