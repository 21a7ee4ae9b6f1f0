"""BoC in numpy: the formula by broadcasting, and the kernels' sums one channel after the other."""

import numpy as np

CHUNK = 32  # channels whose sums the kernels add up first


def exact(features: np.ndarray) -> np.ndarray:
    """The formula in float64, (n, n), of features (n, C) whose sums do not overflow."""
    a, b = features.astype(np.float64)[:, None], features.astype(np.float64)[None]
    distance, total = np.abs(a - b).sum(2), np.abs(a + b).sum(2)
    largest = np.abs(a - b).max(2, initial=0.0)
    with np.errstate(all="ignore"):
        similarity = 1 / (1 + distance / total)
    affinity = (1 + largest) * np.where(np.isfinite(similarity), similarity, 0)
    np.fill_diagonal(affinity, 1)
    return affinity


def ordered(features: np.ndarray) -> np.ndarray:
    """The same in the features' own precision and in the kernels' order: equal to the last bit."""
    count, channels = features.shape
    distance, total, largest = (np.zeros((count, count), features.dtype) for _ in range(3))
    with np.errstate(all="ignore"):
        for begin in range(0, channels, CHUNK):
            parts = np.zeros((2, count, count), features.dtype)
            for column in features.T[begin : begin + CHUNK]:
                gap = np.abs(column[:, None] - column[None])
                parts[0] += gap
                parts[1] += np.abs(column[:, None] + column[None])
                largest = np.fmax(largest, gap)
            distance += parts[0]
            total += parts[1]
        ratio = distance / total
        affinity = np.where(np.isfinite(ratio), (1 + largest) / (1 + ratio), 0)
    np.fill_diagonal(affinity, 1)
    return affinity.astype(features.dtype)


def tolerance(channels: int, dtype: np.dtype) -> float:
    """What rounding can do at most: two sums of non-negative terms, chunk by chunk, and a quotient.

    A sum of m terms is off by at most m - 1 roundings, and each term by one.
    """
    roundings = 2 * (min(channels, CHUNK) + channels / CHUNK + 1) + 4
    return roundings * float(np.finfo(dtype).eps) / 2


def features(count: int, channels: int, dtype: type = np.float32) -> np.ndarray:
    """Signed rows with equal, opposite, nearly opposite, scaled and zero ones among them."""
    x = np.random.default_rng(count * 1000 + channels).normal(size=(count, channels))
    if count > 8:
        x[[3, 4]] = 0
        x[5], x[6], x[7] = x[1], -x[1], -x[1] * (1 + 1e-6)
        x[8] = 1e-3 * x[2]
    return x.astype(dtype)
