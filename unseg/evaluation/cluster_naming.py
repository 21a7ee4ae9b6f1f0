"""Names for clusters: which class a cluster of detections is of, by the labels of some images.

A name is only worth something on images whose labels it does not come from. So images are split in
two by a hash of their ids: clusters are named on one half, scored on the other, and the reverse.

The authors' early protocol (Weng et al., CVPR 2021; "knn_val" here) names clusters by the embedded
ground truth of the very images that are scored, and drops those whose members disagree.

Legend: N detections, V voters, K clusters, C classes, G objects of an image, M embedded objects, D
dimensions.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from unseg.evaluation.cluster_metrics import confusion, nearest
from unseg.evaluation.matching import hungarian
from unseg.evaluation.recall import exact_box_iou, exact_mask_iou
from unseg.layers import pack_masks
from unseg.structures import RLE

METHODS = ("majority", "hungarian", "knn_val")
SPLITS = ("two_fold", "same")


class EmbeddedObjects(Protocol):
    """Embedded ground truth, such as an open :class:`unseg.data.embeddings.EmbeddingStore`.

    Attributes:
        tangents: float32 (M, D).
        classes: int64 (M,), 0-based; -1 for unknown, which name nothing.
        image_ids: int64 (M,).
    """

    tangents: Any
    classes: Any
    image_ids: Any


@dataclass(frozen=True, eq=False)
class ClusterNames:
    """What clusters are called.

    Attributes:
        classes: int64 (K,), -1 for a cluster without a name.
        purity: float64 (K,), share of a cluster's voters that are for its most frequent class (for
            "hungarian" for the class that it is given); NaN without a voter.
        voters: int64 (K,).
    """

    classes: np.ndarray
    purity: np.ndarray
    voters: np.ndarray

    def of(self, clusters: np.ndarray) -> np.ndarray:
        """The class of each detection by its cluster, (N,) int64, -1 for none."""
        return self.classes[clusters]


@dataclass(frozen=True)
class NamingSettings:
    """How clusters get their names: cfg.MODEL.HIERARCHICAL_EMBEDDING.NAMING.

    Attributes:
        method: "majority": the most frequent class of the objects that a cluster's detections are
            matched with; "hungarian": one cluster for each class at most, so that as many matched
            detections as possible are right; "knn_val": the most frequent of what its detections'
            nearest embedded objects say.
        split: "two_fold" or "same": labels of the scored images themselves, which is optimistic.
        match_iou: least IoU of a detection with the object that it is matched with.
        min_purity, min_size: least share of agreeing voters and number of voters of a cluster with
            a name; not for "hungarian".
        knn, knn_per_class: neighbours that vote, and embedded objects of a class at most.
        seed: of the choice of these.

    Raises:
        ValueError: a value out of range.
    """

    method: str = "majority"
    split: str = "two_fold"
    match_iou: float = 0.5
    min_purity: float = 0.95
    min_size: int = 3
    knn: int = 5
    knn_per_class: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"NAMING.METHOD: one of {METHODS} is needed, got {self.method!r}")
        if self.split not in SPLITS:
            raise ValueError(f"NAMING.SPLIT: one of {SPLITS} is needed, got {self.split!r}")
        if not 0 < self.match_iou <= 1:
            raise ValueError(f"NAMING.MATCH_IOU: (0, 1] is needed, got {self.match_iou}")
        if not 0 <= self.min_purity <= 1:
            raise ValueError(f"NAMING.MIN_PURITY: [0, 1] is needed, got {self.min_purity}")
        for name in ("min_size", "knn", "knn_per_class"):
            if getattr(self, name) < 1:
                raise ValueError(f"NAMING.{name.upper()}: 1 or more, got {getattr(self, name)}")

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> "NamingSettings":
        """From ``MODEL.HIERARCHICAL_EMBEDDING.NAMING``, and ``CLUSTERING.SEED``."""
        node = cfg.MODEL.HIERARCHICAL_EMBEDDING
        return cls(
            method=node.NAMING.METHOD,
            split=node.NAMING.SPLIT,
            match_iou=node.NAMING.MATCH_IOU,
            min_purity=node.NAMING.MIN_PURITY,
            min_size=node.NAMING.MIN_SIZE,
            knn=node.NAMING.KNN,
            knn_per_class=node.NAMING.KNN_PER_CLASS,
            seed=node.CLUSTERING.SEED,
        )


def fold_of_image(image_id: Any) -> int:
    """0 or 1, the same on every machine and in every run, whatever other images there are."""
    return hashlib.sha256(str(image_id).encode()).digest()[0] & 1


def match_with_objects(iou: np.ndarray, min_iou: float) -> np.ndarray:
    """The object of the greatest IoU for each detection, if that is at least `min_iou`.

    An object may be matched with many detections.

    Args:
        iou: float64 (N, G).

    Returns:
        int64 (N,), the first of equal ones; -1 for none.
    """
    if not iou.shape[1]:
        return np.full(len(iou), -1)
    best = iou.argmax(1)
    return np.where(iou[np.arange(len(iou)), best] >= min_iou, best, -1)


def mask_ious(masks: Sequence[RLE], objects: Sequence[RLE]) -> np.ndarray:
    """Exact IoU of all pairs of run-length encoded masks of one image, float64 (N, G)."""
    if not len(masks) or not len(objects):
        return np.zeros((len(masks), len(objects)))
    return exact_mask_iou(pack_masks(list(masks)), pack_masks(list(objects)))


def box_ious(boxes: Sequence[Sequence[float]], objects: Sequence[Sequence[float]]) -> np.ndarray:
    """IoU of all pairs of XYWH boxes, float64 (N, G)."""
    return exact_box_iou(np.reshape(boxes, (-1, 4)), np.reshape(objects, (-1, 4)))


def name_by_majority(
    clusters: np.ndarray,
    votes: np.ndarray,
    num_clusters: int,
    *,
    min_purity: float,
    min_size: int,
) -> ClusterNames:
    """Each cluster gets the most frequent class of its voters, if enough of them agree.

    Args:
        clusters: (V,) cluster of each voter.
        votes: (V,) the class that it votes for, 0 or more.
        num_clusters: K.
        min_purity: least share of voters for that class.
        min_size: least number of voters.
    """
    counts = _counts(clusters, votes, num_clusters)
    voters, top = counts.sum(1), counts.max(1, initial=0)
    purity = np.where(voters > 0, top / np.maximum(voters, 1), np.nan)
    named = (voters >= max(1, min_size)) & (np.nan_to_num(purity) >= min_purity)
    classes = np.full(num_clusters, -1)
    classes[named] = counts[named].argmax(1) if named.any() else -1
    return ClusterNames(classes, purity, voters)


def name_by_assignment(clusters: np.ndarray, votes: np.ndarray, num_clusters: int) -> ClusterNames:
    """One cluster for each class at most, and the reverse, of the most right voters (Hungarian).

    Clusters left over have no name, nor those whose class none of their voters is for. Arguments as
    for :func:`name_by_majority`.
    """
    counts = _counts(clusters, votes, num_clusters)
    voters = counts.sum(1)
    classes, right = np.full(num_clusters, -1), counts.max(1, initial=0)
    # Empty rows and columns do not matter, but cost time.
    rows, columns = np.flatnonzero(voters), np.flatnonzero(counts.sum(0))
    for row, column in hungarian(counts[np.ix_(rows, columns)]):
        if counts[rows[row], columns[column]]:
            classes[rows[row]] = columns[column]
            right[rows[row]] = counts[rows[row], columns[column]]
    purity = np.where(voters > 0, right / np.maximum(voters, 1), np.nan)
    return ClusterNames(classes, purity, voters)


def _counts(clusters: np.ndarray, votes: np.ndarray, num_clusters: int) -> np.ndarray:
    """Voters of each cluster for each class, int64 (K, C)."""
    counts = confusion(clusters, votes)
    if len(counts) > num_clusters:
        raise ValueError(f"clusters: {num_clusters} there are, but a voter is of {len(counts) - 1}")
    return np.pad(counts, ((0, num_clusters - len(counts)), (0, 0)))


def choose_per_class(classes: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Indices, rising, of at most `limit` random items of each class; (M,) -> (<= M,)."""
    order = np.random.default_rng(seed).permutation(len(classes))
    by_class = order[np.argsort(classes[order], kind="stable")]
    starts = np.searchsorted(classes[by_class], classes[by_class])
    return np.sort(by_class[np.arange(len(classes)) - starts < limit])


