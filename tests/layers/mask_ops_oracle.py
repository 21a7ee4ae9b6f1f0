"""Slow, exact mask ops in numpy and Python numbers, and the code paths to hold against them."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import numpy as np
import pytest
import torch

from unseg.layers import backend, native

# Every way the ops can run. On a machine that lacks one, its tests are skipped.
PATHS = ["avx512", "avx2", "popcnt", "portable", "pytorch", "cuda", "cuda-pytorch"]
NATIVE_PATHS = PATHS[:4]
MODES = ["iou", "iomin", "ioa", "iob"]


@contextmanager
def use_path(path: str) -> Iterator[torch.device]:
    """Makes the ops run that way; gives the device for the inputs."""
    device = torch.device("cuda" if path.startswith("cuda") else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    environment, devices = os.environ.get("UNSEG_MASK_ISA"), native._DEVICES
    try:
        if path.endswith("pytorch"):
            native._DEVICES = frozenset()
        else:
            if path in NATIVE_PATHS:
                os.environ["UNSEG_MASK_ISA"] = path
            if backend(device) != path:
                pytest.skip(f"{path}: not built, or not for this processor")
        yield device
    finally:
        native._DEVICES = devices
        os.environ.pop("UNSEG_MASK_ISA", None)
        if environment is not None:
            os.environ["UNSEG_MASK_ISA"] = environment


def remembered(function: Callable) -> Callable:
    """Caches by the values of array arguments: every path asks for the same results."""
    cache: dict = {}

    def key(value: object) -> object:
        if isinstance(value, np.ndarray):
            return value.shape, value.dtype.str, value.tobytes()
        return value

    @wraps(function)
    def wrapper(*args, **kwargs):
        found = (*map(key, args), *((k, key(v)) for k, v in kwargs.items()))
        if found not in cache:
            cache[found] = function(*args, **kwargs)
        return cache[found]

    return wrapper


def intersections(masks1: np.ndarray, masks2: np.ndarray) -> np.ndarray:
    """Common pixels of all pairs, int64 (N, M); masks bool (N, H, W)."""
    flat1 = masks1.reshape(len(masks1), math.prod(masks1.shape[1:]))
    flat2 = masks2.reshape(len(masks2), math.prod(masks2.shape[1:]))
    out = np.zeros((len(flat1), len(flat2)), np.int64)
    for i, mask in enumerate(flat1):
        out[i] = (flat2 & mask).sum(1)
    return out


@remembered
def overlaps(masks1: np.ndarray, masks2: np.ndarray, mode: str) -> np.ndarray:
    """Exact quotients rounded to float64 (N, M), 0 for 0 / 0."""
    inter = intersections(masks1, masks2)
    area1, area2 = masks1.sum((1, 2)).tolist(), masks2.sum((1, 2)).tolist()
    out = np.zeros(inter.shape)
    for i, a in enumerate(area1):
        for j, b in enumerate(area2):
            common = int(inter[i, j])
            below = {"iou": a + b - common, "iomin": min(a, b), "ioa": a, "iob": b}[mode]
            out[i, j] = common / below if below else 0.0
    return out


def falling(scores: np.ndarray) -> list[int]:
    """Indices by falling score, equal ones in input order, NaN last."""
    values = [float(s) for s in scores]
    return sorted(range(len(values)), key=lambda i: (math.isnan(values[i]), -values[i]))


@remembered
def greedy(
    masks: np.ndarray,
    scores: np.ndarray,
    threshold: float,
    labels: np.ndarray | None = None,
    mode: str = "iou",
) -> list[int]:
    """Indices that greedy NMS keeps, by falling score."""
    ratio = overlaps(masks, masks, mode)
    kept: list[int] = []
    for j in falling(scores):
        rivals = (i for i in kept if labels is None or labels[i] == labels[j])
        if not any(ratio[i, j] > threshold for i in rivals):
            kept.append(j)
    return kept


@remembered
def matrix(
    masks: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray | None = None,
    kernel: str = "gaussian",
    sigma: float = 2.0,
) -> np.ndarray:
    """Decayed scores, float64 (N,), by the definition: quotients of f, pair by pair."""
    order = falling(scores)
    u = overlaps(masks, masks, "iou")[np.ix_(order, order)]
    if labels is not None:
        u = u * (labels[order][:, None] == labels[order][None, :])
    out = np.array([float(s) for s in scores])
    worst: list[float] = []
    for j in range(len(order)):
        factors = [1.0]
        for i in range(j):
            if kernel == "linear":
                if worst[i] < 1:
                    factors.append((1 - u[i, j]) / (1 - worst[i]))
            else:
                factors.append(math.exp(-sigma * u[i, j] ** 2) / math.exp(-sigma * worst[i] ** 2))
        worst.append(max(u[:j, j], default=0.0))
        out[order[j]] *= min(factors)
    return out


def blobs(count: int, height: int, width: int, seed: int, objects: int = 6) -> np.ndarray:
    """Bool masks (N, H, W): noisy ellipses around some objects, so that many pairs overlap."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    center = rng.uniform(0, (height, width), (objects, 2))
    size = rng.uniform(0.1, 0.4, (objects, 2)) * (height, width) + 0.5
    masks = np.zeros((count, height, width), bool)
    for n, k in enumerate(rng.integers(0, objects, count)):
        cy, cx = center[k] + rng.normal(0, 0.2, 2) * size[k]
        ry, rx = size[k] * rng.uniform(0.7, 1.3, 2)
        masks[n] = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1
    return masks
