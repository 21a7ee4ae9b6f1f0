"""Instances of one image from the eigenvectors of its patch graphs ("Deep Spectral Improvement for
Unsupervised Image Instance Segmentation", Arefi, Mansourian and Kasaei, 2024).

Two graphs: the Fiedler vector of one tells foreground from background, the eigenvectors of the
other, of the foreground patches, embed them for k-means.

Legend: h w patches, n = h * w, f of them foreground, C channels, k eigenvectors, K instances.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unseg.discovery.features import patch_rows
from unseg.discovery.regions import connected_components
from unseg.discovery.spectral.channels import (
    deviation_channel_reduction,
    entropy_channel_reduction,
)
from unseg.discovery.spectral.clustering import cluster_by_silhouette, count_by_eigengap, kmeans
from unseg.discovery.spectral.eigen import laplacian_eigenpairs, orient
from unseg.discovery.spectral.foreground import clean_mask, fiedler_vector
from unseg.discovery.spectral.graphs import ForegroundGraph, foreground_graph
from unseg.discovery.spectral.settings import SpectralSettings


class NothingFoundError(Exception):
    """An image has no instances; the message says why."""


@dataclass(frozen=True)
class Segments:
    """What spectral segmentation found in one image.

    Attributes:
        labels: (h, w) int64, 0 for background, 1 to K for the instances, best score first.
        scores: (K,) float in (0, 1].
        embeddings: (K, C) float, mean of the L2-normalised features of each instance's patches.
        reason: why there are no instances; empty if there are some.
        fiedler: (h, w) float, second eigenvector of the foreground graph, or None.
        foreground: (h, w) bool, after the clean-up, or None.
        eigenvalues: (k,) float of the instance graph without the trivial one, or None. With one
            node for the background: that of the vectors that vanish on the foreground is not there.
        embedding: (k, h, w) float, its eigenvectors, after the median filter, or None.
        channels: indices of the channels that the instance graph was made of, or None.
    """

    labels: Tensor
    scores: Tensor
    embeddings: Tensor
    reason: str = ""
    fiedler: Tensor | None = None
    foreground: Tensor | None = None
    eigenvalues: Tensor | None = None
    embedding: Tensor | None = None
    channels: Tensor | None = None


@torch.no_grad()
def segment(
    features: Tensor, settings: SpectralSettings, num_instances: int | None = None
) -> Segments:
    """Instances on the patch grid of one image.

    Args:
        features: (C, h, w) float, as the backbone gives them.
        settings: of the method.
        num_instances: how many to look for, for ``clusters.mode`` "oracle".

    Returns:
        labels and scores. Input without structure gives no instances and a reason, never an error.

    Raises:
        ValueError: `features` is not (C, h, w) or not finite, or the oracle's number is missing.
    """
    if settings.clusters.mode == "oracle" and num_instances is None:
        raise ValueError("CLUSTERS.MODE oracle needs the number of instances of the image")
    x = patch_rows(features)  # (n, C)
    grid = tuple(features.shape[1:])
    found: dict[str, Tensor] = {}
    try:
        labels, scores = _segment(x, grid, settings, num_instances, found)
        reason = ""
    except NothingFoundError as nothing:
        labels, scores, reason = x.new_zeros(grid), x.new_zeros(0), str(nothing)
    labels = labels.long()
    return Segments(labels, scores, _mean_features(x, labels, len(scores)), reason, **found)


def _segment(
    x: Tensor,
    grid: tuple[int, int],
    settings: SpectralSettings,
    num_instances: int | None,
    found: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    if settings.clusters.mode == "oracle" and num_instances < 1:
        raise NothingFoundError("no instance to look for")
    if len(x) < 2 or bool((x == x[:1]).all()):
        raise NothingFoundError("all patches look alike")
    kept = _ncr_channels(x, settings)
    fiedler = fiedler_vector(F.normalize(x, dim=1).index_select(1, kept[0]), solver=settings.solver)
    found["fiedler"] = fiedler.view(grid)
    mask = (fiedler > 0).view(grid).cpu().numpy()
    mask = clean_mask(mask, **vars(settings.foreground))
    found["foreground"] = foreground = torch.from_numpy(mask).to(x.device)
    if not mask.any():
        raise NothingFoundError("no foreground")
    rows, found["channels"] = _instance_features(x, kept[1], settings)
    rows = rows[foreground.flatten()]
    graph = foreground_graph(
        rows,
        len(x) - len(rows),
        settings.affinity,
        drop=settings.background == "drop",
    )
    values, embedding = _embed(graph, foreground, settings)
    found["eigenvalues"], found["embedding"] = values[1:][: len(embedding)], embedding
    points = embedding[:, foreground].t().cpu().numpy()
    clusters = _cluster(points, values.cpu().numpy(), graph, settings, num_instances)
    labels = np.zeros(grid, dtype=np.int64)
    labels[mask] = clusters + 1
    labels = _split_and_drop(labels, settings)
    if not labels.any():
        raise NothingFoundError("all segments are too small")
    return _by_score(labels, foreground, found["fiedler"])


def _mean_features(x: Tensor, labels: Tensor, count: int) -> Tensor:
    """Mean of the L2-normalised rows (n, C) of each label from 1 to `count`, (K, C)."""
    members = F.one_hot(labels.flatten(), count + 1)[:, 1:].to(x.dtype)
    return members.t() @ F.normalize(x, dim=1) / members.sum(dim=0).clamp(min=1)[:, None]


def _ncr_channels(x: Tensor, settings: SpectralSettings) -> tuple[Tensor, Tensor]:
    """Channels for the foreground graph and for the instance graph."""
    ncr = settings.ncr
    if not ncr.enabled:
        every = torch.arange(x.shape[1], device=x.device)
        return every, every
    keep = max(1, x.shape[1] // ncr.divisor)
    modes = (ncr.mode_foreground, ncr.mode_instances)
    kept = {m: entropy_channel_reduction(x, keep, bins=ncr.bins, mode=m)[1] for m in set(modes)}
    return kept[modes[0]], kept[modes[1]]


def _instance_features(
    x: Tensor, kept: Tensor, settings: SpectralSettings
) -> tuple[Tensor, Tensor]:
    """L2-normalised rows over the channels that NCR kept, then those that DCR keeps."""
    rows = F.normalize(x.index_select(1, kept), dim=1)
    if not settings.dcr.enabled:
        return rows, kept
    keep = max(1, round(settings.dcr.keep_ratio * len(kept)))
    rows, chosen = deviation_channel_reduction(rows, keep)
    return rows, kept[chosen]


def _embed(
    graph: ForegroundGraph, foreground: Tensor, settings: SpectralSettings
) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the graph, the trivial one first, and the embedding (k, h, w) of the patches.

    Each map is a vector with one value for all background patches, median filtered, and 0 on the
    background afterwards.
    """
    wanted = settings.num_eigenvectors
    at_least = settings.clusters.max_num + 1 if settings.clusters.mode == "eigengap" else wanted
    values, vectors = laplacian_eigenpairs(
        graph.weights, max(wanted, at_least) + 1, solver=settings.solver
    )
    full = vectors.new_zeros((foreground.numel(), vectors.shape[1] - 1))
    inside = foreground.flatten()
    count = int(inside.sum())
    full[inside] = vectors[:count, 1:]
    if len(graph.weights) > count:
        full[~inside] = vectors[count, 1:]
    full = orient(full)
    if settings.background == "reference":
        full = _with_degenerate(full, values[1:], graph)
    maps = full[:, :wanted].t().reshape(-1, *foreground.shape)
    if settings.embedding_median > 1 and len(maps):  # a single patch has no eigenvector
        maps = torch.stack([_median(m, settings.embedding_median) for m in maps])
    return values, maps * foreground


