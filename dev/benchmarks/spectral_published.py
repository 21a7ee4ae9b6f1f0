"""The published steps of spectral instance segmentation, transcribed slowly and obviously.

Written from specs/deep_spectral.md, sections 1.2 to 1.7, with numpy, scipy, scikit-learn and
OpenCV; no published code was opened. Two uses: with ``exact=True`` (dense eigenvectors) it is the
truth in tests, with ``exact=False`` it calls the solvers that the published code calls, and is what
dev/benchmarks/spectral.py compares unseg with. Numbers stay in the type of the features wherever
the libraries leave them there.

Legend: h w patches, n = h * w, C channels, K instances.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from scipy.linalg import eigh
from scipy.sparse.linalg import ArpackError, eigsh
from sklearn.cluster import KMeans
from sklearn.metrics import pairwise_distances

BINS = 30
EIGENPAIRS = 5
KEPT_BY_DEVIATION = 60  # of 128
NULL_SPACE = ("kept", "zeroed", "left out")


@dataclass
class Published:
    """Results of each step.

    Attributes:
        labels: (h, w) int, 0 for background, 1 to K.
        channels: kept for the foreground graph, by rising entropy.
        fiedler: (n,).
        foreground: (h, w) bool, after the clean-up.
        instance_channels: kept for the instance graph, by falling deviation.
        eigenvalues: of the instance graph, without the trivial one.
        embedding: (h, w, 4).
    """

    labels: np.ndarray
    channels: np.ndarray
    fiedler: np.ndarray
    foreground: np.ndarray
    instance_channels: np.ndarray
    eigenvalues: np.ndarray
    embedding: np.ndarray


def normalized(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def low_entropy_channels(features: np.ndarray, keep: int) -> np.ndarray:
    """NCR of the instance graph (1.2): histograms of raw features (n, C), 1e-6 added to counts."""
    patches, channels = features.shape
    entropy = []
    for channel in range(channels):
        counts = torch.histc(torch.from_numpy(features[:, channel].copy()), bins=BINS)
        share = (counts.double() + 1e-6) / (patches * channels)
        entropy.append(-(share * share.log2()).sum().item())
    return np.argsort(np.round(entropy, 12), kind="stable")[:keep]


def full_histogram_channels(features: np.ndarray, keep: int) -> np.ndarray:
    """NCR of the foreground graph (1.2): NaN, from an empty bin, is replaced by 5."""
    patches, channels = features.shape
    entropy = []
    for channel in range(channels):
        counts, _ = np.histogram(features[:, channel], bins=BINS)
        share = counts / (patches * channels)
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy.append(-(share * np.log2(share)).sum())
    entropy = np.where(np.isnan(entropy), 5.0, entropy)
    return np.argsort(np.round(entropy, 12), kind="stable")[:keep]


def eigenpairs(
    weights: np.ndarray, count: int, *, exact: bool, shift_invert: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The smallest of (D - W) v = lambda D v; with `exact`, by LAPACK."""
    degree = weights.sum(axis=1)
    degree[degree < 1e-12] = 1.0
    matrix = np.diag(degree)
    laplacian = matrix - weights
    if exact:
        return eigh(laplacian, matrix, subset_by_index=(0, min(count, len(weights)) - 1))
    if shift_invert:
        try:
            return eigsh(laplacian, k=count, sigma=0, which="LM", M=matrix)
        except (ArpackError, RuntimeError):
            pass
    return eigsh(laplacian, k=count, which="SM", M=matrix)


def minority_positive(vectors: np.ndarray) -> np.ndarray:
    """The sign rule of 1.3, 5, for each column."""
    vectors = vectors.copy()
    for column in range(vectors.shape[1]):
        if 0.5 < np.mean(vectors[:, column] > 0) < 1.0:
            vectors[:, column] *= -1
    return vectors


def foreground_vector(features: np.ndarray, channels: np.ndarray, *, exact: bool) -> np.ndarray:
    """1.3: the Fiedler vector (n,) of the partial cosines of some channels."""
    rows = normalized(features)[:, channels]
    weights = rows @ rows.T
    weights = weights * (weights > 0)
    weights = weights / weights.max()
    _, vectors = eigenpairs(weights, EIGENPAIRS, exact=exact, shift_invert=True)
    return minority_positive(vectors)[:, 1]


