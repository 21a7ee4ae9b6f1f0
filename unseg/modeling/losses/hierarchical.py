"""The hierarchical losses of long-tail discovery (Weng et al., "Unsupervised Discovery of the
Long-Tail in Instance Segmentation Using Hierarchical Self-Supervision", CVPR 2021).

With d the distance of two embeddings, d0 that from the origin, m the margin and [t]+ = max(t, 0):

* L_mask = [d(full, fg) - d(full, bg) + m]+ of a box, its mask's inside and its outside;
* L_object = [d(i, j) - d(i, n) + m]+ of masks i, j that overlap and one of another object, n;
* L_hierarchical = [d0(i) - d0(j) + m]+ of a whole i and its part j: the whole lies nearer to 0.

What is drawn, and from what, is in :mod:`unseg.modeling.losses.mask_relations`. The forms are those
of the authors' training code; what neither it nor the paper has is marked [ours].

Legend: N masks of a batch, D dimensions, T triplets or pairs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor

from unseg.geometry import tangent_dist, tangent_dist0
from unseg.modeling.losses.mask_relations import (
    MaskRelations,
    hierarchy_pairs,
    sample_mask_triplets,
    sample_negatives,
    sample_object_triplets,
)
from unseg.structures.clusters import GEOMETRIES

REDUCTIONS = ("mean", "sum")
HIER_FORMS = ("norm", "triplet")
# Scalars are logged when Detectron2's writers write: reading them makes the CPU wait for the GPU.
LOG_PERIOD = 20


class _Term(NamedTuple):
    """A term without its weight; the share of its hinges above 0; their number."""

    loss: Tensor
    active: Tensor
    count: int


@dataclass(frozen=True)
class HierarchicalEmbeddingLoss:
    """L_mask, L_object and L_hierarchical of a batch; see the module. Holds settings only.

    Attributes:
        geometry: "poincare", or "euclidean" (the ablation): distances of the tangents themselves.
        c: the ball's curvature is -c.
        weight_mask, weight_object, weight_hier: 0 switches the term off.
        margin: m of all terms.
        reduction: "mean" over a term's hinges [ours], or their "sum".
        masks_per_image: L_mask is of so many masks of each image.
        object_iou: positives of L_object overlap by more than this.
        neg_per_pair: negatives of a pair.
        neg_max_iou: greatest IoU of an anchor and a negative of its image [ours].
        hier_containment, hier_min_area_ratio: least share of the part that lies in the whole, least
            quotient of their areas [ours; the authors have 1 and 1].
        hier_form: "norm", or "triplet": L_hierarchical + [d(i, j) - d(i, n) + m]+ with n as in
            L_object [ours].
        max_tangent_norm: where the head cuts tangents to, as a multiple of 1 / sqrt(c): the share
            of tangents there is logged. None: it is not.

    Raises:
        ValueError: a setting that makes no sense, by its name.
    """

    geometry: str = "poincare"
    c: float = 1.0
    weight_mask: float = 1.0
    weight_object: float = 1.0
    weight_hier: float = 1.0
    margin: float = 0.2
    reduction: str = "mean"
    masks_per_image: int = 10
    object_iou: float = 0.4
    neg_per_pair: int = 1
    neg_max_iou: float = 0.1
    hier_containment: float = 0.95
    hier_min_area_ratio: float = 1.1
    hier_form: str = "norm"
    max_tangent_norm: float | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("geometry", GEOMETRIES),
            ("reduction", REDUCTIONS),
            ("hier_form", HIER_FORMS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name, low, high in (
            ("weight_mask", 0, math.inf),
            ("weight_object", 0, math.inf),
            ("weight_hier", 0, math.inf),
            ("margin", 0, math.inf),
            ("masks_per_image", 1, math.inf),
            ("object_iou", 0, 1),
            ("neg_per_pair", 1, math.inf),
            ("neg_max_iou", 0, 1),
            ("hier_containment", 0, 1),
            ("hier_min_area_ratio", 1, math.inf),
        ):
            value = getattr(self, name)
            if not (low <= value <= high and math.isfinite(value)):  # false for NaN
                raise ValueError(f"{name} must be finite and from {low} to {high}, got {value}")
        for name in ("c", "max_tangent_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "HierarchicalEmbeddingLoss":
        """The settings of cfg.MODEL.HIERARCHICAL_EMBEDDING."""
        node = cfg.MODEL.HIERARCHICAL_EMBEDDING
        return cls(
            geometry=node.GEOMETRY,
            c=node.CURVATURE,
            weight_mask=node.WEIGHT_MASK,
            weight_object=node.WEIGHT_OBJECT,
            weight_hier=node.WEIGHT_HIER,
            margin=node.MARGIN,
            reduction=node.REDUCTION,
            masks_per_image=node.MASKS_PER_IMAGE,
            object_iou=node.OBJECT_IOU,
            neg_per_pair=node.NEG_PER_PAIR,
            neg_max_iou=node.NEG_MAX_IOU,
            hier_containment=node.HIER_CONTAINMENT,
            hier_min_area_ratio=node.HIER_MIN_AREA_RATIO,
            hier_form=node.HIER_FORM,
            max_tangent_norm=node.MAX_TANGENT_NORM if node.GEOMETRY == "poincare" else None,
        )

    @property
    def views(self) -> tuple[str, ...]:
        """The views that the terms need: "fg", and for L_mask also "full" and "bg"; or none."""
        if self.weight_mask > 0:
            return ("fg", "full", "bg")
        return ("fg",) if self.weight_object > 0 or self.weight_hier > 0 else ()

    def __call__(
        self,
        tangents: Mapping[str, Tensor],
        relations: Sequence[MaskRelations],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The losses of a batch. If there is an event storage, numbers are logged every 20th step.

        Args:
            tangents: by view, see :attr:`views`, floating (N, D): tangent vectors at the origin,
                all masks of the first image first.
            relations: of the masks of each image, N in all, on the tangents' device.
            generator: what random numbers are drawn from; its device may be another.

        Returns:
            float32 scalars, weighted: loss_embedding_mask, loss_embedding_object and
            loss_embedding_hier, those of weight 0 left out. A term without a triplet in this batch
            is 0, and so is its gradient.

        Raises:
            ValueError: a view is missing, or shapes do not fit.
        """
        if not self.views:
            return {}
        batch = MaskRelations.cat(relations)
        self._check(tangents, batch)
        fg = tangents["fg"]
        with torch.autocast(fg.device.type, enabled=False):
            exact = {view: tangents[view].double() for view in self.views}
            terms, weights = {}, {}
            if self.weight_mask > 0:
                terms["mask"] = self._mask_term(exact, batch, generator)
                weights["mask"] = self.weight_mask
            if self.weight_object > 0:
                terms["object"] = self._object_term(exact["fg"], batch, generator)
                weights["object"] = self.weight_object
            if self.weight_hier > 0:
                terms["hier"] = self._hierarchical_term(exact["fg"], batch, generator)
                weights["hier"] = self.weight_hier
            self._log(exact["fg"].detach(), terms)
            return {
                f"loss_embedding_{name}": (weights[name] * term.loss).float()
                for name, term in terms.items()
            }

    def distance(self, u: Tensor, v: Tensor) -> Tensor:
        """Distances of the rows of tangents (T, D): float64 (T,)."""
        if self.geometry == "poincare":
            return tangent_dist(u, v, self.c)
        return torch.linalg.vector_norm(u.double() - v.double(), dim=-1)

    def distance0(self, u: Tensor) -> Tensor:
        """Distances of the rows of tangents (T, D) from the origin: float64 (T,)."""
        if self.geometry == "poincare":
            return tangent_dist0(u, self.c)
        return torch.linalg.vector_norm(u.double(), dim=-1)

    def _mask_term(
        self, tangents: Mapping[str, Tensor], batch: MaskRelations, generator: torch.Generator
    ) -> _Term:
        chosen = sample_mask_triplets(batch, generator, self.masks_per_image)
        full, fg, bg = (tangents[view][chosen] for view in ("full", "fg", "bg"))
        return self._term(self.distance(full, fg) - self.distance(full, bg))

    def _object_term(self, fg: Tensor, batch: MaskRelations, generator: torch.Generator) -> _Term:
        triplets = sample_object_triplets(
            batch,
            generator,
            min_iou=self.object_iou,
            per_pair=self.neg_per_pair,
            max_iou=self.neg_max_iou,
        )
        return self._term(self._triplet_gaps(fg, triplets))

    def _hierarchical_term(
        self, fg: Tensor, batch: MaskRelations, generator: torch.Generator
    ) -> _Term:
        pairs = hierarchy_pairs(batch, self.hier_containment, self.hier_min_area_ratio)
        d0 = self.distance0(fg)
        term = self._term(d0[pairs[:, 0]] - d0[pairs[:, 1]])
        if self.hier_form == "norm":
            return term
        triplets = sample_negatives(
            batch, pairs, generator, per_pair=self.neg_per_pair, max_iou=self.neg_max_iou
        )
        other = self._term(self._triplet_gaps(fg, triplets))
        count = term.count + other.count
        active = (term.active * term.count + other.active * other.count) / max(count, 1)
        return _Term(term.loss + other.loss, active, count)

    def _triplet_gaps(self, fg: Tensor, triplets: Tensor) -> Tensor:
        """d(anchor, positive) - d(anchor, negative) of triplets (T, 3)."""
        anchor, positive, negative = (fg[index] for index in triplets.unbind(dim=1))
        return self.distance(anchor, positive) - self.distance(anchor, negative)

    def _term(self, gaps: Tensor) -> _Term:
        """Hinges of gaps (T,), reduced. Of none at all the sum is 0, with a gradient of zeros."""
        hinges = (gaps + self.margin).relu()
        count = len(hinges)
        loss = hinges.sum() / (max(count, 1) if self.reduction == "mean" else 1)
        active = (hinges.detach() > 0).double().sum() / max(count, 1)
        return _Term(loss, active, count)

    def _check(self, tangents: Mapping[str, Tensor], batch: MaskRelations) -> None:
        missing = [view for view in self.views if view not in tangents]
        if missing:
            raise ValueError(f"tangents: the views {missing} are missing")
        dimensions = tangents["fg"].shape[-1]
        for view in self.views:
            shape = tuple(tangents[view].shape)
            if shape != (len(batch), dimensions):
                raise ValueError(
                    f"tangents[{view!r}] must be (N, D), of the {len(batch)} masks of relations "
                    f"and as many dimensions as of 'fg', got {shape}"
                )

    def _log(self, fg: Tensor, terms: Mapping[str, _Term]) -> None:
        storage = _current_storage()
        if storage is None or (storage.iter + 1) % LOG_PERIOD:
            return
        values = {"mean_d0": self.distance0(fg).sum() / max(len(fg), 1)}
        if self.max_tangent_norm is not None:
            # Tangents were cut in float32.
            limit = self.max_tangent_norm / math.sqrt(self.c) * (1 - 1e-5)
            clipped = torch.linalg.vector_norm(fg, dim=1) >= limit
            values["share_clipped"] = clipped.double().sum() / max(len(fg), 1)
        values |= {f"active_{name}": term.active for name, term in terms.items()}
        numbers = torch.stack(list(values.values())).tolist()  # one transfer
        for name, number in zip(values, numbers, strict=True):
            storage.put_scalar(f"embedding/{name}", number)
        for name, term in terms.items():
            storage.put_scalar(f"embedding/count_{name}", term.count)


def _current_storage() -> EventStorage | None:
    """The event storage in use, or None. Detectron2 0.5 can only be asked for it."""
    try:
        return get_event_storage()
    except AssertionError:
        return None
