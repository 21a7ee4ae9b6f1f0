"""Mask IoU, mask NMS and matrix NMS, exact and fast on packed bits.

Every function takes dense masks ``(N, H, W)``, bool, or uint8/int8 where non-zero is set, or
:class:`~unseg.layers.packed_masks.PackedMasks`: pack once what is used twice, and soft masks and
run lengths with :func:`~unseg.layers.packed_masks.pack_masks`. Compiled kernels run where there are
some (:func:`~unseg.layers.native.has_native`), plain PyTorch elsewhere, on the masks' own device.
Results are the same: overlaps are quotients of exact counts, decisions on them are made in float64.
No result carries a gradient.

Sources: greedy NMS and the overlaps as in pycocotools and torchvision; matrix NMS is Wang et al.,
SOLOv2: Dynamic and Fast Instance Segmentation, 2020 (arXiv 2003.10152), section 3.3.

Dimensions: N, M masks, H W image, K kept masks.
"""

import math

import torch
from torch import Tensor

from unseg.layers import mask_ops_reference as reference
from unseg.layers.native import KERNELS, MODES, has_native
from unseg.layers.packed_masks import (
    PackedMasks,
    check_dense,
    check_number,
    check_same_layout,
    pack_masks,
)

Masks = Tensor | PackedMasks


def mask_iou(
    masks1: Masks,
    masks2: Masks | None = None,
    *,
    mode: str = "iou",
    labels1: Tensor | None = None,
    labels2: Tensor | None = None,
) -> Tensor:
    """Overlap of all pairs of masks.

    With I = |a and b|, A = |a|, B = |b| for a in `masks1`, b in `masks2`:

    ========  ==================  ==============================================================
    mode      value               also known as
    ========  ==================  ==============================================================
    iou       I / (A + B - I)     Jaccard index
    iomin     I / min(A, B)       IoS, containment
    ioa       I / A               coverage of a; COCO's crowd IoU with a the detection
    iob       I / B               coverage of b
    inter     I                   int32
    ========  ==================  ==============================================================

    0 / 0 is 0. Values are the float64 quotients rounded to float32.

    Args:
        masks1: ``(N, H, W)`` masks.
        masks2: ``(M, H, W)`` masks of the same size on the same device; `masks1` if None.
        mode: see above.
        labels1: integers ``(N,)``: pairs of unequal labels have overlap 0.
        labels2: integers ``(M,)``; given iff `labels1` is and `masks2` is.

    Returns:
        float32 ``(N, M)``, or int32 for mode ``"inter"``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes, an unknown mode, sizes or pixel orders that differ.
        RuntimeError: tensors on different devices.
    """
    number = _choice(mode, MODES, "mode")
    _check_masks(masks1, "masks1")
    if masks2 is not None:
        _check_masks(masks2, "masks2")
        _same_device(masks1, "masks1", masks2, "masks2")
    labels1 = _check_labels(labels1, masks1, "labels1", "masks1")
    if masks2 is None and labels2 is not None:
        raise ValueError("labels2 is given without masks2")
    labels2 = _check_labels(labels2, masks1 if masks2 is None else masks2, "labels2", "masks2")
    if masks2 is not None and (labels1 is None) != (labels2 is None):
        raise ValueError("labels1 and labels2 must be given together")

    if masks2 is not None:
        _check_sizes(masks1, masks2)
    if has_native(masks1.device.type):
        if isinstance(masks1, PackedMasks) or isinstance(masks2, PackedMasks):
            masks1 = pack_masks(masks1)  # one layout on both sides
            masks2 = None if masks2 is None else pack_masks(masks2)
        first = _operand(masks1)
        second = (None, None) if masks2 is None else _operand(masks2)
        return torch.ops.unseg.mask_overlap(*first, labels1, *second, labels2, number)
    flat1 = _flat(masks1)
    if masks2 is None:
        return reference.overlap(flat1, labels1, flat1, labels1, number)
    return reference.overlap(flat1, labels1, _flat(masks2), labels2, number)


