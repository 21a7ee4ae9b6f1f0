"""Labels on a patch grid, and instance maps of images reduced to such a grid.

A model that labels patches covers whole patches of the image only, from its top left corner; what
is left over at the right and the bottom (less than a patch) has no label. ``extent`` says which
part of the image the grid covers, as fractions, so that it does not matter whether the image was
resized before.

Legend: H W the image's size, h w the grid's.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

GRID_MODES = ("center", "corner", "majority")

# Extents are quotients of pixels: multiplied by a size again they may miss an integer by rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class GridLabels:
    """Instances on a patch grid.

    Attributes:
        labels: (h, w) int64, 0 for the background, 1, 2, ... for the instances.
        extent: fractions of the image's height and width that the grid covers, from the top left.

    Raises:
        ValueError: the labels are not an integer matrix, or the extent is not in (0, 1].
    """

    labels: Tensor
    extent: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        labels = self.labels
        if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.dtype != torch.int64:
            found = (
                f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else labels
            )
            raise ValueError(f"labels must be an int64 tensor (h, w), got {found!r}")
        _check_extent(self.extent)


def sample_on_grid(
    index_map: Any,
    grid_size: tuple[int, int],
    extent: tuple[float, float] = (1.0, 1.0),
    mode: str = "center",
) -> np.ndarray:
    """An image's instance map reduced to a patch grid.

    The flavour matters: the corner of a patch is half a patch away from what the patch shows. A
    perfect label per patch scores clearly lower against "corner" than against the two others.

    Args:
        index_map: (H, W) integers >= 0, an array or a tensor on the CPU; 0 is the background.
        grid_size: h and w.
        extent: fractions of H and W that the grid covers, from the top left.
        mode: "center": the pixel at each cell's centre (the one to its lower right where the centre
            lies between pixels). "corner": its top left pixel, what OpenCV's and torch's "nearest"
            take of the part that is covered (where their rounding does not take its neighbour).
            "majority": the most frequent value among the pixels whose centres lie in the cell, the
            smallest of several; a cell smaller than a pixel may hold none and takes the pixel at
            its centre.

    Returns:
        (h, w) int32.

    Raises:
        ValueError: an unknown mode, an empty map or grid, values below 0, or an extent that is not
            in (0, 1].
    """
    if mode not in GRID_MODES:
        raise ValueError(f"mode must be one of {GRID_MODES}, got {mode!r}")
    index_map = np.asarray(index_map)
    if index_map.ndim != 2 or not index_map.size or index_map.dtype.kind not in "iu":
        raise ValueError(
            f"index_map must be integers (H, W), got {index_map.dtype} {index_map.shape}"
        )
    if index_map.min() < 0:
        raise ValueError(f"index_map must not hold values below 0, got {index_map.min()}")
    if len(grid_size) != 2 or min(grid_size) < 1:
        raise ValueError(f"grid_size must be two sizes of 1 or more, got {grid_size}")
    _check_extent(extent)
    offset = 0.0 if mode == "corner" else 0.5
    rows, columns = (
        _pixels_at(offset, cells, size, covered)
        for cells, size, covered in zip(grid_size, index_map.shape, extent)
    )
    sampled = index_map[rows[:, None], columns[None, :]].astype(np.int32)
    return _majority(index_map, sampled, extent) if mode == "majority" else sampled


def _check_extent(extent: tuple[float, float]) -> None:
    if len(extent) != 2 or not all(0 < covered <= 1 + _ROUNDING for covered in extent):
        raise ValueError(f"extent must be two fractions in (0, 1], got {extent}")


def _pixels_at(offset: float, cells: int, size: int, covered: float) -> np.ndarray:
    """Pixels in which the points `offset` (of a cell's length) behind the cells' starts lie."""
    points = (np.arange(cells) + offset) * (covered * size / cells)
    return np.minimum(np.floor(points + _ROUNDING).astype(np.int64), size - 1)


def _cells_of(cells: int, size: int, covered: float) -> np.ndarray:
    """The cell that holds each pixel's centre, (size,); `cells` for pixels that are not covered."""
    found = np.floor((np.arange(size) + 0.5) * (cells / (covered * size)) + _ROUNDING)
    return np.minimum(found.astype(np.int64), cells)


def _majority(
    index_map: np.ndarray, default: np.ndarray, extent: tuple[float, float]
) -> np.ndarray:
    """The most frequent value of each cell; `default`'s (h, w) where a cell holds no pixel."""
    rows, columns = (
        _cells_of(cells, size, covered)
        for cells, size, covered in zip(default.shape, index_map.shape, extent)
    )
    rows, columns = rows[rows < default.shape[0]], columns[columns < default.shape[1]]
    covered_map = index_map[: len(rows), : len(columns)]
    if not covered_map.size:
        return default
    values, ranks = _ranks(covered_map.ravel().astype(np.int64))
    cells = rows[:, None] * default.shape[1] + columns[None, :]
    counts = np.bincount(
        cells.ravel() * len(values) + ranks, minlength=default.size * len(values)
    ).reshape(-1, len(values))
    winners = values[counts.argmax(1)].reshape(default.shape)
    return np.where(counts.any(1).reshape(default.shape), winners, default).astype(np.int32)


def _ranks(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values of integers >= 0, rising, and each one's place among them."""
    if flat.max() >= flat.size:  # a large and sparse range must not be counted through
        return np.unique(flat, return_inverse=True)
    values = np.flatnonzero(np.bincount(flat))
    places = np.zeros(values[-1] + 1, np.int64)
    places[values] = np.arange(len(values))
    return values, places[flat]
