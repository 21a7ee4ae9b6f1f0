"""Clustering of a data set's embeddings as the config says.

Legend: N items, D dimensions.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from unseg.geometry import PoincareBall, euclidean_kmeans, hyperbolic_kmeans
from unseg.structures.clusters import GEOMETRIES

logger = logging.getLogger(__name__)

CENTROIDS = ("lorentz", "frechet", "kmeans")

# (N, D) float32 tangents -> (N,) int64 clusters, from 0.
Clusterer = Callable[[Tensor], np.ndarray]


@dataclass(frozen=True)
class ClusterSettings:
    """How tangents are clustered: cfg.MODEL.HIERARCHICAL_EMBEDDING.CLUSTERING.

    Attributes:
        k: clusters; fewer if there are fewer distinct tangents.
        centroid: "lorentz", "frechet", or "kmeans": scikit-learn's, on the tangents. Euclidean
            embeddings are always clustered by the last.
        seed, n_init, max_iter, tol, minibatch: see :func:`unseg.geometry.hyperbolic_kmeans`.
        geometry, c: of the embeddings.

    Raises:
        ValueError: no cluster, or an unknown centroid or geometry.
    """

    k: int = 1462
    centroid: str = "lorentz"
    seed: int = 0
    n_init: int = 1
    max_iter: int = 100
    tol: float = 1e-5
    minibatch: int = 0
    geometry: str = "poincare"
    c: float = 1.0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"CLUSTERING.K: 1 or more is needed, got {self.k}")
        if self.centroid not in CENTROIDS:
            raise ValueError(
                f"CLUSTERING.CENTROID: one of {CENTROIDS} is needed, got {self.centroid!r}"
            )
        if self.geometry not in GEOMETRIES:
            raise ValueError(f"geometry: one of {GEOMETRIES} is needed, got {self.geometry!r}")

    def __call__(self, tangents: Tensor) -> np.ndarray:
        """Clusters (N,) of tangents (N, D)."""
        euclidean = self.geometry == "euclidean" or self.centroid == "kmeans"
        points = tangents if euclidean else PoincareBall(self.c).expmap0(tangents.double())
        distinct = len(torch.unique(points, dim=0))
        k = min(self.k, distinct)
        if k < self.k:
            logger.warning(
                "%d clusters instead of %d: there are %d detections, %d of them distinct",
                k,
                self.k,
                len(tangents),
                distinct,
            )
        shared = {"seed": self.seed, "n_init": self.n_init, "max_iter": self.max_iter}
        if euclidean:
            return euclidean_kmeans(points, k, **shared).labels.numpy()
        shared |= {"centroid": self.centroid, "tol": self.tol, "minibatch": self.minibatch}
        return hyperbolic_kmeans(points, k, c=self.c, **shared).labels.numpy()

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> "ClusterSettings":
        """From ``MODEL.HIERARCHICAL_EMBEDDING`` and its ``CLUSTERING``."""
        node = cfg.MODEL.HIERARCHICAL_EMBEDDING
        return cls(
            k=node.CLUSTERING.K,
            centroid=node.CLUSTERING.CENTROID,
            seed=node.CLUSTERING.SEED,
            n_init=node.CLUSTERING.N_INIT,
            max_iter=node.CLUSTERING.MAX_ITER,
            tol=node.CLUSTERING.TOL,
            minibatch=node.CLUSTERING.MINIBATCH,
            geometry=node.GEOMETRY,
            c=node.CURVATURE,
        )