def mask_nms(
    masks: Masks,
    scores: Tensor,
    iou_threshold: float,
    labels: Tensor | None = None,
    *,
    mode: str = "iou",
    return_mask: bool = False,
) -> Tensor:
    """Greedy non-maximum suppression on masks.

    Masks are visited by falling score; equal scores in input order, NaN last. A mask is dropped iff
    its overlap with a mask kept before it, of the same label, is strictly greater than
    `iou_threshold`, both as float64. Empty masks overlap nothing and stay: filter by area first.

    Args:
        masks: ``(N, H, W)`` masks.
        scores: floating ``(N,)``.
        iou_threshold: at least 0; from 1 up nothing is dropped.
        labels: integers ``(N,)``: only masks of one label suppress each other. None for one class.
        mode: the overlap, see :func:`mask_iou`: ``iou``, ``iomin``, ``ioa`` or ``iob``, where a is
            the kept mask and b the one in question.
        return_mask: return bool ``(N,)`` in input order instead. On a GPU this needs no
            synchronisation with the host.

    Returns:
        int64 ``(K,)``, indices of the kept masks by falling score (torchvision's convention).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mask_iou`; ValueError for a negative or NaN
            threshold.
    """
    if mode == "inter":
        raise ValueError("mode must be iou, iomin, ioa or iob: NMS compares ratios")
    number = _choice(mode, MODES, "mode")
    _check_masks(masks, "masks")
    threshold = check_number(iou_threshold, "iou_threshold")
    if threshold < 0:
        raise ValueError(f"iou_threshold must be at least 0, not {threshold}")
    scores = _check_scores(scores, masks)
    labels = _check_labels(labels, masks, "labels", "masks")
    if has_native(masks.device.type):
        keep, ranked, count = torch.ops.unseg.mask_nms(
            *_operand(masks), labels, scores, threshold, number
        )
        return keep if return_mask else ranked[: int(count)]
    order = _falling(scores)
    keep = reference.nms_keep(_flat(masks), labels, order, threshold, number)
    return keep if return_mask else order[keep[order]]


def batched_mask_nms(masks: Masks, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Greedy mask NMS within each category: torchvision's ``batched_nms``, on masks.

    Args:
        masks: ``(N, H, W)`` masks.
        scores: floating ``(N,)``.
        idxs: integers ``(N,)``, the category of each mask.
        iou_threshold: see :func:`mask_nms`.

    Returns:
        int64 ``(K,)``, indices of the kept masks by falling score.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mask_nms`.
    """
    if not isinstance(idxs, Tensor):
        raise TypeError(f"idxs must be a tensor, not {type(idxs).__name__}")
    _check_masks(masks, "masks")
    return mask_nms(
        masks, scores, iou_threshold, labels=_check_labels(idxs, masks, "idxs", "masks")
    )


def matrix_nms(
    masks: Masks,
    scores: Tensor,
    labels: Tensor | None = None,
    *,
    kernel: str = "gaussian",
    sigma: float = 2.0,
) -> Tensor:
    """Matrix NMS: scores decayed by the overlap with better masks, without a sequential loop.

    Sorted as in :func:`mask_nms`, let u_ij be the IoU of masks i before j of one label (0 for
    unequal labels) and c_i = max_k u_ki over the masks k before i. The score of j is multiplied by
    min_i f(u_ij) / f(c_i), where f(u) = exp(-sigma u^2) (``gaussian``) or 1 - u (``linear``; masks
    i with c_i = 1 are skipped, where the quotient is undefined). SOLOv2 prints the Gaussian with
    its sigma in the denominator; like its code, ours multiplies.

    Args:
        masks: ``(N, H, W)`` masks.
        scores: floating ``(N,)``. A NaN stays NaN and changes no other score.
        labels: integers ``(N,)``, None for one class.
        kernel: ``"gaussian"`` or ``"linear"``.
        sigma: positive, for the Gaussian.

    Returns:
        float32 ``(N,)``: decayed scores in input order. :func:`keep_decayed` picks from them.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mask_iou`; ValueError for an unknown kernel
            or a sigma that is not positive and finite.
    """
    number = _choice(kernel, KERNELS, "kernel")
    _check_masks(masks, "masks")
    width = check_number(sigma, "sigma")
    if not 0 < width < math.inf:
        raise ValueError(f"sigma must be positive and finite, not {width}")
    scores = _check_scores(scores, masks)
    labels = _check_labels(labels, masks, "labels", "masks")
    if has_native(masks.device.type):
        return torch.ops.unseg.matrix_nms(*_operand(masks), labels, scores, number, width)
    decay = reference.matrix_decay(_flat(masks), labels, _falling(scores), number, width)
    return (scores.double() * decay).float()


def keep_decayed(
    decayed_scores: Tensor, update_threshold: float = 0.05, max_num: int = 100
) -> Tensor:
    """Indices of the scores that survive matrix NMS, best first. The defaults are SOLOv2's.

    Args:
        decayed_scores: floating ``(N,)``, from :func:`matrix_nms`.
        update_threshold: scores of at least this are kept.
        max_num: at most this many are kept.

    Returns:
        int64 ``(K,)``, equal scores in input order. NaN is never kept.

    Raises:
        TypeError, ValueError: scores that are not a floating vector, or a negative `max_num`.
    """
    if not isinstance(decayed_scores, Tensor) or not decayed_scores.is_floating_point():
        raise TypeError("decayed_scores must be a floating tensor")
    if decayed_scores.dim() != 1:
        raise ValueError(f"decayed_scores must be (N,), not {tuple(decayed_scores.shape)}")
    if isinstance(max_num, bool) or not isinstance(max_num, int):
        raise TypeError(f"max_num must be an int, not {type(max_num).__name__}")
    if max_num < 0:
        raise ValueError(f"max_num must be at least 0, not {max_num}")
    order = _falling(decayed_scores.detach())
    limit = check_number(update_threshold, "update_threshold")
    return order[decayed_scores[order] >= limit][:max_num]


def _choice(value: str, table: dict[str, int], name: str) -> int:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {type(value).__name__}")
    if value not in table:
        raise ValueError(f"{name} must be one of {', '.join(table)}, not {value!r}")
    return table[value]


def _check_masks(masks: Masks, name: str) -> None:
    if isinstance(masks, PackedMasks):
        return
    if not isinstance(masks, Tensor):
        raise TypeError(
            f"{name} must be a tensor (N, H, W) or PackedMasks, not {type(masks).__name__}; "
            "pack run lengths with pack_masks()"
        )
    check_dense(masks, None, name)


def _check_sizes(masks1: Masks, masks2: Masks) -> None:
    if isinstance(masks1, PackedMasks) and isinstance(masks2, PackedMasks):
        check_same_layout(masks1, masks2, "masks1, masks2")
        return
    if tuple(masks1.shape[1:]) != tuple(masks2.shape[1:]):
        raise ValueError(
            f"masks1 and masks2 must have one size, not {tuple(masks1.shape[1:])} and "
            f"{tuple(masks2.shape[1:])}"
        )
    for masks in (masks1, masks2):
        if isinstance(masks, PackedMasks) and masks.order != "C":
            raise ValueError("masks1, masks2: run lengths and dense masks do not mix")


def _check_scores(scores: Tensor, masks: Masks) -> Tensor:
    """The scores, cut off from their graph."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a tensor, not {type(scores).__name__}")
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating, not {scores.dtype}")
    if scores.dim() != 1 or scores.shape[0] != masks.shape[0]:
        raise ValueError(f"scores must be ({masks.shape[0]},), not {tuple(scores.shape)}")
    _same_device(masks, "masks", scores, "scores")
    return scores.detach() if scores.requires_grad else scores


