"""Clusters of an embedding store: k-means over its rows, on one or several ranks.

Legend: N rows, n of them this rank's, D dimensions, K clusters.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from matplotlib.figure import Figure
from torch import Tensor

from unseg.checkpoint import atomic_write, save_clusters
from unseg.data import EmbeddingStore
from unseg.evaluation.cluster_metrics import (
    clustering_accuracy,
    normalized_mutual_information,
    purity,
)
from unseg.evaluation.clustering import ClusterSettings
from unseg.geometry import (
    ElbowTable,
    KMeansResult,
    PoincareBall,
    elbow,
    elbow_grid,
    euclidean_kmeans,
    hyperbolic_kmeans,
    lorentz_centroids,
)
from unseg.structures import Clusters

logger = logging.getLogger(__name__)

_KEY = "MODEL.HIERARCHICAL_EMBEDDING.CLUSTERING"
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, eq=False)
class Clustering:
    """Clusters and how they came about.

    Attributes:
        clusters: K of them.
        labels: int64 (n,), of this rank's rows.
        sizes: int64 (K,), of all rows.
        report: JSON-able, the same on all ranks.
    """

    clusters: Clusters
    labels: Tensor
    sizes: np.ndarray
    report: dict[str, Any]


def settings_for(cfg: CfgNode, store: EmbeddingStore) -> ClusterSettings:
    """The config's settings, for the space that a store's embeddings are in.

    Raises:
        ValueError: an unknown centroid, or a number out of range.
    """
    settings = ClusterSettings.from_cfg(cfg)
    settings = replace(settings, geometry=store.geometry, c=store.c)
    if store.geometry == "euclidean" and settings.centroid != "kmeans":
        logger.info(
            "the store is Euclidean: scikit-learn's k-means, not %s centroids", settings.centroid
        )
        settings = replace(settings, centroid="kmeans")
    return settings


def own_rows(store: EmbeddingStore) -> tuple[int, int]:
    """First row of this rank and the one after its last; those of all ranks follow each other."""
    rank, world = comm.get_rank(), comm.get_world_size()
    return len(store) * rank // world, len(store) * (rank + 1) // world


def cluster_rows(tangents: Tensor, settings: ClusterSettings) -> Clustering:
    """Cluster the rows of all ranks.

    Args:
        tangents: float32 (n, D), this rank's.
        settings: K and all else.

    Raises:
        ValueError: K above the number of distinct rows, a setting out of range, or scikit-learn's
            k-means on several ranks.
    """
    euclidean = settings.centroid == "kmeans"
    distributed = comm.get_world_size() > 1
    if euclidean and distributed:
        raise ValueError(f"{_KEY}.CENTROID kmeans (scikit-learn's) runs in one process")
    shared = {"seed": settings.seed, "n_init": settings.n_init, "max_iter": settings.max_iter}
    if euclidean:
        result = euclidean_kmeans(tangents, settings.k, **shared)
        clusters = Clusters(result.centroids.cpu(), "euclidean")
    else:
        result = hyperbolic_kmeans(
            PoincareBall(settings.c).expmap0(tangents.double()),
            settings.k,
            c=settings.c,
            centroid=settings.centroid,
            tol=settings.tol,
            minibatch=settings.minibatch,
            distributed=distributed,
            **shared,
        )
        tangent_centroids = PoincareBall(settings.c).logmap0(result.centroids)
        clusters = Clusters(tangent_centroids.cpu(), "poincare", settings.c)
    sizes = torch.bincount(result.labels, minlength=settings.k).cpu().numpy()
    sizes = np.sum(comm.all_gather(sizes), axis=0)
    report = _report(result, settings, sizes)
    if euclidean and settings.geometry == "poincare":
        report["objectives"] |= hyperbolic_objectives(tangents, result.labels, settings)
    return Clustering(clusters, result.labels.cpu(), sizes, report)


def _report(result: KMeansResult, settings: ClusterSettings, sizes: np.ndarray) -> dict[str, Any]:
    return {
        "k": settings.k,
        "centroid": settings.centroid,
        "geometry": settings.geometry,
        "c": settings.c,
        "settings": {
            key: getattr(settings, key)
            for key in ("seed", "n_init", "max_iter", "tol", "minibatch")
        },
        "rows": int(sizes.sum()),
        "objective": float(result.objective),
        "objectives": {key: float(value) for key, value in result.objectives.items()},
        "n_iter": int(result.n_iter),
        "stop_reason": result.stop_reason,
        "repaired": int(result.repaired),
        "history": [float(value) for value in result.history],
    }


def hyperbolic_objectives(
    tangents: Tensor, labels: Tensor, settings: ClusterSettings
) -> dict[str, float]:
    """Sums of cosh(sqrt(c) d) - 1 and of d^2 to the midpoints of given clusters, which other
    clusterings can be compared by; the clusters of the rows (N, D) are `labels` (N,)."""
    ball = PoincareBall(settings.c)
    points = ball.expmap0(tangents.double())
    centroids = lorentz_centroids(points, labels, settings.k, settings.c)
    distances = ball.dist(points, centroids[labels])
    angles = math.sqrt(settings.c) * distances
    # cosh(x) - 1 without cancellation.
    return {
        "lorentz": float((2 * (angles / 2).sinh().square()).sum()),
        "frechet": float(distances.square().sum()),
    }


def agreement(labels: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """NMI, accuracy and purity, in percent, of clusters (N,) of rows whose classes (N,) are known;
    empty if some are not."""
    if not len(classes) or classes.min() < 0:
        return {}
    return {
        "NMI": 100 * normalized_mutual_information(labels, classes),
        "ACC": 100 * clustering_accuracy(labels, classes),
        "purity": 100 * purity(labels, classes),
    }


def table_row(clustering: Clustering, scores: dict[str, float]) -> dict[str, Any]:
    """What a table says of a clustering."""
    report, rows = clustering.report, max(clustering.report["rows"], 1)
    quantiles = np.quantile(clustering.sizes, _QUANTILES, method="lower").astype(int)
    row = {
        "centroid": report["centroid"],
        "K": report["k"],
        "objective": report["objective"],
    }
    for key, name in (("lorentz", "mean cosh(sd)-1"), ("frechet", "mean d^2")):
        if key in report["objectives"]:
            row[name] = report["objectives"][key] / rows
    return row | {
        "iterations": report["n_iter"],
        "stopped by": report["stop_reason"],
        "sizes 0/25/50/75/100 %": "/".join(map(str, quantiles)),
        "empty": int((clustering.sizes == 0).sum()),
        "repairs": report["repaired"],
        **scores,
    }


def write_clusters(path: Path, clustering: Clustering, store: EmbeddingStore) -> None:
    """Write the file of clusters and, beside it, its report with the clusters' sizes as JSON."""
    origin = {key: store.info.get(key) for key in ("dataset", "config", "ground_truth", "unseg")}
    info = {**clustering.report, "store": origin}
    report = info | {"sizes": clustering.sizes.tolist()}
    with atomic_write(path.with_suffix(".json")) as file:
        json.dump(report, file, indent=1)
        file.write("\n")
    save_clusters(path, clustering.clusters, info)


