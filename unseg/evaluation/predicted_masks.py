"""Predicted masks in whatever form a model gives them, as run lengths or as bits.

The forms are (N, H, W) tensors or arrays of bool or uint8, Detectron2's BitMasks, PackedMasks,
WindowMasks, and lists of COCO run-length encodings.

Legend: N masks of an image, H W its height and width in pixels, G objects.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util
from torch import Tensor

from unseg.discovery.rle import covers
from unseg.evaluation.recall import exact_mask_iou
from unseg.layers import PackedMasks, pack_masks, run_lengths
from unseg.structures import RLE, WindowMasks, encode_masks

_BITS = (torch.bool, torch.uint8, np.dtype(bool), np.dtype(np.uint8))
_AT_ONCE = 64


def encode_predicted_masks(masks: Any) -> list[RLE]:
    """Encodings of masks, which are pasted, unpacked and encoded a part at a time.

    Args:
        masks: of any of the forms above. Encodings are returned as they are.

    Raises:
        ValueError: they have another form, or another shape or dtype.
    """
    if isinstance(masks, WindowMasks):
        return masks.to_rle()  # not through `.tensor`, which pastes all of them at once
    masks = getattr(masks, "tensor", masks)  # BitMasks
    if isinstance(masks, Sequence):
        if any(not isinstance(m, dict) or not {"size", "counts"} <= m.keys() for m in masks):
            raise ValueError("pred_masks are neither a tensor nor encodings")
        return list(masks)
    if isinstance(masks, PackedMasks):
        parts = (masks[n : n + _AT_ONCE].to_dense() for n in range(0, len(masks), _AT_ONCE))
    elif not isinstance(masks, Tensor | np.ndarray):
        raise ValueError(f"pred_masks are neither a tensor nor encodings, but {type(masks)}")
    elif masks.ndim != 3 or masks.dtype not in _BITS:
        raise ValueError(
            f"pred_masks must be bool of shape (N, H, W), got {masks.dtype} of shape "
            f"{tuple(masks.shape)}"
        )
    else:
        parts = (masks[n : n + _AT_ONCE] for n in range(0, len(masks), _AT_ONCE))
    return [rle for part in parts for rle in encode_masks(part)]


def comparable_masks(masks: Any, size: tuple[int, int]) -> PackedMasks | list[RLE]:
    """Well-formed compressed encodings as they are: to compare a thousand of them with few objects
    takes less time than to decode them. All other masks as bits."""
    if isinstance(masks, list) and masks and all(_is_compressed(mask, size) for mask in masks):
        counts = [run_lengths.to_bytes(mask["counts"]) for mask in masks]
        if covers(counts, [size[0] * size[1]] * len(counts)).all():
            return masks
    return _pack(masks, size)


def _is_compressed(mask: Any, size: tuple[int, int]) -> bool:
    return (
        isinstance(mask, dict)
        and isinstance(mask.get("counts"), str | bytes)
        and isinstance(mask.get("size"), list | tuple)
        and tuple(mask["size"]) == size
    )


def tight_boxes(masks: PackedMasks | list[RLE]) -> Tensor:
    """XYXY (N, 4) in pixels, 0 where a mask is empty."""
    if isinstance(masks, PackedMasks):
        return masks.box
    xywh = torch.from_numpy(mask_util.toBbox(masks).reshape(-1, 4))
    return BoxMode.convert(xywh, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)


def predicted_mask_iou(masks: PackedMasks | list[RLE], objects: list[RLE]) -> np.ndarray:
    """Exact IoU of all pairs, float64 (N, G)."""
    if isinstance(masks, PackedMasks):
        return exact_mask_iou(masks, _pack_objects(objects, masks))
    # pycocotools divides the same two integers.
    return mask_util.iou(masks, objects, [0] * len(objects))


def _pack(masks: Any, size: tuple[int, int]) -> PackedMasks:
    """Masks of any of the forms above, of the image's size."""
    if isinstance(masks, WindowMasks):
        masks = masks.pack()  # not through `.tensor`, which pastes all of them at once
    masks = getattr(masks, "tensor", masks)  # BitMasks
    masks = torch.from_numpy(masks) if isinstance(masks, np.ndarray) else masks
    if isinstance(masks, Sequence) and not len(masks):
        masks = torch.zeros((0, *size), dtype=torch.bool)
    try:
        packed = pack_masks(masks)
    except (TypeError, ValueError) as error:
        raise ValueError(f"pred_masks: {error}") from error
    if packed.size != size:
        raise ValueError(f"pred_masks are {packed.size}, the proposals' image is {size} (H, W)")
    return packed


def _pack_objects(masks: list[RLE], like: PackedMasks) -> PackedMasks:
    """Objects in the pixel order and on the device of the proposals."""
    if like.order == "F":
        return pack_masks(masks).to(like.device)
    dense = np.stack([mask_util.decode(rle) for rle in masks])
    return pack_masks(torch.from_numpy(dense)).to(like.device)
