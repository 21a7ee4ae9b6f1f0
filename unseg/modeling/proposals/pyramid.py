"""Windows of several resized copies of an image, in one list.

Legend: S scales (or levels), n windows of a scale, K of all that are kept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TopWindows(NamedTuple):
    """The best windows of all scales, by falling logit; equal ones in the order of the scales.

    Attributes:
        logits: float32 (K,).
        boxes: float32 (K, 4), XYXY.
        scales: int64 (K,), which scale a window is of.
        places: int64 (K,), its index in the list of that scale.
    """

    logits: Tensor
    boxes: Tensor
    scales: Tensor
    places: Tensor


def grid_windows(
    size: tuple[int, int],
    stride: float,
    offset: float,
    side: float,
    device: torch.device | str | None = None,
) -> Tensor:
    """Square windows centred on the cells of a map, in pixels of the image that the map is of.

    Args:
        size: rows and columns of the map.
        stride: pixels from cell to cell.
        offset: where the first cell's centre lies, along both axes.
        side: of the windows, in pixels.
        device: of the result.

    Returns:
        float32 (rows * columns, 4) XYXY, row by row; they may leave the image.
    """
    y, x = (offset + stride * torch.arange(n, dtype=torch.float64, device=device) for n in size)
    y, x = (axis.reshape(-1) for axis in torch.meshgrid(y, x, indexing="ij"))
    half = side / 2
    return torch.stack([x - half, y - half, x + half, y + half], dim=1).float()


def to_output(boxes: Tensor, resized: tuple[int, int], output: tuple[int, int]) -> Tensor:
    """Boxes of a resized image in the output image's pixels.

    Sizes are whole pixels, so that both axes have their own factor.

    Args:
        boxes: (N, 4) XYXY.
        resized, output: (H, W) of both images.
    """
    y, x = (to / of for to, of in zip(output, resized, strict=True))
    return boxes * boxes.new_tensor([x, y, x, y])


def top_windows(logits: Sequence[Tensor], boxes: Sequence[Tensor], limit: int) -> TopWindows:
    """The `limit` windows of the highest logits among all scales.

    Ranked in float32, where half precision or probabilities would make many equal.

    Args:
        logits: S tensors (n,), or of any shape: they are flattened row by row.
        boxes: S tensors (n, 4) in common coordinates.
        limit: keep at most so many, at least 1.

    Raises:
        ValueError: no scale, numbers that differ, or NaN logits (the message names the scale).
    """
    if not logits or len(logits) != len(boxes):
        raise ValueError(f"as many logits as boxes are needed, not {len(logits)} and {len(boxes)}")
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    flat = [x.detach().reshape(-1).float() for x in logits]
    for scale, (own, windows) in enumerate(zip(flat, boxes, strict=True)):
        if windows.shape != (len(own), 4):
            raise ValueError(
                f"scale {scale}: boxes must be ({len(own)}, 4), not {tuple(windows.shape)}"
            )
        if own.isnan().any():
            raise ValueError(f"scale {scale}: {int(own.isnan().sum())} logits are NaN")
    device = flat[0].device
    counts = torch.tensor([len(own) for own in flat], device=device)
    scales = torch.arange(len(flat), device=device).repeat_interleave(counts)
    places = torch.cat([torch.arange(len(own), device=device) for own in flat])
    every = torch.cat(flat)
    best = torch.sort(every, descending=True, stable=True).indices[:limit]
    return TopWindows(every[best], torch.cat(list(boxes))[best].float(), scales[best], places[best])
