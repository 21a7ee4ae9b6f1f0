"""Pasting windows of probabilities into an image: on the CPU part by part, on a GPU in batches.

Legend: N masks, m cells per side of a window, H W the image's pixels, h w those of a part of it, n
masks of a batch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as mask_util
from torch import Tensor

from unseg.structures.pseudo_mask import RLE

# How many masks are pasted at a time, ...
MASKS_AT_ONCE = 64
# ... and on the CPU, where only parts of the image are looked at, how many pixels: what fits into
# its cache.
_PART_PIXELS_AT_ONCE = 1 << 18


class Pasted(NamedTuple):
    """Some of the masks, each as a part of the image outside which it is empty.

    Attributes:
        index: int (n,), which masks.
        x, y: int (n,), first columns and rows of the parts.
        masks: bool (n, h, w); columns and rows outside the image are empty.
    """

    index: np.ndarray
    x: np.ndarray
    y: np.ndarray
    masks: np.ndarray


def _limits(boxes: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """First and last + 1 pixels that masks may set, int64 (N, 4) XYXY; first <= last + 1.

    Detectron2 pastes a pixel beyond the window on each side, rounded outwards.
    """
    height, width = size
    if align_corners:
        limits = (boxes.double() - 0.5).ceil()
    else:
        one = boxes.new_ones(2)
        limits = torch.cat([boxes[:, :2].floor() - one, boxes[:, 2:].ceil() + one], dim=1)
    highest = limits.new_tensor([width, height, width, height])
    return torch.minimum(limits.clamp(min=0), highest).long()


def _mapping(boxes: Tensor, cells: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """From pixels to cells, for x and y: float64 (N, 2) each of `scale` and `shift`.

    The centre of pixel p lies ``p * scale + shift`` cells from the centre of the first cell.
    """
    first, sides = boxes[:, :2].double(), boxes[:, 2:].double() - boxes[:, :2].double()
    if not align_corners:
        scale = cells / sides
        return scale, (0.5 - first) * scale - 0.5
    # As interpolate: a window of one pixel shows the first cell.
    scale = torch.where(sides > 1, (cells - 1) / (sides - 1), 0.0)
    return scale, -first * scale


def _extents(
    probable: np.ndarray, boxes: Tensor, size: tuple[int, int], align_corners: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which pixels to look at, and where they are among the cells.

    An interpolated value is no higher than the cells around it: pixels around cells of at least the
    threshold are enough.

    Args:
        probable: bool (N, m, m), those cells.

    Returns:
        first pixel and last + 1, int (N, 2) for x and y, equal where there is none; scale and shift
        of :func:`_mapping`.
    """
    cells = probable.shape[1]
    limits = _limits(boxes, size, align_corners).numpy()
    scale, shift = (x.numpy() for x in _mapping(boxes, cells, align_corners))
    by_axis = np.stack([probable.any(axis=1), probable.any(axis=2)], axis=1)  # (N, 2, m)
    first = by_axis.argmax(axis=2)
    last = cells - 1 - by_axis[:, :, ::-1].argmax(axis=2)
    # Of windows of one pixel all pixels lie at the first cell.
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    # A pixel more on each side than is needed: rounding loses none.
    start = np.floor((first - 1 - shift) * inverse).astype(np.int64)
    stop = np.ceil((last + 1 - shift) * inverse).astype(np.int64) + 1
    start = np.where(scale > 0, np.maximum(start, limits[:, :2]), limits[:, :2])
    stop = np.where(scale > 0, np.minimum(stop, limits[:, 2:]), limits[:, 2:])
    stop = np.where(by_axis.any(axis=2), np.maximum(stop, start), start)
    return start, stop, scale, shift


