"""Names of clusters from the annotations of a data set, for models that assign to clusters.

Legend: N rows, K clusters.
"""

import logging

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from unseg.data import EmbeddingStore
from unseg.engine.embedded_objects import annotated_objects
from unseg.evaluation.cluster_naming import (
    ClusterNames,
    NamingSettings,
    mask_ious,
    match_with_objects,
    name_by_assignment,
    name_by_majority,
)

logger = logging.getLogger(__name__)


def matched_classes(store: EmbeddingStore, dataset: str, min_iou: float) -> np.ndarray:
    """The class of the annotation that each row's mask overlaps most, int64 (N,).

    -1 where no IoU is at least `min_iou`, and in images that the data set does not have.

    Args:
        store: with masks.
        dataset: a registered data set with masks.
        min_iou: see above.

    Raises:
        ValueError: the store has no masks, the data set none of its images, an annotation is
            malformed, or the two are of images of different sizes.
    """
    if not store.has_masks:
        raise ValueError(f"{store.path}: the objects have no masks to be matched")
    known = {str(d["image_id"]): d for d in DatasetCatalog.get(dataset)}
    if not known.keys() & set(map(str, store.image_ids.tolist())):
        raise ValueError(f"data set {dataset!r} has none of the images of {store.path}")
    parts = [np.zeros(0, dtype=np.int64)]
    for rows in store.shards():
        classes = np.full(len(rows), -1)
        for image_id in dict.fromkeys(rows.image_ids.tolist()):
            record = known.get(str(image_id))
            if record is None:
                continue
            own = np.flatnonzero(rows.image_ids == image_id)
            size = (record["height"], record["width"])
            masks = [rows.masks[i] for i in own]
            if any(tuple(mask["size"]) != size for mask in masks):
                raise ValueError(
                    f"image {image_id} is {tuple(masks[0]['size'])} in {store.path}, "
                    f"{size} in data set {dataset!r} (H, W)"
                )
            objects, _ = annotated_objects(record.get("annotations") or [], size)
            best = match_with_objects(mask_ious(masks, objects.masks), min_iou)
            classes[own[best >= 0]] = objects.classes[best[best >= 0]]
        parts.append(classes)
    return np.concatenate(parts)


def name_clusters(
    store: EmbeddingStore, labels: np.ndarray, num_clusters: int, dataset: str, cfg: CfgNode
) -> ClusterNames:
    """Names by MODEL.HIERARCHICAL_EMBEDDING.NAMING, METHOD majority or hungarian.

    The split is the caller's: `dataset` says which images vote.

    Args:
        store: the clustered one.
        labels: int64 (N,), the cluster of each row.
        num_clusters: K.
        dataset: see :func:`matched_classes`.
        cfg: with MATCH_IOU, MIN_PURITY and MIN_SIZE.

    Raises:
        ValueError: see :func:`matched_classes`; METHOD knn_val, which is for the evaluation.
    """
    settings = NamingSettings.from_cfg(cfg)
    if settings.method not in ("majority", "hungarian"):
        raise ValueError(
            "MODEL.HIERARCHICAL_EMBEDDING.NAMING.METHOD must be majority or hungarian to name "
            f"clusters by a data set, got {settings.method!r}"
        )
    votes = matched_classes(store, dataset, settings.match_iou)
    voters = votes >= 0
    if settings.method == "hungarian":
        names = name_by_assignment(labels[voters], votes[voters], num_clusters)
    else:
        names = name_by_majority(
            labels[voters],
            votes[voters],
            num_clusters,
            min_purity=settings.min_purity,
            min_size=settings.min_size,
        )
    named = names.classes >= 0
    logger.info(
        "%d of %d objects vote; %d of %d clusters get a class, of %d classes; %d objects are in "
        "clusters without one",
        voters.sum(),
        len(labels),
        named.sum(),
        num_clusters,
        len(np.unique(names.classes[named])),
        (~named[labels]).sum(),
    )
    return names