def _with_degenerate(vectors: Tensor, values: Tensor, graph: ForegroundGraph) -> Tensor:
    """The vectors (n, m), and zeros in the places of those that vanish on the foreground."""
    before = int((values <= graph.degenerate).sum())
    lost = vectors.new_zeros((len(vectors), min(graph.multiplicity, vectors.shape[1])))
    return torch.cat((vectors[:, :before], lost, vectors[:, before:]), dim=1)


def _median(values: Tensor, width: int) -> Tensor:
    filtered = cv2.medianBlur(values.cpu().contiguous().numpy(), width)
    return torch.from_numpy(filtered).to(values.device)


def _cluster(
    points: np.ndarray,
    eigenvalues: np.ndarray,
    graph: ForegroundGraph,
    settings: SpectralSettings,
    num_instances: int | None,
) -> np.ndarray:
    """Cluster of each foreground patch, from 0."""
    options = settings.clusters
    if options.mode == "auto":
        return cluster_by_silhouette(
            points,
            options.max_num,
            min_silhouette=options.min_silhouette,
            seed=options.seed,
            num_init=options.num_init,
        )
    if options.mode == "eigengap":
        has_background = len(graph.weights) > len(points)
        count = count_by_eigengap(eigenvalues, options.max_num, background=has_background)
    else:
        count = num_instances if options.mode == "oracle" else options.num
    return kmeans(points, min(count, len(points)), seed=options.seed, num_init=options.num_init)


def _split_and_drop(labels: np.ndarray, settings: SpectralSettings) -> np.ndarray:
    """Components in place of clusters, if wanted; those below the smallest area become 0."""
    if settings.split_components:
        split = np.zeros_like(labels)
        for cluster in range(1, labels.max() + 1):
            parts, areas = connected_components(labels == cluster)
            split[parts > 0] = parts[parts > 0] + split.max()
        labels = split
    areas = np.bincount(labels.ravel())
    large = areas >= settings.min_area * labels.size
    large[0] = False
    return np.where(large[labels], labels, 0)


def _by_score(labels: np.ndarray, foreground: Tensor, fiedler: Tensor) -> tuple[Tensor, Tensor]:
    """Labels 1 to K by falling score, and the scores.

    The score, which the paper does not have, is a segment's mean positive Fiedler value relative to
    the greatest of the image: how clearly it is foreground. Its normalised cut in the instance
    graph was tried as well: where all affinities are of one order, as with BoC, that measures
    little but the area, and gave less AP. Where the clean-up has inverted the mask, the negative
    side counts.
    """
    side = torch.where(fiedler[foreground].mean() < 0, -fiedler, fiedler)
    positive = torch.where(foreground, side, 0.0).clamp(min=0).flatten()
    members = F.one_hot(torch.from_numpy(labels).to(fiedler.device).flatten()).to(positive.dtype)
    used = members.any(dim=0)
    used[0] = False
    members = members[:, used]  # (n, K)
    salience = members.t() @ positive / members.sum(dim=0)
    scores = (salience / positive.max().clamp(min=torch.finfo(positive.dtype).tiny)).clamp(1e-6, 1)
    order = scores.argsort(descending=True, stable=True)
    rank = torch.zeros(len(used), dtype=torch.int64, device=used.device)
    rank[used.nonzero()[:, 0][order]] = torch.arange(1, len(order) + 1, device=used.device)
    return rank[torch.from_numpy(labels).to(rank.device)], scores[order]
