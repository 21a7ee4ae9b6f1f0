"""Regions to be embedded, and the views of them that long-tail discovery compares (Weng et al.,
"Unsupervised Discovery of the Long-Tail in Instance Segmentation Using Hierarchical
Self-Supervision", CVPR 2021).

A region is a box and a mask. It is looked at in a window around the box; the views are the whole
window ("full"), the mask ("fg") and what is around it ("bg").

Legend: B images, N regions (of an image, or of the batch), H W image, h w cells of a mask, S cells
per side of a window, C channels, V views.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import ImageList
from torch import Tensor

VIEWS = ("fg", "full", "bg")
BOX_MODES = ("square", "tight")
POOLS = ("mean", "masked_mean")

# Numbers of the masks that are resampled at a time.
_CELLS_AT_ONCE = 1 << 25
# Boxes are at least this wide, in pixels, where something is divided by it.
_MIN_SIDE = 1e-3


@dataclass(frozen=True, eq=False)
class Regions:
    """The regions of a batch, all on one device.

    Attributes:
        features: by name (B, C, *, *), what the detector has made of the images.
        boxes: of each image (N, 4) XYXY in pixels of the detector's input.
        masks: of each image (N, h, w), floating from 0 to 1, or bool.
        image_sizes: of each image (H, W) in pixels of the detector's input.
        whole_images: h x w cells cover the image, not the box.
        images: the detector's input, normalised, or None.
    """

    features: Mapping[str, Tensor]
    boxes: Sequence[Tensor]
    masks: Sequence[Tensor]
    image_sizes: Sequence[tuple[int, int]]
    whole_images: bool = False
    images: ImageList | None = None

    @property
    def counts(self) -> list[int]:
        """Regions of each image."""
        return [len(boxes) for boxes in self.boxes]

    def frames(self, index: int) -> Tensor:
        """What the masks of an image cover, (N, 4) XYXY in pixels."""
        boxes = self.boxes[index]
        if not self.whole_images:
            return boxes
        height, width = self.image_sizes[index]
        return boxes.new_tensor([0.0, 0.0, width, height]).expand_as(boxes)


def windows_around(boxes: Tensor, mode: str) -> Tensor:
    """The windows (N, 4) of boxes (N, 4), XYXY: the boxes, or squares with their centres and longer
    sides, which may leave the image."""
    if mode == "tight":
        return boxes
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True).clamp(min=_MIN_SIDE) / 2
    return torch.cat([centers - half, centers + half], dim=1)


def resample_masks(masks: Tensor, frames: Tensor, windows: Tensor, size: int) -> Tensor:
    """The share of each cell of a window that a mask covers.

    A mask is taken to be constant in each of its cells; outside of its frame it is 0. At half the
    resolution this is what bilinear interpolation gives, and it does not skip what is smaller
    than a cell, as that would in a square window around a narrow box.

    Args:
        masks: (N, h, w), floating or bool.
        frames: floating (N, 4) XYXY, what the masks cover.
        windows: floating (N, 4) XYXY.
        size: S.

    Returns:
        float32 (N, S, S).
    """
    height, width = masks.shape[-2:]
    frames, windows = frames.float(), windows.float()
    rows = _overlaps(frames[:, 1::2], windows[:, 1::2], height, size)
    columns = _overlaps(frames[:, 0::2], windows[:, 0::2], width, size).transpose(1, 2)
    chunk = max(1, _CELLS_AT_ONCE // max(height * width, 1))
    resampled = [
        rows[start : start + chunk]
        @ masks[start : start + chunk].float()
        @ columns[start : start + chunk]
        for start in range(0, len(masks), chunk)
    ]
    if not resampled:
        return frames.new_zeros(0, size, size)
    return torch.cat(resampled).clamp(0.0, 1.0)  # rounding


def _overlaps(frames: Tensor, windows: Tensor, cells: int, size: int) -> Tensor:
    """Along one axis, the share (N, S, cells) of each window's cell that lies in each mask's cell;
    frames and windows (N, 2), from and to."""
    places = torch.arange(size + 1, device=frames.device, dtype=torch.float32) / size
    side = (windows[:, 1:] - windows[:, :1]).clamp(min=_MIN_SIDE)
    edges = windows[:, :1] + side * places
    # In cells of the mask.
    side = (frames[:, 1:] - frames[:, :1]).clamp(min=_MIN_SIDE)
    edges = ((edges - frames[:, :1]) * (cells / side))[..., None]
    low, high = edges[:, :-1], edges[:, 1:]
    cell = torch.arange(cells, device=frames.device, dtype=torch.float32)
    shared = torch.minimum(high, cell + 1) - torch.maximum(low, cell)
    return shared.clamp(min=0.0) / (high - low)


def view_weights(masks: Tensor, views: Sequence[str]) -> Tensor:
    """What each view shows of cells that masks (N, S, S) cover so far: (V N, S, S), the views one
    after the other."""
    shown = {"fg": masks, "full": torch.ones_like(masks), "bg": 1.0 - masks}
    return torch.cat([shown[view] for view in views])


def pool_cells(cells: Tensor, weights: Tensor, mode: str) -> Tensor:
    """Means over the cells of (N, C, S, S), float (N, C).

    Args:
        cells: as above.
        weights: (N, S, S), not negative: what a view shows of each cell.
        mode: "mean", over all cells, shown or not: small masks give small numbers, as in the paper,
            where what is masked is black; or "masked_mean", weighted. Of nothing that is 0.
    """
    if mode == "mean":
        return cells.mean(dim=(2, 3))
    total = weights.sum(dim=(1, 2)).clamp(min=1e-6)
    return torch.einsum("nchw,nhw->nc", cells, weights) / total[:, None]
