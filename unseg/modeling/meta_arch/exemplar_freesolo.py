"""Exemplar-FreeSOLO (Ishtiak et al., "Exemplar-FreeSOLO: Enhancing Unsupervised Instance
Segmentation with Exemplars", CVPR 2023): FreeSOLO, and a loss that draws its objects to exemplars.
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from unseg.modeling.exemplars import ExemplarContrast, find_feature, with_exemplars
from unseg.modeling.meta_arch.freesolo import FreeSOLO
from unseg.modeling.solo.criterion import Predictions, Targets, mask_logits
from unseg.modeling.solo.targets import nearest_pairs
from unseg.structures import ExemplarPool


@META_ARCH_REGISTRY.register()
class ExemplarFreeSOLO(FreeSOLO):
    """FreeSOLO with ``loss_exemplar`` in training. Weights and inference are FreeSOLO's.

    Training needs a pool, see :func:`unseg.modeling.with_exemplars`.
    """

    @configurable
    def __init__(
        self,
        *,
        exemplars: ExemplarContrast,
        pool: ExemplarPool | None = None,
        update_period: int = 500,
        pool_batch_size: int = 8,
        **freesolo: Any,
    ):
        """
        Args:
            exemplars: the head; with a weight of 0 this is FreeSOLO, and a pool is not looked at.
            pool, update_period, pool_batch_size: see :func:`unseg.modeling.with_exemplars`. Without
                a pool that function gives one to the model before it is trained.
            freesolo: see :class:`FreeSOLO`; the backbone has the head's feature among its outputs.
        """
        super().__init__(**freesolo)
        self.exemplars = exemplars
        if pool is not None and exemplars.weight:
            with_exemplars(self, pool, update_period=update_period, batch_size=pool_batch_size)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return super().from_config(cfg) | {"exemplars": ExemplarContrast(cfg)}

    def _more_losses(
        self, features: dict[str, Tensor], predictions: Predictions, targets: Targets
    ) -> dict[str, Tensor]:
        if not self.exemplars.weight:
            return {}
        loss = self.exemplars(
            find_feature(features, self.exemplars.in_feature),
            self._object_masks(predictions, targets),
            targets.counts,
        )
        return {"loss_exemplar": loss}

    def _object_masks(self, predictions: Predictions, targets: Targets) -> Tensor:
        """The predicted mask (N, h, w) in [0, 1] of each object of the batch, by the cell nearest
        to its centre; empty for objects that no cell learns."""
        pairs, size = targets.pairs, predictions.features.shape[-2:]
        if not len(pairs):
            return predictions.features.new_zeros((len(targets.centers), *size))
        image_size = tuple(side * self.mask_head.stride for side in size)
        nearest = nearest_pairs(pairs, targets.centers, image_size, self.grid)
        pair = nearest.clamp(min=0)
        kernels = predictions.kernels[pairs.image[pair], pairs.cell[pair]]
        masks = mask_logits(kernels, predictions.features, targets.counts).sigmoid()
        return torch.where((nearest >= 0)[:, None, None], masks, 0.0)