def paste_parts(
    probabilities: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    threshold: float,
    align_corners: bool,
) -> Iterator[Pasted]:
    """All masks on the CPU, parts of like sizes together."""
    if not len(probabilities):
        return
    cells = probabilities.shape[1]
    soft = probabilities.float().numpy()
    limit = np.float32(threshold)
    start, stop, scale, shift = _extents(soft >= limit, boxes, size, align_corners)
    sides = stop - start
    order = np.lexsort((sides[:, 0], sides[:, 1]))
    lowest, highest = (0, cells - 1) if align_corners else (-1, cells)
    begin = 0
    while begin < len(order):
        # Those that follow are as high or higher, and may be wider.
        most = sides[order[begin : begin + MASKS_AT_ONCE]].max(axis=0)
        count = max(1, min(MASKS_AT_ONCE, _PART_PIXELS_AT_ONCE // max(1, int(most.prod()))))
        index = order[begin : begin + count]
        begin += count
        values = soft[index].transpose(0, 2, 1)
        for axis in (0, 1):
            pixels = start[index, axis, None] + np.arange(sides[index, axis].max())
            places = pixels * scale[index, axis, None] + shift[index, axis, None]
            # Beyond a part lies the zero before the first cell.
            places = np.where(pixels < stop[index, axis, None], places.clip(lowest, highest), -1)
            values = _interpolate_rows(values, places).transpose(0, 2, 1)
        masks = values.transpose(0, 2, 1) >= limit
        yield Pasted(index, *start[index].T, masks)


def _interpolate_rows(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """float32 (n, k, c) at `places` (n, p), in rows, those outside being zeros: (n, p, c)."""
    rows = np.zeros((len(values), values.shape[1] + 2, values.shape[2]), dtype=np.float32)
    rows[:, 1:-1] = values
    index = np.minimum((places + 1).astype(np.intp), values.shape[1])
    which = np.arange(len(values))[:, None]
    result = np.diff(rows, axis=1)[which, index]
    result *= (places + 1 - index).astype(np.float32)[:, :, None]
    result += rows[which, index]
    return result


def bounds_of_parts(part: Pasted) -> np.ndarray:
    """Tight boxes of masks, float32 (n, 4) XYXY; zeros where one is empty."""
    boxes = np.zeros((len(part.index), 4), dtype=np.float32)
    if not part.masks.size:
        return boxes
    for axis, start in enumerate((part.x, part.y)):
        hit = part.masks.any(axis=axis + 1)
        boxes[:, axis] = start + hit.argmax(axis=1)
        boxes[:, axis + 2] = start + hit.shape[1] - hit[:, ::-1].argmax(axis=1)
    boxes[~part.masks.any(axis=(1, 2))] = 0
    return boxes


def encode_part(left: int, top: int, mask: np.ndarray, size: tuple[int, int]) -> RLE:
    """The runs are found in a part (h, w) of the image; pycocotools would go through all of it."""
    height, width = size
    columns = np.zeros((mask.shape[1], mask.shape[0] + 2), dtype=bool)
    columns[:, 1:-1] = mask.T
    x, y = (columns[:, 1:] != columns[:, :-1]).nonzero()
    edges = (left + x) * height + top + y  # where runs of ones begin and end, in turns
    # A run that reaches the image's bottom goes on where the next column begins with one.
    touching = (edges[1:-1:2] == edges[2::2]).repeat(2)
    edges = edges[np.concatenate([[True], ~touching, [True]])] if len(edges) else edges
    ends = np.concatenate([[0], edges, [height * width]])
    runs = np.diff(ends).tolist()
    if len(edges) and not runs[-1]:
        runs.pop()
    return mask_util.frPyObjects({"size": [height, width], "counts": runs}, height, width)


def paste_batch(
    probabilities: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    threshold: float,
    align_corners: bool,
) -> Tensor:
    """All masks over the whole image at once, for GPUs: bool (N, H, W)."""
    cells = probabilities.shape[1]
    limits = _limits(boxes, size, align_corners)
    scale, shift = _mapping(boxes, cells, align_corners)
    axes, inside = [], []
    for axis, length in enumerate((size[1], size[0])):
        pixels = torch.arange(length, device=boxes.device)
        places = pixels * scale[:, axis, None] + shift[:, axis, None]
        places = places.clamp(0, cells - 1) if align_corners else places
        axes.append(((2 * places + 1) / cells - 1).float())  # what grid_sample takes
        inside.append((pixels >= limits[:, axis, None]) & (pixels < limits[:, axis + 2, None]))
    (x, y), (in_x, in_y) = axes, inside
    shape = (len(boxes), *size)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=3)
    soft = F.grid_sample(probabilities.float()[:, None], grid, align_corners=False)[:, 0]
    return (soft >= threshold) & in_x[:, None, :] & in_y[:, :, None]


def bounds(masks: Tensor) -> Tensor:
    """Tight boxes of bool (N, H, W), float32 (N, 4); zeros where a mask is empty."""
    ends = []
    for dim in (1, 2):  # over rows: columns remain
        occupied = masks.any(dim=dim)
        first = occupied.byte().argmax(dim=1)  # the first of equal ones
        last = occupied.shape[1] - occupied.flip(1).byte().argmax(dim=1)
        ends.append((first, last * occupied.any(dim=1)))
    (x0, x1), (y0, y1) = ends
    return torch.stack([x0, y0, x1, y1], dim=1).float()
