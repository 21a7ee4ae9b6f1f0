"""Masks found without labels, as they travel between discovery, JSON files and training.

Legend: N masks of an image, H W its height and width in pixels, D embedding length.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_util
from torch import Tensor

RLE = dict[str, Any]  # COCO run-length encoding: {"size": [H, W], "counts": bytes}


def encode_masks(masks: Tensor | np.ndarray) -> list[RLE]:
    """Compressed COCO run-length encodings of boolean masks (N, H, W)."""
    array = masks.cpu().numpy() if isinstance(masks, Tensor) else np.asarray(masks)
    if array.ndim != 3:
        raise ValueError(f"masks must have shape (N, H, W), got {tuple(array.shape)}")
    if len(array) == 0:
        return []
    # pycocotools wants (H, W, N) in column-major order; this view needs no copy per mask.
    fortran = np.asfortranarray(array.transpose(1, 2, 0).astype(np.uint8, copy=False))
    return mask_util.encode(fortran)


@dataclass(frozen=True)
class PseudoMask:
    """One mask of one image.

    Attributes:
        rle: compressed COCO run-length encoding at the size of the image file.
        score: confidence of whatever found it; comparable within one run only.
        embedding: (D,) float vector that describes the object, or None.
    """

    rle: RLE
    score: float
    embedding: np.ndarray | None = field(default=None, compare=False)

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int(mask_util.area(self.rle))

    @property
    def box(self) -> list[float]:
        """Tight box (x, y, width, height) in pixels."""
        return mask_util.toBbox(self.rle).tolist()

    def decode(self) -> np.ndarray:
        """The mask as a boolean array (H, W)."""
        return mask_util.decode(self.rle).astype(bool)


def make_pseudo_masks(
    masks: Tensor | list[RLE], scores: Tensor, embeddings: Tensor | None = None
) -> list[PseudoMask]:
    """Pseudo-masks of one image from tensors.

    Args:
        masks: (N, H, W) bool at the size of the image file, or their compressed encodings.
        scores: (N,) float.
        embeddings: (N, D) float or None.

    Raises:
        ValueError: the numbers of masks, scores and embeddings differ.
    """
    vectors = [None] * len(masks) if embeddings is None else embeddings.float().cpu().numpy()
    if not len(masks) == len(scores) == len(vectors):
        raise ValueError(
            f"{len(masks)} masks, {len(scores)} scores and {len(vectors)} embeddings do not match"
        )
    rles = masks if isinstance(masks, list) else encode_masks(masks)
    return [PseudoMask(r, s, v) for r, s, v in zip(rles, scores.tolist(), vectors, strict=True)]


def pad_pseudo_masks(masks: list[PseudoMask], height: int, width: int) -> list[PseudoMask]:
    """The masks of the top left part of an image as masks of the whole image of that size.

    Raises:
        ValueError: a mask is larger than the image.
    """
    padded = []
    for mask in masks:
        rows, columns = mask.rle["size"]
        if rows > height or columns > width:
            raise ValueError(f"a mask of {rows} x {columns} does not fit into {height} x {width}")
        if (rows, columns) == (height, width):
            padded.append(mask)
            continue
        large = np.pad(mask.decode(), ((0, height - rows), (0, width - columns)))
        padded.append(replace(mask, rle=encode_masks(large[None])[0]))
    return padded


@dataclass
class ImageRecord:
    """The pseudo-masks of one image.

    Attributes:
        file_name: path relative to the image root.
        height, width: pixels of the image file, after its EXIF rotation.
        image_id: unique within a file of records.
        masks: in falling order of score where a discoverer made them.
    """

    file_name: str
    height: int
    width: int
    image_id: int
    masks: list[PseudoMask] = field(default_factory=list)


def stack_masks(masks: list[PseudoMask], height: int, width: int) -> Tensor:
    """Decode to one boolean tensor (N, H, W); N may be 0."""
    if not masks:
        return torch.zeros((0, height, width), dtype=torch.bool)
    decoded = mask_util.decode([m.rle for m in masks])  # (H, W, N)
    return torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1))).bool()
