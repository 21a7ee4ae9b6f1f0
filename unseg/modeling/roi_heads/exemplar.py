"""The exemplar contrastive loss in Detectron2's Mask R-CNN."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead, mask_rcnn_loss
from detectron2.modeling.roi_heads.roi_heads import select_foreground_proposals
from detectron2.structures import Instances
from torch import Tensor

from unseg.modeling.exemplars import ExemplarContrast, find_feature

# Cells per side of a box: objects' masks are shrunk to them.
_RESOLUTION = 7


@ROI_HEADS_REGISTRY.register()
class ExemplarROIHeads(StandardROIHeads):
    """StandardROIHeads with ``loss_exemplar`` of the masks of foreground proposals in training.

    Training needs a pool, see :func:`unseg.modeling.with_exemplars`. Weights and inference are
    those of StandardROIHeads.
    """

    @configurable
    def __init__(self, *, exemplars: ExemplarContrast, exemplar_pooler: ROIPooler, **standard: Any):
        """
        Args:
            exemplars: the head.
            exemplar_pooler: cuts the feature that objects are embedded in.
            standard: see StandardROIHeads; with a mask head and its pooler.

        Raises:
            ValueError: there is no mask head of Detectron2's kind, or it has no pooler.
        """
        super().__init__(**standard)
        pooled = self.mask_on and self.mask_pooler is not None
        if not pooled or not isinstance(self.mask_head, BaseMaskRCNNHead):
            raise ValueError("ExemplarROIHeads needs MODEL.MASK_ON and a pooled mask head")
        self.exemplars = exemplars
        self.exemplar_pooler = exemplar_pooler

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        exemplars = ExemplarContrast(cfg)
        stride = find_feature(input_shape, exemplars.in_feature).stride
        pooler = ROIPooler(
            output_size=_RESOLUTION,
            scales=(1.0 / stride,),
            sampling_ratio=cfg.MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO,
            pooler_type=cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE or "ROIAlignV2",
        )
        return super().from_config(cfg, input_shape) | {
            "exemplars": exemplars,
            "exemplar_pooler": pooler,
        }

    def _forward_mask(self, features: dict[str, Tensor], instances: list[Instances]) -> Any:
        if not self.training or not self.exemplars.weight:
            return super()._forward_mask(features, instances)
        # StandardROIHeads keeps the logits to itself: its steps, with them in hand.
        instances, _ = select_foreground_proposals(instances, self.num_classes)
        boxes = [x.proposal_boxes for x in instances]
        pooled = self.mask_pooler([features[name] for name in self.mask_in_features], boxes)
        logits = self.mask_head.layers(pooled)
        loss = mask_rcnn_loss(logits, instances, self.mask_head.vis_period)
        feature = find_feature(features, self.exemplars.in_feature)
        cells = self.exemplar_pooler([feature], boxes)
        with torch.autocast(feature.device.type, enabled=False):
            exemplar_loss = self.exemplars(cells, self._masks(logits.float(), instances).sigmoid())
        return {"loss_mask": loss * self.mask_head.loss_weight, "loss_exemplar": exemplar_loss}

    @staticmethod
    def _masks(logits: Tensor, instances: list[Instances]) -> Tensor:
        """Of logits (N, classes or 1, M, M) those of the objects' classes, (N, M, M)."""
        if logits.shape[1] == 1:
            return logits[:, 0]
        classes = torch.cat([x.gt_classes for x in instances])
        return logits[torch.arange(len(logits), device=logits.device), classes]