def vote_by_neighbours(
    tangents: Tensor,
    points: Tensor,
    classes: np.ndarray,
    *,
    k: int,
    geometry: str,
    c: float = 1.0,
) -> np.ndarray:
    """The class that most of the k nearest points are of.

    Every neighbour has one vote; between equal classes the nearest neighbour decides.

    Args:
        tangents: (N, D).
        points: tangents (M, D).
        classes: int64 (M,) of the points, 0 or more.
        k: neighbours.
        geometry, c: see :func:`unseg.evaluation.cluster_metrics.distances`.

    Returns:
        int64 (N,); -1 throughout if there is no point.
    """
    if not len(points):
        return np.full(len(tangents), -1)
    found = nearest(tangents, points, k, geometry=geometry, c=c)
    votes = torch.as_tensor(np.asarray(classes))[found]
    # Votes for the class of each neighbour; argmax over a stable order: the first is the nearest.
    agreeing = (votes[:, :, None] == votes[:, None, :]).sum(2).numpy()
    return votes.numpy()[np.arange(len(votes)), agreeing.argmax(1)]


def embedded_voters(
    store: EmbeddedObjects, excluded_images: set[Any], settings: NamingSettings
) -> tuple[Tensor, np.ndarray]:
    """Embedded objects that may vote: (M', D) tangents and (M',) classes.

    Args:
        store: the ground truth of any data set.
        excluded_images: ids whose objects are left out, because these images are scored.
        settings: how many of a class.

    Raises:
        ValueError: tangents, classes and image ids of different lengths.
    """
    tangents = torch.as_tensor(np.asarray(store.tangents))
    classes, images = np.asarray(store.classes), np.asarray(store.image_ids)
    if not len(tangents) == len(classes) == len(images):
        raise ValueError(
            f"NAMING.GROUND_TRUTH: {len(tangents)} tangents, {len(classes)} classes and "
            f"{len(images)} image_ids"
        )
    excluded = np.array([image in excluded_images for image in images.tolist()], dtype=bool)
    allowed = np.flatnonzero((classes >= 0) & ~excluded)
    chosen = allowed[choose_per_class(classes[allowed], settings.knn_per_class, settings.seed)]
    return tangents[torch.as_tensor(chosen)], classes[chosen]