def _check_labels(labels: Tensor | None, masks: Masks, name: str, owner: str) -> Tensor | None:
    """Labels as contiguous int64."""
    if labels is None:
        return None
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, not {labels.dtype}")
    if labels.dim() != 1 or labels.shape[0] != masks.shape[0]:
        raise ValueError(f"{name} must be ({masks.shape[0]},), not {tuple(labels.shape)}")
    _same_device(masks, owner, labels, name)
    return labels.long().contiguous()


def _same_device(first: Masks, first_name: str, second: Masks, second_name: str) -> None:
    if first.device != second.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {first_name} is on "
            f"{first.device} and {second_name} is on {second.device}"
        )


def _falling(scores: Tensor) -> Tensor:
    """Indices by falling score, equal ones in input order, NaN last.

    The negated scores rise, and torch sorts NaN above all numbers, but on GPUs only NaN without a
    sign. 0 - x also makes one zero of the two, which a radix sort might tell apart.
    """
    keys = 0.0 - scores
    return torch.sort(torch.where(keys.isnan(), math.nan, keys), stable=True).indices


def _operand(masks: Masks) -> tuple[Tensor, Tensor | None]:
    """Masks as a compiled op takes them: bits and meta, or dense pixels that it packs itself."""
    if isinstance(masks, PackedMasks):
        return masks.bits, masks.meta
    return masks, None


def _flat(masks: Masks) -> Tensor:
    """Masks as int8 ``(N, H * W)`` of 0 and 1; for packed ones in their own pixel order."""
    if isinstance(masks, PackedMasks):
        return reference.unpack(masks.bits, masks.size[0] * masks.size[1])
    return reference.flatten(masks)
