"""Squares cut out of an image and of its masks, resized to one size; both cover the same pixels.

Legend: H W image, S side of the result. Coordinates: pixel p covers [p, p + 1), boxes are XYXY.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

from unseg.layers import resize_image, run_lengths
from unseg.structures import RLE

# Half of the range of 8-bit pixels: what DeepMask sees outside of an image.
GREY = 127.5


@dataclass(frozen=True)
class Square:
    """A square of whole image pixels, anywhere.

    Attributes:
        left, top: its first column and row; may be negative or beyond the image.
        side: in pixels, at least 1.
    """

    left: int
    top: int
    side: int

    @classmethod
    def around(cls, center_x: float, center_y: float, side: float) -> "Square":
        """The square of whole pixels next to a centre and a side, halves rounded up.

        Its side is off by half a pixel at most, or is 1, and its centre by half a pixel.
        """
        whole = max(1, math.floor(side + 0.5))
        left, top = (math.floor(c - whole / 2 + 0.5) for c in (center_x, center_y))
        return cls(left, top, whole)

    @property
    def center(self) -> tuple[float, float]:
        """x and y."""
        return self.left + self.side / 2, self.top + self.side / 2

    def concentric_box(self, ratio: float) -> tuple[float, float, float, float]:
        """XYXY of the square with the same centre and `ratio` times the side, not rounded."""
        (x, y), half = self.center, self.side * ratio / 2
        return x - half, y - half, x + half, y + half


def crop_square(image: Tensor, square: Square, size: int) -> Tensor:
    """Cut a square out of an image, then resize it as :func:`unseg.layers.resize_image` does.

    Args:
        image: (C, H, W) of any real dtype.
        square: where; its part outside of the image is :data:`GREY`.
        size: S, at least 1.

    Returns:
        float32 (C, S, S), in memory of its own.
    """
    height, width = image.shape[1:]
    crop = torch.full((len(image), square.side, square.side), GREY)
    x0, x1 = (min(max(x, 0), width) for x in (square.left, square.left + square.side))
    y0, y1 = (min(max(y, 0), height) for y in (square.top, square.top + square.side))
    if x0 < x1 and y0 < y1:
        part = image[:, y0:y1, x0:x1]
        crop[:, y0 - square.top : y1 - square.top, x0 - square.left : x1 - square.left] = part
    return resize_image(crop, (size, size))


def crop_mask(rle: RLE, box: tuple[float, float, float, float], size: int) -> Tensor:
    """Resize the part of a mask in a box: the pixels more than half of which it covers.

    As ``BitMasks.crop_and_resize`` (the mean of bilinear samples, as many per pixel of the result
    as it covers mask pixels), with three differences. What is outside of the image is not in the
    mask: ROIAlign repeats the border for one pixel. Exactly one half does not count. Only the
    columns in the box are decoded.

    Args:
        rle: a well-formed compressed run-length encoding of an image H x W.
        box: XYXY with fractions, may leave the image.
        size: S, at least 1.

    Returns:
        bool (S, S).
    """
    height, width = rle["size"]
    # One more pixel than the box touches: bilinear samples reach so far.
    x0, y0 = (max(math.floor(c) - 1, 0) for c in box[:2])
    x1, y1 = min(math.ceil(box[2]) + 1, width), min(math.ceil(box[3]) + 1, height)
    if x0 >= x1 or y0 >= y1:
        return torch.zeros((size, size), dtype=torch.bool)
    # A ring of zeros, so that no sample repeats the border.
    window = np.zeros((y1 - y0 + 2, x1 - x0 + 2), np.float32)
    window[1:-1, 1:-1] = _decode_columns(rle, x0, x1)[y0:y1]
    corners = [box[0] - x0 + 1, box[1] - y0 + 1, box[2] - x0 + 1, box[3] - y0 + 1]
    rois = torch.tensor([[0.0, *corners]], dtype=torch.float32)
    covered = roi_align(torch.from_numpy(window)[None, None], rois, (size, size), aligned=True)
    return covered[0, 0] > 0.5


def mask_at(rle: RLE, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Whether pixels are in a mask, without decoding it.

    Args:
        rle: a well-formed compressed run-length encoding.
        columns, rows: int64 (P,), inside of the image.

    Returns:
        bool (P,).
    """
    ends = np.cumsum(_runs(rle))
    return np.searchsorted(ends, columns * rle["size"][0] + rows, side="right") % 2 == 1


def _runs(rle: RLE) -> np.ndarray:
    """Lengths of the runs of zeros and ones in turn, column by column: int64 (R,)."""
    text = np.frombuffer(run_lengths.to_bytes(rle["counts"]), np.uint8)
    return run_lengths.parse(text, np.array([0, len(text)]))[0]


def _decode_columns(rle: RLE, begin: int, end: int) -> np.ndarray:
    """Columns `begin` to `end` - 1 of a mask: bool (H, end - begin)."""
    height = rle["size"][0]
    ends = np.cumsum(_runs(rle)).clip(begin * height, end * height) - begin * height
    values = np.arange(len(ends)) % 2 == 1
    return np.repeat(values, np.diff(ends, prepend=0)).reshape(end - begin, height).T
