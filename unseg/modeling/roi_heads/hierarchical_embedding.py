"""Detectron2's ROI heads with embeddings of their masks (Weng et al., "Unsupervised Discovery of
the Long-Tail in Instance Segmentation Using Hierarchical Self-Supervision", CVPR 2021).

Any R-CNN becomes one that embeds by MODEL.ROI_HEADS.NAME: StandardROIHeads ->
HierarchicalEmbeddingROIHeads, CascadeROIHeads -> HierarchicalEmbeddingCascadeROIHeads, Res5ROIHeads
-> HierarchicalEmbeddingRes5ROIHeads. Its weights load, its detections stay what they are.

Legend: N regions of an image, D dimensions, m cells per side of a mask, K clusters.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from unseg.geometry import nearest_centroids
from unseg.modeling.freezing import evaluating
from unseg.modeling.losses.hierarchical import HierarchicalEmbeddingLoss
from unseg.modeling.losses.mask_relations import mask_relations
from unseg.modeling.roi_heads.embedding_head import build_roi_embedding_head
from unseg.modeling.roi_heads.regions import Regions
from unseg.structures.clusters import Clusters

MASK_SOURCES = ("pred", "box")
_KEY = "MODEL.HIERARCHICAL_EMBEDDING"


class HierarchicalEmbedding(nn.Module):
    """What is added to ROI heads: a mixin, before one of Detectron2's classes.

    Inference adds ``pred_embeddings``, float32 (N, D), points in the ball, and ``pred_tangents``,
    float32 (N, D), the tangent vectors at the origin that they are the expmap0 of. Keep the
    latter: near the rim a float32 point is not exact. With ``GEOMETRY`` "euclidean" they are
    equal. With clusters (:meth:`set_clusters`) it adds ``pred_clusters``, int64 (N,), and
    ``cluster_distances``, float32 (N,).

    Training adds ``loss_embedding_*`` to the detector's losses. Their regions are the proposals of
    highest objectness, as they come, with the masks that the mask head gives them in eval mode.

    Detectron2's test-time augmentation merges boxes and masks alone: its results have no
    embeddings.
    """

    @configurable
    def __init__(
        self,
        *,
        embedding_head: nn.Module,
        embedding_loss: HierarchicalEmbeddingLoss,
        mask_source: str = "pred",
        class_specific_masks: bool = True,
        detach_features: bool = True,
        max_proposals: int = 20,
        relation_stride: int = 4,
        min_mask_area: int = 16,
        skip_box_head: bool = False,
        max_detections: int = 100,
        **heads: Any,
    ):
        """
        Args:
            embedding_head: see HierarchicalEmbeddingHead.
            embedding_loss: of its tangents.
            mask_source: "pred", the mask head's, or "box", the whole box.
            class_specific_masks: the mask head has masks of each class; in training that of the
                class is taken that the box head gives to a proposal.
            detach_features: the embedding losses do not train the backbone.
            max_proposals: of each image, in training.
            relation_stride, min_mask_area: see mask_relations.
            skip_box_head: the proposals are the detections, of class 0, by falling objectness.
            max_detections: then at most so many of an image.
            heads: of Detectron2's class.

        Raises:
            ValueError: options that do not go together, by the names of their keys.
        """
        super().__init__(**heads)
        if mask_source not in MASK_SOURCES:
            raise ValueError(f"{_KEY}.MASK_SOURCE must be in {MASK_SOURCES}, got {mask_source!r}")
        if mask_source == "pred" and not self.mask_on:
            raise ValueError(
                f'{type(self).__name__} needs MODEL.MASK_ON, or {_KEY}.MASK_SOURCE "box"'
            )
        if mask_source == "box" and "bg" in embedding_loss.views:
            raise ValueError(
                f'{_KEY}.WEIGHT_MASK must be 0 with MASK_SOURCE "box": nothing is around such masks'
            )
        if skip_box_head and mask_source == "pred" and class_specific_masks:
            raise ValueError(
                f"{_KEY}.SKIP_BOX_HEAD needs MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK: without the "
                "box head proposals have no class"
            )
        if max_proposals < 1:
            raise ValueError(f"{_KEY}.MAX_PROPOSALS must be at least 1, got {max_proposals}")
        self.embedding_head = embedding_head
        self.embedding_loss = embedding_loss
        self.mask_source = mask_source
        self.class_specific_masks = class_specific_masks
        self.detach_features = detach_features
        self.max_proposals = max_proposals
        self.relation_stride = relation_stride
        self.min_mask_area = min_mask_area
        self.skip_box_head = skip_box_head
        self.max_detections = max_detections
        self._images: ImageList | None = None
        self.set_clusters(None)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        node = cfg.MODEL.HIERARCHICAL_EMBEDDING
        agnostic = cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK or cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1
        return super().from_config(cfg, input_shape) | {
            "embedding_head": build_roi_embedding_head(cfg, input_shape),
            "embedding_loss": HierarchicalEmbeddingLoss.from_config(cfg),
            "mask_source": node.MASK_SOURCE,
            "class_specific_masks": cfg.MODEL.MASK_ON and not agnostic,
            "detach_features": node.DETACH_FEATURES,
            "max_proposals": node.MAX_PROPOSALS,
            "relation_stride": node.RELATION_STRIDE,
            "min_mask_area": node.MIN_MASK_AREA,
            "skip_box_head": node.SKIP_BOX_HEAD,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def set_clusters(self, clusters: Clusters | None) -> None:
        """Assign detections to clusters from now on, or no longer.

        If the clusters have classes, ``pred_classes`` of ``forward`` are these, and detections in a
        cluster without one are dropped. The clusters are not part of the model's weights.

        Raises:
            ValueError: clusters in another space than the head's.
        """
        head = self.embedding_head
        centroids = classes = None
        if clusters is not None:
            here = (head.geometry, head.embed_dim)
            there = (clusters.geometry, clusters.centroids.shape[1])
            same_ball = head.geometry == "euclidean" or clusters.c == head.c
            if here != there or not same_ball:
                raise ValueError(
                    f"clusters: they are {there[0]}, of {there[1]} dimensions and c = {clusters.c},"
                    f" but embeddings are {here[0]}, of {here[1]} dimensions and c = {head.c}"
                )
            device = next(head.parameters()).device
            centroids = head.to_points(clusters.centroids.to(device))
            classes = None if clusters.classes is None else clusters.classes.to(device)
        self.register_buffer("cluster_centroids", centroids, persistent=False)
        self.register_buffer("cluster_classes", classes, persistent=False)

    @contextlib.contextmanager
    def showing(self, images: ImageList) -> Iterator[None]:
        """Within this, heads that embed pixels see these images: the detector's normalised input.

        ``forward`` does it itself. ``forward_with_given_boxes`` is not given any images.
        """
        before, self._images = self._images, images
        try:
            yield
        finally:
            self._images = before

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As of Detectron2's ROI heads, with what the class adds."""
        with self.showing(images):
            if self.training:
                # Labelled, sampled and with boxes in another place afterwards.
                kept = [Instances(x.image_size, **x.get_fields()) for x in proposals]
                instances, losses = super().forward(images, features, proposals, targets)
                return instances, losses | self.embedding_losses(features, kept)
            if self.skip_box_head:
                found = self.forward_with_given_boxes(features, self._as_detections(proposals))
            else:
                found, _ = super().forward(images, features, proposals, targets)
            return [self._named(x) for x in found], {}

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """As of Detectron2's ROI heads; adds the embeddings and clusters, and drops nothing.

        Raises:
            RuntimeError: the head embeds pixels and was not shown any, see :meth:`showing`; or
                there are clusters but no masks, as in test-time augmentation.
        """
        instances = super().forward_with_given_boxes(features, instances)
        if self.mask_source == "pred" and not self.mask_on:
            # Detectron2's test-time augmentation has switched the mask head off.
            if self.cluster_centroids is not None:
                raise RuntimeError(f"{_KEY}.CLUSTERS does not go with test-time augmentation")
            return instances
        boxes, masks = self._boxes_and_masks(instances)
        tangents = self._tangents(features, boxes, masks, [x.image_size for x in instances])
        for x, u in zip(instances, tangents, strict=True):
            points = self.embedding_head.to_points(u)
            x.pred_embeddings, x.pred_tangents = points.float(), u
            if self.cluster_centroids is not None:
                x.pred_clusters, x.cluster_distances = self._nearest(points)
        return instances

    def embedding_losses(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """The embedding losses of a batch. Labels are not needed, nor the training mode.

        A head that embeds pixels must be shown the images, see :meth:`showing`.

        Args:
            features: as in ``forward``.
            proposals: of each image, with ``proposal_boxes`` and ``objectness_logits``.

        Returns:
            see HierarchicalEmbeddingLoss. Random numbers are from torch's global CPU generator.
        """
        views = self.embedding_loss.views
        if not views:
            return {}
        if self.detach_features:
            features = {name: feature.detach() for name, feature in features.items()}
        regions, relations = self._training_regions(features, proposals)
        tangents = self.embedding_head(regions, views)
        return self.embedding_loss(tangents, relations, torch.default_generator)

    @torch.no_grad()
    def embed(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        boxes: Sequence[Boxes],
        masks: Sequence[Tensor],
    ) -> list[Tensor]:
        """Embed given masks, for example the annotated ones.

        Args:
            images: the detector's normalised input.
            features: what the backbone has made of them.
            boxes: N of each image, in pixels of the input.
            masks: of each image, bool or from 0 to 1, (N, h, w): h x w cells cover the image, in
                whatever resolution.

        Returns:
            tangents of each image, float32 (N, D).

        Raises:
            ValueError: numbers of images, boxes and masks that differ, or wrong shapes.
        """
        sizes = images.image_sizes
        if not len(boxes) == len(masks) == len(sizes):
            raise ValueError(f"{len(sizes)} images, {len(boxes)} boxes and {len(masks)} masks")
        for i, (own_boxes, own_masks) in enumerate(zip(boxes, masks, strict=True)):
            if own_masks.dim() != 3 or len(own_masks) != len(own_boxes):
                raise ValueError(
                    f"masks[{i}] must be ({len(own_boxes)}, h, w) for as many boxes, "
                    f"got {tuple(own_masks.shape)}"
                )
        with self.showing(images):
            tensors = [x.tensor for x in boxes]
            return self._tangents(features, tensors, masks, sizes, whole_images=True)

    def _tangents(
        self,
        features: dict[str, Tensor],
        boxes: Sequence[Tensor],
        masks: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        whole_images: bool = False,
    ) -> list[Tensor]:
        """Tangents (N, D) of each image; see Regions."""
        regions = Regions(features, boxes, masks, sizes, whole_images, self._images)
        return list(self.embedding_head(regions)["fg"].split(regions.counts))

    def _boxes_and_masks(self, instances: list[Instances]) -> tuple[list[Tensor], list[Tensor]]:
        """Boxes (N, 4) and masks (N, m, m) of each image's instances."""
        boxes = [x.pred_boxes.tensor.detach() for x in instances]
        if self.mask_source == "box":
            # Of so many cells because pasting rounds the corners of a mask by one.
            return boxes, [x.new_ones(len(x), 28, 28) for x in boxes]
        return boxes, [x.pred_masks[:, 0].detach() for x in instances]

    @torch.no_grad()
    def _nearest(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The clusters of points, float64 (N, D), and the distances to their centroids."""
        centroids = self.cluster_centroids.double()  # half precision of the model or not
        if self.embedding_head.geometry == "poincare":
            clusters, distances = nearest_centroids(points, centroids, self.embedding_head.c)
        else:
            exact = "donot_use_mm_for_euclid_dist"
            distances, clusters = torch.cdist(points, centroids, compute_mode=exact).min(dim=1)
        return clusters, distances.float()

    def _named(self, instances: Instances) -> Instances:
        """Those in clusters with a class, of this class; all of them if clusters have none."""
        if self.cluster_classes is None:
            return instances
        classes = self.cluster_classes[instances.pred_clusters]
        instances.pred_classes = classes
        return instances[classes >= 0]

    def _as_detections(self, proposals: list[Instances]) -> list[Instances]:
        """The best proposals of each image, in the fields of detections."""
        found = []
        for x in proposals:
            best = _best(x, self.max_detections)
            detections = Instances(x.image_size)
            detections.pred_boxes = best.proposal_boxes
            detections.scores = best.objectness_logits.sigmoid()
            detections.pred_classes = torch.zeros_like(best.objectness_logits, dtype=torch.int64)
            found.append(detections)
        return found

    @torch.no_grad()
    def _training_regions(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> tuple[Regions, list[Any]]:
        """Regions of the best proposals of each image, and how their masks lie to each other."""
        proposals = [_best(x, self.max_proposals) for x in proposals]
        with evaluating(self):
            instances = [Instances(x.image_size, pred_boxes=x.proposal_boxes) for x in proposals]
            for x, classes in zip(instances, self._classes(features, proposals), strict=True):
                x.pred_classes = classes
            if self.mask_source == "pred":
                instances = super().forward_with_given_boxes(features, instances)
        boxes, masks = self._boxes_and_masks(instances)
        sizes = [x.image_size for x in instances]
        relations = [
            mask_relations(soft.float(), own, size, self.relation_stride, self.min_mask_area)
            for soft, own, size in zip(masks, boxes, sizes, strict=True)
        ]
        return Regions(features, boxes, masks, sizes, images=self._images), relations

    def _classes(self, features: dict[str, Tensor], proposals: list[Instances]) -> list[Tensor]:
        """The class of each proposal whose mask is taken, int64 (N,)."""
        if self.mask_source == "box" or not self.class_specific_masks:
            return [torch.zeros_like(x.objectness_logits, dtype=torch.int64) for x in proposals]
        return [p[:, :-1].argmax(dim=1) for p in self._class_probabilities(features, proposals)]

    def _class_probabilities(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> Sequence[Tensor]:
        """What the box head makes of the proposals of each image: (N, classes + background)."""
        raise NotImplementedError


def _best(proposals: Instances, count: int) -> Instances:
    """The `count` proposals of highest objectness, by falling objectness."""
    logits = proposals.objectness_logits
    return proposals[logits.sort(descending=True, stable=True).indices[:count]]


@ROI_HEADS_REGISTRY.register()
class HierarchicalEmbeddingROIHeads(HierarchicalEmbedding, StandardROIHeads):
    """StandardROIHeads (FPN, C5) that embed; see :class:`HierarchicalEmbedding`."""

    def _class_probabilities(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> Sequence[Tensor]:
        maps = [features[name] for name in self.box_in_features]
        pooled = self.box_pooler(maps, [x.proposal_boxes for x in proposals])
        return self.box_predictor.predict_probs(
            self.box_predictor(self.box_head(pooled)), proposals
        )


@ROI_HEADS_REGISTRY.register()
class HierarchicalEmbeddingCascadeROIHeads(HierarchicalEmbedding, CascadeROIHeads):
    """CascadeROIHeads that embed; see :class:`HierarchicalEmbedding`."""

    def _class_probabilities(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> Sequence[Tensor]:
        # Of the first stage, which is the one that learns from proposals.
        maps = [features[name] for name in self.box_in_features]
        predictions = self._run_stage(maps, proposals, 0)
        return self.box_predictor[0].predict_probs(predictions, proposals)


@ROI_HEADS_REGISTRY.register()
class HierarchicalEmbeddingRes5ROIHeads(HierarchicalEmbedding, Res5ROIHeads):
    """Res5ROIHeads (C4) that embed; see :class:`HierarchicalEmbedding`.

    Embeddings are from the features before res5, by convolutions of their own.
    """

    def _class_probabilities(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> Sequence[Tensor]:
        maps = [features[name] for name in self.in_features]
        pooled = self._shared_roi_transform(maps, [x.proposal_boxes for x in proposals])
        return self.box_predictor.predict_probs(
            self.box_predictor(pooled.mean(dim=(2, 3))), proposals
        )
