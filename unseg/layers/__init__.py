"""Operations on tensors: mask overlaps and suppression, affinities, assembled windows."""

from unseg.layers.assemble_instances import assemble_instances
from unseg.layers.boc_affinity import boc_affinity
from unseg.layers.mask_ops import batched_mask_nms, keep_decayed, mask_iou, mask_nms, matrix_nms
from unseg.layers.native import backend, has_native
from unseg.layers.packed_masks import PackedMasks, pack_masks
from unseg.layers.resize import resize_image, scaled_size

__all__ = [
    "PackedMasks",
    "assemble_instances",
    "backend",
    "batched_mask_nms",
    "boc_affinity",
    "has_native",
    "keep_decayed",
    "mask_iou",
    "mask_nms",
    "matrix_nms",
    "pack_masks",
    "resize_image",
    "scaled_size",
]
