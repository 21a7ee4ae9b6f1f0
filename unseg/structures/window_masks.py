"""Masks of windows, kept at the resolution that the network gave them, pasted when they are needed.

A thousand masks of a 640 x 480 image are 307 MB as bool, 6 MB as 56 x 56 half-precision windows.

Legend: N masks, m cells per side of a window, H W the image's pixels, h w those of a window's part
inside it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from detectron2.structures import Boxes
from torch import Tensor

from unseg.layers import PackedMasks, pack_masks
from unseg.structures.pasting import (
    MASKS_AT_ONCE,
    Pasted,
    bounds,
    bounds_of_parts,
    encode_part,
    paste_batch,
    paste_parts,
)
from unseg.structures.pseudo_mask import RLE, encode_masks

# Pixels of the masks that are pasted at a time.
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
        count = max(1, min(MASKS_AT_ONCE, _PIXELS_AT_ONCE // (height * width)))
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
        encodings: list[RLE] = [{}] * len(self)
        for part in self._parts():
            for n, x, y, mask in zip(*part, strict=True):
                encodings[n] = encode_part(int(x), int(y), mask, self.image_size)
        return encodings

    def tight_boxes(self) -> Boxes:
        """Boxes of the pasted masks' pixels, float32 (N, 4) XYXY; zeros where a mask is empty."""
        if not len(self):
            return Boxes(self.boxes.new_zeros(0, 4))
        if self.device.type != "cpu":
            return Boxes(torch.cat([bounds(chunk) for chunk in self.chunks()]))
        boxes = np.zeros((len(self), 4), dtype=np.float32)
        for part in self._parts():
            boxes[part.index] = bounds_of_parts(part)
        return Boxes(torch.from_numpy(boxes))

    get_bounding_boxes = tight_boxes  # BitMasks' name

    def _parts(self) -> Iterator[Pasted]:
        """On the CPU, the parts of the image around the masks' probable cells, in any order."""
        settings = (self.image_size, self.threshold, self.align_corners)
        return paste_parts(self.probabilities, self.boxes, *settings)

    def _paste(self) -> Tensor:
        """bool (N, H, W) on the masks' device."""
        if self.device.type != "cpu":
            settings = (self.image_size, self.threshold, self.align_corners)
            return paste_batch(self.probabilities, self.boxes, *settings)
        masks = np.zeros(self.shape, dtype=bool)
        for part in self._parts():
            for n, x, y, mask in zip(*part, strict=True):
                target = masks[n, y : y + mask.shape[0], x : x + mask.shape[1]]
                target[:] = mask[: target.shape[0], : target.shape[1]]
        return torch.from_numpy(masks)


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
