"""Long-tail discovery (Weng et al., "Unsupervised Discovery of the Long-Tail in Instance
Segmentation Using Hierarchical Self-Supervision", CVPR 2021): an R-CNN that stays as it is, whose
masks learn, without labels, to be embedded.
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import ImageList, Instances
from torch import Tensor

from unseg.modeling.freezing import freeze
from unseg.modeling.roi_heads.hierarchical_embedding import HierarchicalEmbedding


@META_ARCH_REGISTRY.register()
class LongTailDiscoveryRCNN(GeneralizedRCNN):
    """GeneralizedRCNN whose ROI heads embed. Weights and inference are GeneralizedRCNN's.

    With a frozen detector, training needs images only: the proposals of highest objectness, masks
    for them, and the losses of their embeddings; nothing but the embedding head changes. Otherwise
    training is GeneralizedRCNN's, with labels and all losses.
    """

    @configurable
    def __init__(self, *, freeze_detector: bool = True, **rcnn: Any):
        """
        Args:
            freeze_detector: see above.
            rcnn: see GeneralizedRCNN.

        Raises:
            ValueError: the ROI heads do not embed, or a frozen detector is left with no loss.
        """
        super().__init__(**rcnn)
        if not isinstance(self.roi_heads, HierarchicalEmbedding):
            raise ValueError(
                "LongTailDiscoveryRCNN needs MODEL.ROI_HEADS.NAME HierarchicalEmbeddingROIHeads, "
                "HierarchicalEmbeddingCascadeROIHeads or HierarchicalEmbeddingRes5ROIHeads, "
                f"got {type(self.roi_heads).__name__}"
            )
        if freeze_detector and not self.roi_heads.embedding_loss.views:
            raise ValueError(
                "MODEL.HIERARCHICAL_EMBEDDING: WEIGHT_MASK, WEIGHT_OBJECT and WEIGHT_HIER are all "
                "0: nothing is left to train with FREEZE_DETECTOR"
            )
        self.freeze_detector = freeze_detector
        self.train(self.training)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        frozen = cfg.MODEL.HIERARCHICAL_EMBEDDING.FREEZE_DETECTOR
        return super().from_config(cfg) | {"freeze_detector": frozen}

    def train(self, mode: bool = True) -> "LongTailDiscoveryRCNN":
        super().train(mode)
        if self.freeze_detector:
            head = self.roi_heads.embedding_head
            rest = [part for part in self.roi_heads.children() if part is not head]
            freeze(self.backbone, *rest)
            if self.proposal_generator is not None:
                freeze(self.proposal_generator)
        return self

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """As GeneralizedRCNN's. In training with a frozen detector the inputs need ``image`` only
        (and ``proposals``, for a model without a proposal generator), and the result is
        HierarchicalEmbeddingLoss's."""
        if not (self.training and self.freeze_detector):
            return super().forward(batched_inputs)
        with torch.no_grad():
            images = self.preprocess_image(batched_inputs)
            features = self.backbone(images.tensor)
            proposals = self._proposals(images, features, batched_inputs)
        with self.roi_heads.showing(images):
            return self.roi_heads.embedding_losses(features, proposals)

    def inference(
        self,
        batched_inputs: list[dict[str, Any]],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> Any:
        """As GeneralizedRCNN's. Here also given boxes can be embedded in pixels."""
        if detected_instances is None:
            return super().inference(batched_inputs, None, do_postprocess)
        with self.roi_heads.showing(self.preprocess_image(batched_inputs)):
            return super().inference(batched_inputs, detected_instances, do_postprocess)

    def _proposals(
        self, images: ImageList, features: dict[str, Tensor], batched_inputs: list[dict[str, Any]]
    ) -> list[Instances]:
        if self.proposal_generator is not None:
            return self.proposal_generator(images, features, None)[0]
        if "proposals" not in batched_inputs[0]:
            raise ValueError(
                "the inputs need `proposals`: there is no MODEL.PROPOSAL_GENERATOR "
                "(MODEL.LOAD_PROPOSALS, DATASETS.PROPOSAL_FILES_TRAIN)"
            )
        return [x["proposals"].to(self.device) for x in batched_inputs]
