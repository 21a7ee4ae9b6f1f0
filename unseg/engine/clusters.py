"""Clusters that a config names, given to the model's embedding heads."""

import logging

from detectron2.config import CfgNode
from torch import nn

from unseg.checkpoint import CheckpointError, load_clusters
from unseg.structures import Clusters

logger = logging.getLogger(__name__)


def attach_clusters(model: nn.Module, cfg: CfgNode) -> Clusters | None:
    """Let a model assign what it finds to the clusters of MODEL.HIERARCHICAL_EMBEDDING.CLUSTERS.

    Args:
        model: its ``roi_heads`` have ``set_clusters(clusters)``, if the key names a file.
        cfg: the model's.

    Returns:
        the clusters, or None if the key is empty.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no file of clusters; the model has no embedding heads, or they are of
            another dimension, geometry or curvature.
    """
    node = cfg.MODEL.HIERARCHICAL_EMBEDDING
    if not node.CLUSTERS:
        return None
    where = f"MODEL.HIERARCHICAL_EMBEDDING.CLUSTERS {node.CLUSTERS}"
    heads = getattr(model, "roi_heads", None)
    if not hasattr(heads, "set_clusters"):
        raise CheckpointError(
            f"{where}: the model's heads ({type(heads).__name__}) give no embeddings: "
            "MODEL.ROI_HEADS.NAME must be one of the HierarchicalEmbedding... heads"
        )
    clusters, _ = load_clusters(node.CLUSTERS)
    try:
        heads.set_clusters(clusters)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    named = 0 if clusters.classes is None else int((clusters.classes >= 0).sum())
    logger.info("%s: %d clusters, %d of them with a class", where, len(clusters), named)
    return clusters
