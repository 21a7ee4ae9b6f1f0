"""Masks as bits: 64 pixels a word, with area and box, so that overlaps are AND and popcount.

Dimensions: N masks, H W image, W64 words a mask (ceil(H * W / 64), rounded up to a multiple of 8).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from unseg.layers import mask_ops_reference as reference
from unseg.layers import run_lengths
from unseg.layers.native import META_FIELDS, has_native, row_words

BYTE_DTYPES = (torch.bool, torch.uint8, torch.int8)
DENSE_DTYPES = (*BYTE_DTYPES, torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(eq=False)
class PackedMasks:
    """N masks of one size as bits. Made by :func:`pack_masks`; accepted wherever masks are.

    Attributes:
        bits: int64 ``(N, W64)``. Pixel p of the flattened mask is bit ``p & 63`` of word
            ``p >> 6``; bits past the last pixel are 0.
        meta: int32 ``(N, 8)``: area, x0, y0, x1, y1, first word, last word + 1, 0.
        size: ``(H, W)`` in pixels.
        order: ``"C"`` if rows were flattened one after the other (dense input), ``"F"`` for columns
            (COCO run lengths). Overlaps need one order on both sides.

    Raises:
        TypeError, ValueError, RuntimeError: types, shapes or devices that do not fit each other.
    """

    bits: Tensor
    meta: Tensor
    size: tuple[int, int]
    order: str = "C"

    def __post_init__(self) -> None:
        if self.bits.dtype != torch.int64 or self.meta.dtype != torch.int32:
            raise TypeError(
                "PackedMasks: bits must be int64 and meta int32, "
                f"not {self.bits.dtype} and {self.meta.dtype}"
            )
        expected = row_words(self.size[0] * self.size[1])
        if self.bits.dim() != 2 or self.bits.shape[1] != expected:
            raise ValueError(
                f"PackedMasks: bits of {self.size} masks must have shape (N, {expected}), "
                f"not {tuple(self.bits.shape)}"
            )
        if self.meta.shape != (self.bits.shape[0], META_FIELDS):
            raise ValueError(
                f"PackedMasks: meta must have shape ({self.bits.shape[0]}, {META_FIELDS}), "
                f"not {tuple(self.meta.shape)}"
            )
        if self.order not in ("C", "F"):
            raise ValueError(f"PackedMasks: order must be 'C' or 'F', not {self.order!r}")
        if self.bits.device != self.meta.device:
            raise RuntimeError(
                f"PackedMasks: bits are on {self.bits.device}, meta is on {self.meta.device}"
            )

    def __len__(self) -> int:
        return self.bits.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(N, H, W)``, as of the dense masks."""
        return (len(self), *self.size)

    @property
    def device(self) -> torch.device:
        return self.bits.device

    @property
    def area(self) -> Tensor:
        """Set pixels, int32 ``(N,)``."""
        return self.meta[:, 0]

    @property
    def box(self) -> Tensor:
        """Bounding boxes x0, y0, x1, y1 in pixels, half open, int32 ``(N, 4)``; 0 if empty."""
        return self.meta[:, 1:5]

    @property
    def span(self) -> Tensor:
        """First and last + 1 non-zero word, int32 ``(N, 2)``; 0 if empty."""
        return self.meta[:, 5:7]

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> "PackedMasks":
        """Some of the masks: a slice, a bool ``(N,)`` or integer tensor; an int gives one mask."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"index {index} is out of range for {len(self)} masks")
            index = slice(index % len(self), index % len(self) + 1)
        bits, meta = self.bits[index].contiguous(), self.meta[index].contiguous()
        return PackedMasks(bits, meta, self.size, self.order)

    def to(self, device: torch.device | str) -> "PackedMasks":
        return PackedMasks(self.bits.to(device), self.meta.to(device), self.size, self.order)

    def to_dense(self) -> Tensor:
        """The masks as bool ``(N, H, W)``."""
        height, width = self.size
        flat = reference.unpack(self.bits, height * width).view(torch.bool)
        if self.order == "C":
            return flat.view(len(self), height, width)
        return flat.view(len(self), width, height).transpose(1, 2)

    @staticmethod
    def cat(parts: Sequence["PackedMasks"]) -> "PackedMasks":
        """All masks of `parts`, which must share size and order."""
        if not parts:
            raise ValueError("parts must hold at least one PackedMasks")
        for part in parts[1:]:
            check_same_layout(parts[0], part, "parts")
        bits, meta = torch.cat([p.bits for p in parts]), torch.cat([p.meta for p in parts])
        return PackedMasks(bits, meta, parts[0].size, parts[0].order)


def check_same_layout(first: PackedMasks, second: PackedMasks, name: str) -> None:
    """Raise ValueError unless pixels of both sides lie at the same bits."""
    if first.size != second.size:
        raise ValueError(f"{name}: masks of {first.size} and of {second.size} pixels do not mix")
    if first.order != second.order:
        raise ValueError(
            f"{name}: masks packed in {first.order!r} and in {second.order!r} order do not mix; "
            "pack both from tensors or both from run lengths"
        )


def pack_masks(
    masks: Tensor | PackedMasks | Sequence[Mapping[str, Any]], threshold: float | None = None
) -> PackedMasks:
    """Pack masks into 64-bit words, with areas and boxes.

    Args:
        masks: one of

            * a tensor ``(N, H, W)``: bool, or uint8/int8 (non-zero is set), or float32, float16,
              bfloat16, float64 together with `threshold`. Any strides.
            * a list of COCO run lengths of one size: dicts of ``size`` (H, W) and ``counts``, a
              compressed string or bytes, or a list of runs. Decoded straight to bits, on the CPU.
            * :class:`PackedMasks`, returned as they are.
        threshold: a floating pixel x is set iff ``x > threshold``, so never where it is NaN.
            Compared in float32, as ``x.float() > threshold`` would (float64 in float64).

    Returns:
        The packed masks, on the device of the input.

    Raises:
        TypeError: masks of another type or dtype.
        ValueError: a wrong shape, a threshold missing or not applicable, malformed run lengths.
    """
    if isinstance(masks, PackedMasks):
        _reject_threshold(threshold, "PackedMasks")
        return masks
    if isinstance(masks, Tensor):
        return _pack_tensor(masks, threshold)
    if isinstance(masks, Sequence) and not isinstance(masks, str | bytes):
        _reject_threshold(threshold, "run lengths")
        return _pack_rle(masks)
    raise TypeError(
        "masks must be a tensor (N, H, W), PackedMasks or a list of COCO run lengths, "
        f"not {type(masks).__name__}"
    )


def check_number(value: float, name: str) -> float:
    """Raise unless `value` is a real number other than NaN; the value as float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    number = float(value)
    if number != number:
        raise ValueError(f"{name} must not be NaN")
    return number