def cleaned(mask: np.ndarray) -> np.ndarray:
    """1.4: border rule, external contours of 10 % of the largest area and more, 3 x 3 median."""
    strips = (mask[:5], mask[-5:], mask[:, :5], mask[:, -5:])
    if sum(strip.mean() > 0.9 for strip in strips) >= 2:
        mask = ~mask
    image = mask.astype(np.uint8)
    contours, _ = cv2.findContours(image, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    areas = [cv2.contourArea(contour) for contour in contours]
    if max(areas, default=0) > 0:
        large = [c for c, area in zip(contours, areas) if area >= 0.1 * max(areas)]
        image = cv2.drawContours(np.zeros_like(image), large, -1, 1, cv2.FILLED)
    return cv2.medianBlur(image, 3) > 0


def deviating_channels(rows: np.ndarray, keep: int) -> np.ndarray:
    """DCR (1.5) of rows (n, M)."""
    return np.argsort(-rows.std(axis=0, ddof=1), kind="stable")[:keep]


def similarity(rows: np.ndarray, metric: str) -> np.ndarray:
    """1.6, before the division by the maximum."""
    if metric in ("dot", "cosine"):
        rows = normalized(rows) if metric == "cosine" else rows
        return np.maximum(rows @ rows.T, 0)

    def close(name: str) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nan_to_num(1 / (1 + pairwise_distances(rows, metric=name)), nan=0, posinf=0)

    if metric in ("boc", "boc_product"):
        bray_curtis, chebyshev = close("braycurtis"), close("chebyshev")
        product = metric == "boc_product"
        return bray_curtis * chebyshev if product else bray_curtis / chebyshev
    names = {"l1": "cityblock", "l2": "euclidean"}
    return close(names.get(metric, metric))


def instance_vectors(
    rows: np.ndarray, foreground: np.ndarray, metric: str, *, exact: bool, null_space: str = "kept"
) -> tuple[np.ndarray, np.ndarray]:
    """1.6 and 1.7: eigenvalues and vectors (n, 4) after the trivial one.

    Args:
        rows: (n, C) of all patches.
        foreground: (n,) bool.
        null_space: vectors that vanish on the foreground: "kept" as published; "zeroed", so that
            their arbitrary background does not leak through the median filter; "left out", so that
            the others move up (what the quotient graph is to find). The last two need `exact`.
    """
    weights = similarity(rows * foreground[:, None], metric)
    weights = weights / weights.max()
    count = len(weights) if null_space == "left out" else EIGENPAIRS
    values, vectors = eigenpairs(weights, count, exact=exact, shift_invert=False)
    values, vectors = values[1:], minority_positive(vectors[:, 1:])
    if null_space != "kept":
        lost = np.abs(vectors[foreground]).max(axis=0) < 1e-6 * np.abs(vectors).max(axis=0)
        if null_space == "zeroed":
            vectors[:, lost] = 0
        else:
            values, vectors = values[~lost], vectors[:, ~lost]
    return values[: EIGENPAIRS - 1], vectors[:, : EIGENPAIRS - 1]


def clusters(embedding: np.ndarray, foreground: np.ndarray, count: int, starts: int) -> np.ndarray:
    """1.7: labels (h, w) by k-means on the foreground's part of (h, w, 4)."""
    labels = np.zeros(foreground.shape, dtype=np.int64)
    model = KMeans(n_clusters=count, random_state=0, n_init=starts)
    labels[foreground] = 1 + model.fit_predict(embedding[foreground])
    return labels


def segment_published(
    features: np.ndarray,
    num_instances: int,
    *,
    exact: bool = False,
    metric: str = "boc",
    null_space: str = "kept",
    median: int = 5,
    starts: int = 10,
) -> Published:
    """All steps on features (C, h, w), with as many clusters as there are instances.

    The number of starts of k-means is the library's default: 10 once, 1 now. There is no way out
    where the image has no foreground, or less than clusters: as published.
    """
    height, width = features.shape[1:]
    rows = np.ascontiguousarray(features.reshape(len(features), -1).T)
    keep = len(features) // 3
    channels = full_histogram_channels(normalized(rows), keep)
    fiedler = foreground_vector(rows, channels, exact=exact)
    foreground = cleaned((fiedler > 0).reshape(height, width))

    kept = low_entropy_channels(rows, keep)
    reduced = normalized(rows[:, kept])
    deviating = deviating_channels(reduced, round(KEPT_BY_DEVIATION / 128 * keep))
    values, vectors = instance_vectors(
        reduced[:, deviating], foreground.ravel(), metric, exact=exact, null_space=null_space
    )
    maps = vectors.T.reshape(-1, height, width).astype(np.float32)
    if median > 1:
        maps = np.stack([cv2.medianBlur(np.ascontiguousarray(one), median) for one in maps])
    embedding = np.moveaxis(maps * foreground, 0, -1)
    labels = clusters(embedding, foreground, num_instances, starts)
    return Published(labels, channels, fiedler, foreground, kept[deviating], values, embedding)


def structured_map(
    height: int, width: int, objects: int, channels: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Features such as the method is made for, and the instances in them.

    Ellipses on a background. Two thirds of the channels are noise. In the others a patch has a
    level of its own instance, with something that all instances share, a slow drift over the image,
    and noise; some are louder than others.

    Returns:
        (C, h, w) float32, and (h, w) int, 0 for background.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    instances = np.zeros((height, width), dtype=np.int64)
    columns = rng.permutation(objects)
    for number in range(objects):
        center = (rng.uniform(0.35, 0.65) * height, (columns[number] + 0.5) / objects * width)
        radius = (rng.uniform(0.15, 0.25) * height, rng.uniform(0.28, 0.42) / objects * width)
        inside = ((y - center[0]) / radius[0]) ** 2 + ((x - center[1]) / radius[1]) ** 2 <= 1
        instances[inside] = number + 1
    signal = rng.permutation(channels) < channels // 3
    drift = (y / height)[None] * rng.normal(size=(channels, 1, 1)) + (x / width)[None] * rng.normal(
        size=(channels, 1, 1)
    )
    levels = rng.normal(size=(channels, objects + 1)) * 0.6
    levels[:, 1:] += rng.normal(size=(channels, 1))
    levels += 0.5 * rng.normal(size=(channels, 1))
    noise = rng.uniform(-1, 1, size=(channels, height, width))
    amplitude = np.where(signal, rng.uniform(0.3, 0.9, channels), 1.5)[:, None, None]
    loudness = np.exp(rng.normal(0, 0.4, channels))[:, None, None]
    features = signal[:, None, None] * (levels[:, instances] + 0.3 * drift) + amplitude * noise
    return (loudness * features).astype(np.float32), instances
