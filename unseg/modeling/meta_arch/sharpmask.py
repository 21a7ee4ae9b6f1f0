"""SharpMask: DeepMask whose masks are refined by the trunk's finer maps.

Source: Pinheiro, Lin, Collobert and Dollar, "Learning to refine object segments" (ECCV 2016), and
its released variant (specs/proposals.md, section 1.8).

Legend: B images or patches, N windows, E embedding, m pixels per side of a mask.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from torch import Tensor

from unseg.modeling.backbone.resnet_stem import maps_with_stem, shapes_with_stem
from unseg.modeling.freezing import freeze
from unseg.modeling.meta_arch.deepmask import DeepMask, EncodedImages
from unseg.modeling.proposals.deepmask_heads import (
    DeepMaskHead,
    PaperHead,
    SharedHead,
    convolve_at,
)
from unseg.modeling.proposals.refinement import Refinement

logger = logging.getLogger(__name__)

_FEATURES = "MODEL.SHARPMASK.IN_FEATURES"


def _check_head(head: DeepMaskHead) -> None:
    if not isinstance(head, (SharedHead, PaperHead)):
        raise ValueError(
            "MODEL.DEEPMASK.HEAD must be shared or paper for a SharpMask, which refines what the "
            f"head's vector of a window says: {head.kind!r}"
        )


@META_ARCH_REGISTRY.register()
class SharpMask(DeepMask):
    """The second stage: a DeepMask that stays as it is, and the refinement, which is trained.

    Trunk and head come from a DeepMask's checkpoint (MODEL.WEIGHTS), whose layer for coarse masks,
    ``head.mask``, is not used and not there; its weights are reported as such at loading. They
    have no gradients, and their norms and dropout are in eval mode during training too.

    Training input is DeepMask's, at GT_SIZE = INPUT_SIZE; of negatives nothing is learned. The
    only loss is ``loss_mask``: one for the scores would be a constant. Scores and windows at
    inference are DeepMask's.
    """

    @configurable
    def __init__(self, *, refinement: Refinement, in_features: Sequence[str], **deepmask: Any):
        """
        Args:
            refinement: with as many steps as `in_features`.
            in_features: maps of the trunk from coarse to fine; "stem" is a ResNet's first
                convolution. The first is `in_feature`, each next one has half the stride.
            deepmask: see :class:`DeepMask`.

        Raises:
            ValueError: they do not fit together; the message names the config's key.
        """
        super().__init__(**deepmask)
        self.in_features = tuple(in_features)
        shapes = shapes_with_stem(self.backbone, self.in_features, _FEATURES)
        self.strides.update({x: s.stride for x, s in zip(self.in_features, shapes, strict=True)})
        self._check_stage(refinement)
        del self.head.mask
        self.refinement = refinement
        self.train(self.training)

    def _check_stage(self, refinement: Refinement) -> None:
        _check_head(self.head)
        strides = [self.strides[name] for name in self.in_features]
        halved = [self.stride / 2**n for n in range(len(strides))]
        if self.in_features[0] != self.in_feature or strides != halved or strides[-1] < 2:
            raise ValueError(
                f"{_FEATURES} must begin with {self.in_feature} (MODEL.DEEPMASK.IN_FEATURE), each "
                "next map must have half the stride, the last one at least 2: "
                + ", ".join(f"{x} has {s}" for x, s in zip(self.in_features, strides, strict=True))
            )
        if len(refinement.steps) != len(strides) or refinement.cells != self.head.cells:
            raise ValueError(
                f"the refinement has {len(refinement.steps)} steps for {refinement.cells} cells; "
                f"{_FEATURES} names {len(strides)} maps, the head has {self.head.cells} cells"
            )
        if self.geometry.gt_size != self.geometry.input_size:
            raise ValueError(
                "MODEL.DEEPMASK.GT_SIZE must be INPUT_SIZE, "
                f"{self.geometry.input_size}, for a SharpMask: {self.geometry.gt_size}"
            )
        if self.losses.train_mode != "joint":
            raise ValueError(
                "MODEL.DEEPMASK.TRAIN_MODE must be joint for a SharpMask, which has one loss: "
                f"{self.losses.train_mode!r}"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.SHARPMASK
        if not cfg.MODEL.WEIGHTS:
            logger.warning("MODEL.WEIGHTS is empty: SharpMask refines a DeepMask that was trained")
        arguments = super().from_config(cfg)
        head = arguments["head"]
        _check_head(head)
        shapes = shapes_with_stem(arguments["backbone"], node.IN_FEATURES, _FEATURES)
        refinement = Refinement(
            embed_dim=head.embed.out_channels,
            cells=head.cells,
            in_channels=[shape.channels for shape in shapes],
            km=node.KM,
            ks=node.KS,
            upsample=node.UPSAMPLE,
            pad_mode=node.PAD_MODE,
        )
        return arguments | {"refinement": refinement, "in_features": node.IN_FEATURES}

    def train(self, mode: bool = True) -> "SharpMask":
        super().train(mode)
        freeze(*(part for part in self.children() if part is not self.refinement))
        return self

    def map_names(self) -> tuple[str, ...]:
        return self.in_features

    def encode(
        self, images: Tensor, in_patches: bool = False, with_scores: bool = True
    ) -> EncodedImages:
        """As DeepMask's, but ``maps`` are what the refinement's horizontal paths make of them."""
        with torch.no_grad():
            encoded = super().encode(images, in_patches, with_scores)
        laterals = self.refinement.laterals([encoded.maps[name] for name in self.in_features])
        # The trunk's own maps, which have many more channels, can go.
        encoded.maps = dict(zip(self.in_features, laterals, strict=True))
        return encoded

    def mask_logits(self, images: EncodedImages, locations: Tensor) -> Tensor:
        with torch.no_grad():
            vectors = self._vectors(images.encoded, locations)
        # In patches the horizontal paths see the context, as in images they see the neighbours.
        first = locations + locations.new_tensor([0, images.margin, images.margin])
        return self.refinement.windows(vectors, list(images.maps.values()), first)

    def _vectors(self, encoded: Any, locations: Tensor) -> Tensor:
        """(N, E): what the head's mask layer would have read of these windows."""
        if isinstance(self.head, PaperHead):
            return convolve_at(encoded.reduced, locations, self.head.embed)
        image, row, column = locations.unbind(1)
        return encoded[image, :, row, column]

    def _trunk(self, backbone: Backbone, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        return maps_with_stem(backbone, images, names)

    def _train_step(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {"loss_mask": super()._train_step(batched_inputs)["loss_mask"]}

    def _next_branch(self) -> str:
        return "mask"