def _reject_threshold(threshold: float | None, what: str) -> None:
    if threshold is not None:
        raise ValueError(f"threshold applies to floating masks, not to {what}")


def check_dense(masks: Tensor, threshold: float | None, name: str = "masks") -> float:
    """Raise unless `masks` can be packed with `threshold`; the threshold as a number."""
    if masks.dtype not in DENSE_DTYPES:
        raise TypeError(f"{name} must be bool, uint8, int8 or floating, not {masks.dtype}")
    if masks.dim() != 3:
        raise ValueError(f"{name} must have shape (N, H, W), not {tuple(masks.shape)}")
    if masks.shape[1] * masks.shape[2] > run_lengths.MAX_PIXELS:
        raise ValueError(f"{name} may have at most 2^31 - 1 pixels each")
    if masks.dtype in BYTE_DTYPES:
        _reject_threshold(threshold, f"{masks.dtype} {name}")
        return 0.0
    if threshold is None:
        raise ValueError(
            f"{name}: floating masks need a threshold: pack_masks({name}, threshold=0.5)"
        )
    return check_number(threshold, "threshold")


def _pack_tensor(masks: Tensor, threshold: float | None) -> PackedMasks:
    limit = check_dense(masks, threshold)
    if masks.requires_grad:
        masks = masks.detach()
    pack = torch.ops.unseg.pack_masks if has_native(masks.device.type) else reference.pack
    bits, meta = pack(masks, limit)
    return PackedMasks(bits, meta, (masks.shape[1], masks.shape[2]), "C")


def _pack_rle(masks: Sequence[Mapping[str, Any]]) -> PackedMasks:
    if not masks:
        empty = torch.zeros(0, 0, dtype=torch.int64)
        return PackedMasks(empty, torch.zeros(0, META_FIELDS, dtype=torch.int32), (0, 0), "F")
    data, offsets, size = run_lengths.join(masks)
    if has_native("cpu"):
        bits, meta = torch.ops.unseg.pack_rle(data, offsets, *size)
        return PackedMasks(bits, meta, size, "F")
    bits, meta = reference.pack(run_lengths.decode(data, offsets, size), 0.0)
    # The transposed image was packed: swap the axes of the boxes back.
    return PackedMasks(bits, meta[:, [0, 2, 1, 4, 3, 5, 6, 7]].contiguous(), size, "F")