def elbow_of(tangents: Tensor, settings: ClusterSettings, grid: Sequence[int] | None) -> ElbowTable:
    """The elbow of all rows (N, D), of which at most 100 000 are clustered.

    Args:
        grid: numbers of clusters; None: ten from 200 to 3000, or, of fewer than 12 000 rows, to a
            quarter of them.

    Raises:
        ValueError: fewer than three numbers, or one above the number of distinct rows.
    """
    if grid is None:
        high = max(min(3000, len(tangents) // 4), 4)
        grid = elbow_grid(max(min(200, high // 15), 2), high)
    shared = {"n_init": settings.n_init, "max_iter": settings.max_iter}
    if settings.centroid == "kmeans":
        return elbow(tangents, grid, seed=settings.seed, cluster=euclidean_kmeans, **shared)
    shared |= {"centroid": settings.centroid, "tol": settings.tol, "c": settings.c}
    points = PoincareBall(settings.c).expmap0(tangents.double())
    cluster = partial(hyperbolic_kmeans, minibatch=settings.minibatch)
    return elbow(points, grid, seed=settings.seed, cluster=cluster, **shared)


def plot_elbow(table: ElbowTable, path: Path, settings: ClusterSettings) -> None:
    """A picture of the elbow over K and over log K, with its knees."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    name = "mean cosh(sd) - 1" if settings.centroid == "lorentz" else "mean d$^2$"
    for axes, scale, knee in zip(
        figure.subplots(1, 2), ("linear", "log"), (table.knee_linear, table.knee_log), strict=True
    ):
        axes.plot(table.ks, table.objective, "o-", label="found")
        axes.plot(table.ks, table.monotone, "--", label="never rising")
        axes.axvline(knee, color="gray", linewidth=1, label=f"knee: {knee}")
        axes.set(xscale=scale, xlabel="K", ylabel=name, title=f"{scale} K")
        axes.legend()
    figure.suptitle(f"{settings.centroid}, {table.points} points")
    with atomic_write(path, "wb") as file:
        # Nothing that differs between equal runs.
        figure.savefig(file, format="png", metadata={"Software": None})
