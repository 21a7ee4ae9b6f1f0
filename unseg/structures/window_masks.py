"""Masks of windows, kept at the resolution that the network gave them, pasted when they are needed.

A thousand masks of a 640 x 480 image are 307 MB as bool, 6 MB as 56 x 56 half-precision windows.

Legend: N masks, m cells per side of a window, H W the image's pixels, h w those of a window's part
inside it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes
from pycocotools import mask as mask_util
from torch import Tensor

from unseg.layers import PackedMasks, pack_masks
from unseg.structures.pseudo_mask import RLE, encode_masks

# How many masks are pasted at a time, and how many pixels they may have together.
_MASKS_AT_ONCE = 64
_PIXELS_AT_ONCE = 1 << 25


class WindowMasks:
    """N masks given by probabilities in windows; a field of Detectron2's Instances like BitMasks.

    A pixel is in a mask iff the probability at its centre, interpolated bilinearly, is at least
    `threshold`. Two ways to place the cells:

    * ``align_corners=False``: m x m cells of equal size tile the window and a probability is that
      of its cell's centre; beyond the outermost cells is 0. These are the masks of Detectron2's
      ``paste_masks_in_image`` on the CPU, which may reach half a cell, but hardly more than a
      pixel, beyond the window. They are the same on a GPU.
    * ``align_corners=True``: the window is resized as by ``F.interpolate(align_corners=True)`` and
      its pixels are copied: centres of the first and the last pixel are centres of the first and
      the last cell, and no pixel outside the window is set. So do the released DeepMask models. A
      window between pixels is treated alike, with its first centre half a pixel inside it.

    Pasting is done in chunks of at most 64 masks, except by ``.tensor`` and ``numpy.asarray``.
    """

    def __init__(
        self,
        probabilities: Tensor,
        boxes: Tensor | Boxes,
        image_size: tuple[int, int],
        threshold: float = 0.5,
        align_corners: bool = False,
    ) -> None:
        """
        Args:
            probabilities: floating (N, m, m), from 0 to 1; kept in its dtype, used in float32.
            boxes: floating (N, 4), the windows, XYXY in pixels of the image, which they may leave.
            image_size: (H, W) of the image that masks are pasted into.
            threshold: lowest probability of a mask's pixels, in (0, 1].
            align_corners: see above.

        Raises:
            ValueError: a wrong shape or dtype, probabilities outside 0..1 or NaN, windows that are
                not finite or have no extent, or a size or threshold that makes no sense.
            RuntimeError: probabilities and boxes are on different devices.
        """
        boxes = boxes.tensor if isinstance(boxes, Boxes) else boxes
        _check(probabilities, boxes)
        height, width = (int(side) for side in image_size)
        if height < 1 or width < 1:
            raise ValueError(f"image_size must be positive (H, W), not {tuple(image_size)}")
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], not {threshold}")
        self.probabilities = probabilities.detach()
        self.boxes = boxes.detach().float()
        self.image_size = (height, width)
        self.threshold = float(threshold)
        self.align_corners = bool(align_corners)

    def __len__(self) -> int:
        return self.probabilities.shape[0]

    def __repr__(self) -> str:
        cells, (height, width) = self.probabilities.shape[-1], self.image_size
        return f"WindowMasks({len(self)} of {cells} x {cells} cells in {height} x {width} pixels)"

    @property
    def device(self) -> torch.device:
        return self.probabilities.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(N, H, W)``, as of the pasted masks."""
        return (len(self), *self.image_size)

    def _with(self, probabilities: Tensor, boxes: Tensor) -> "WindowMasks":
        """Other windows, checked before, with the same settings."""
        new = object.__new__(WindowMasks)
        new.__dict__.update(self.__dict__, probabilities=probabilities, boxes=boxes)
        return new

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> "WindowMasks":
        """Some of the masks: a slice, a bool ``(N,)`` or integer tensor; an int gives one mask.

        Raises:
            IndexError: an index that there is not, or a bool tensor of another length.
        """
        if isinstance(index, int | np.integer):
            if not -len(self) <= index < len(self):
                raise IndexError(f"index {index} is out of range for {len(self)} masks")
            index = slice(int(index) % len(self), int(index) % len(self) + 1)
        return self._with(self.probabilities[index], self.boxes[index])

    def to(self, device: torch.device | str) -> "WindowMasks":
        return self._with(self.probabilities.to(device), self.boxes.to(device))

    @staticmethod
    def cat(parts: Sequence["WindowMasks"]) -> "WindowMasks":
        """All masks of `parts`.

        Raises:
            ValueError: no parts, or of different images, thresholds or forms of pasting.
        """
        if not parts:
            raise ValueError("parts must hold at least one WindowMasks")
        settings = [
            (p.image_size, p.threshold, p.align_corners, p.probabilities.shape[1:]) for p in parts
        ]
        if any(other != settings[0] for other in settings):
            raise ValueError(
                "parts must share image size, threshold, align_corners and resolution, not "
                f"{sorted(set(map(str, settings)))}"
            )
        probabilities = torch.cat([p.probabilities for p in parts])
        return parts[0]._with(probabilities, torch.cat([p.boxes for p in parts]))

    def chunks(self) -> Iterator[Tensor]:
        """Pasted masks in order, bool (n, H, W) with n at most 64."""
        height, width = self.image_size
        count = max(1, min(_MASKS_AT_ONCE, _PIXELS_AT_ONCE // (height * width)))
        for start in range(0, len(self), count):
            yield self[start : start + count]._paste()

    def __iter__(self) -> Iterator[Tensor]:
        """Pasted masks one by one, bool (H, W)."""
        for chunk in self.chunks():
            yield from chunk

    @property
    def tensor(self) -> Tensor:
        """All masks pasted at once, bool (N, H, W): N x H x W bytes."""
        masks = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        start = 0
        for chunk in self.chunks():
            masks[start : start + len(chunk)] = chunk
            start += len(chunk)
        return masks

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """``.tensor`` as numpy array, for Detectron2's Visualizer."""
        if copy is False:
            raise ValueError("WindowMasks are pasted: there is no array of them without a copy")
        array = self.tensor.cpu().numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def pack(self) -> PackedMasks:
        """The pasted masks as bits, in rows (order "C")."""
        packed = [pack_masks(chunk) for chunk in self.chunks()]
        if not packed:
            return pack_masks(torch.zeros(self.shape, dtype=torch.bool, device=self.device))
        return PackedMasks.cat(packed)

    def to_rle(self) -> list[RLE]:
        """Compressed COCO run-length encodings of the pasted masks."""
        if self.device.type != "cpu":
            return [rle for chunk in self.chunks() for rle in encode_masks(chunk)]
        return [_encode(patch, self.image_size) for patch in self._patches()]

    def tight_boxes(self) -> Boxes:
        """Boxes of the pasted masks' pixels, float32 (N, 4) XYXY; zeros where a mask is empty."""
        if not len(self):
            return Boxes(self.boxes.new_zeros(0, 4))
        if self.device.type != "cpu":
            return Boxes(torch.cat([_bounds(chunk) for chunk in self.chunks()]))
        return Boxes(torch.tensor([_bounds_of(patch) for patch in self._patches()]))

    get_bounding_boxes = tight_boxes  # BitMasks' name

    def _patches(self) -> Iterator["_Patch"]:
        """On the CPU, each mask's part around its probable cells."""
        settings = (self.image_size, self.threshold, self.align_corners)
        return _paste_patches(self.probabilities, self.boxes, *settings)

    def _paste(self) -> Tensor:
        """bool (N, H, W) on the masks' device."""
        if self.device.type != "cpu":
            settings = (self.image_size, self.threshold, self.align_corners)
            return _paste_batch(self.probabilities, self.boxes, *settings)
        masks = np.zeros(self.shape, dtype=bool)
        for mask, (x, y, patch) in zip(masks, self._patches(), strict=True):
            mask[y : y + patch.shape[0], x : x + patch.shape[1]] = patch
        return torch.from_numpy(masks)


class _Patch(NamedTuple):
    """Part of an image outside which a mask is empty: its first column and row, bool (h, w)."""

    x: int
    y: int
    mask: np.ndarray


def _check(probabilities: Tensor, boxes: Tensor) -> None:
    if not probabilities.is_floating_point() or probabilities.ndim != 3:
        raise ValueError(
            "probabilities must be floating (N, m, m), not "
            f"{probabilities.dtype} {tuple(probabilities.shape)}"
        )
    count, rows, columns = probabilities.shape
    if rows != columns or rows < 1:
        raise ValueError(f"probabilities must be square, not {rows} x {columns}")
    if not boxes.is_floating_point() or boxes.shape != (count, 4):
        raise ValueError(
            f"boxes must be floating ({count}, 4), not {boxes.dtype} {tuple(boxes.shape)}"
        )
    if boxes.device != probabilities.device:
        raise RuntimeError(
            f"probabilities are on {probabilities.device}, boxes are on {boxes.device}"
        )
    if not count:
        return
    low, high = (float(x) for x in probabilities.detach().aminmax())
    if not 0 <= low <= high <= 1:  # false for NaN
        raise ValueError(f"probabilities must be from 0 to 1, not from {low} to {high}")
    if not torch.isfinite(boxes).all():
        raise ValueError("boxes are NaN/inf")
    if not (boxes[:, 2:] > boxes[:, :2]).all():
        flat = int((boxes[:, 2:] <= boxes[:, :2]).any(dim=1).nonzero()[0])
        raise ValueError(f"boxes[{flat}] has no extent: {boxes[flat].tolist()}")


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


def _paste_patches(
    probabilities: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    threshold: float,
    align_corners: bool,
) -> Iterator[_Patch]:
    """The masks one by one, on the CPU, interpolated along one axis after the other.

    An interpolated value is no higher than the cells around it, so that only pixels around cells of
    at least the threshold are looked at.
    """
    cells = probabilities.shape[1]
    soft = probabilities.float().numpy()
    limit = np.float32(threshold)
    probable = soft >= limit
    by_axis = (probable.any(axis=1), probable.any(axis=2))  # columns, rows
    limits = _limits(boxes, size, align_corners).tolist()
    scale, shift = (x.tolist() for x in _mapping(boxes, cells, align_corners))
    lowest, highest = (0, cells - 1) if align_corners else (-1, cells)
    for n in range(len(soft)):
        starts, places = [], []
        for axis in (0, 1):
            start, stop = limits[n][axis], limits[n][axis + 2]
            place = np.arange(start, stop) * scale[n][axis] + shift[n][axis]
            place = place.clip(lowest, highest)
            occupied = by_axis[axis][n].nonzero()[0]
            first, last = (occupied[0], occupied[-1]) if len(occupied) else (cells, -1)
            begin = int(place.searchsorted(first - 1, side="right"))
            end = int(place.searchsorted(last + 1, side="left"))
            starts.append(start + begin)
            places.append(place[begin:end])
        x, y = places
        values = _interpolate_rows(_interpolate_rows(soft[n].T, x).T, y)
        yield _Patch(*starts, values >= limit)


def _interpolate_rows(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """float32 (k, n) at `places` (p,), in rows, those outside being zeros: (p, n)."""
    rows = np.zeros((len(values) + 2, values.shape[1]), dtype=np.float32)
    rows[1:-1] = values
    index = np.minimum((places + 1).astype(np.intp), len(values))
    result = np.diff(rows, axis=0)[index]
    result *= (places + 1 - index).astype(np.float32)[:, None]
    result += rows[index]
    return result


def _bounds_of(patch: _Patch) -> list[float]:
    """Tight box of a mask; zeros if it is empty."""
    columns, rows = (patch.mask.any(axis=axis).nonzero()[0] for axis in (0, 1))
    if not len(rows):
        return [0.0] * 4
    x, y = patch.x, patch.y
    return [float(v) for v in (x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1)]


def _encode(patch: _Patch, size: tuple[int, int]) -> RLE:
    """The runs are found in the patch alone; pycocotools would go through the image."""
    height, width = size
    columns = np.zeros((patch.mask.shape[1], patch.mask.shape[0] + 2), dtype=bool)
    columns[:, 1:-1] = patch.mask.T
    x, y = (columns[:, 1:] != columns[:, :-1]).nonzero()
    edges = (patch.x + x) * height + patch.y + y  # where runs of ones begin and end, in turns
    # A run that reaches the image's bottom goes on where the next column begins with one.
    touching = (edges[1:-1:2] == edges[2::2]).repeat(2)
    edges = edges[np.concatenate([[True], ~touching, [True]])] if len(edges) else edges
    ends = np.concatenate([[0], edges, [height * width]])
    runs = np.diff(ends).tolist()
    if len(edges) and not runs[-1]:
        runs.pop()
    return mask_util.frPyObjects({"size": [height, width], "counts": runs}, height, width)


def _paste_batch(
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


def _bounds(masks: Tensor) -> Tensor:
    """Tight boxes of bool (N, H, W), float32 (N, 4); zeros where a mask is empty."""
    ends = []
    for dim in (1, 2):  # over rows: columns remain
        occupied = masks.any(dim=dim)
        first = occupied.byte().argmax(dim=1)  # the first of equal ones
        last = occupied.shape[1] - occupied.flip(1).byte().argmax(dim=1)
        ends.append((first, last * occupied.any(dim=1)))
    (x0, x1), (y0, y1) = ends
    return torch.stack([x0, y0, x1, y1], dim=1).float()
