"""The mask ops in plain PyTorch: for installations without the extension, and devices without it.

Intersections are products of 0/1 matrices. An int8 product is exact and several times faster than
a float32 one where the processor has int8 dot products; float32 is exact as long as sums stay below
2^24. Everything after that is computed in float64 from integers, as the compiled ops do.

Dimensions: N, M masks, P = H * W pixels, W64 words a mask. `flat` are masks as int8 ``(N, P)`` of
0 and 1. `order` holds the indices by falling score.
"""

import sys
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unseg.layers.native import KERNELS, MODES, row_words

# Temporaries are cut to about this many elements: they then stay in the cache and in memory that
# the allocator reuses.
CHUNK = 1 << 21
# The largest sum that float32 accumulates exactly.
EXACT_FLOAT = 1 << 24
# Multiplications from which on an int8 product pays.
SMALL_PRODUCT = 1 << 26
# Bytes of pairwise overlaps that matrix NMS keeps from its first to its second pass; beyond that
# it computes them again.
KEPT_BYTES = 1 << 28
BLOCK = 512


def _row_chunks(rows: int, columns: int, elements: int = CHUNK) -> Iterator[slice]:
    step = max(1, elements // max(columns, 1))
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def pack(masks: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """See unseg::pack_masks: masks (N, H, W) to bits int64 (N, W64) and meta int32 (N, 8)."""
    count, height, width = masks.shape
    words = row_words(height * width)
    bits = torch.zeros(count, words, dtype=torch.int64, device=masks.device)
    meta = torch.zeros(count, 8, dtype=torch.int32, device=masks.device)
    if bits.numel() == 0:
        return bits, meta
    for rows in _row_chunks(count, 64 * words):
        dense = to_bool(masks[rows], threshold)
        flat = F.pad(dense.flatten(1).view(torch.uint8), (0, 64 * words - height * width))
        eights = flat.view(len(flat), -1, 8)
        packed = eights[:, :, 0].clone()
        for k in range(1, 8):
            packed |= eights[:, :, k] << k
        if sys.byteorder == "big":
            packed = packed.view(len(flat), -1, 8).flip(2).flatten(1)
        bits[rows] = packed.view(torch.int64)
        area = dense.sum((1, 2))
        meta[rows, 0] = area.to(torch.int32)
        meta[rows, 1], meta[rows, 3] = _extent(dense.any(1), area)
        meta[rows, 2], meta[rows, 4] = _extent(dense.any(2), area)
        meta[rows, 5], meta[rows, 6] = _extent(bits[rows] != 0, area)
    return bits, meta


def to_bool(masks: Tensor, threshold: float) -> Tensor:
    """Set pixels: above the threshold (compared in float32 at least), or non-zero."""
    if not masks.is_floating_point():
        return masks if masks.dtype == torch.bool else masks != 0
    if masks.dtype != torch.float64:
        masks = masks.float()
    return masks > torch.tensor(threshold, dtype=masks.dtype, device=masks.device)


def _extent(occupied: Tensor, area: Tensor) -> tuple[Tensor, Tensor]:
    """First and last + 1 set entry of each row of a bool (N, L); zeros where area is 0."""
    numbers = occupied.to(torch.int32)
    first = numbers.argmax(1)
    last = occupied.shape[1] - numbers.flip(1).argmax(1)
    there = area > 0
    return (first * there).to(torch.int32), (last * there).to(torch.int32)


def unpack(bits: Tensor, pixels: int) -> Tensor:
    """Bits (N, W64) back to `flat`, int8 (N, pixels)."""
    flat = torch.empty(len(bits), pixels, dtype=torch.int8, device=bits.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    for rows in _row_chunks(len(bits), 64 * bits.shape[1]):
        packed = bits[rows].view(torch.uint8)
        if sys.byteorder == "big":
            packed = packed.view(len(packed), -1, 8).flip(2).flatten(1)
        eights = (packed.unsqueeze(2) >> shifts) & 1
        flat[rows] = eights.flatten(1)[:, :pixels].view(torch.int8)
    return flat


def flatten(masks: Tensor) -> Tensor:
    """Dense masks (N, H, W) of bool, uint8 or int8 to `flat`."""
    return to_bool(masks, 0.0).flatten(1).contiguous().view(torch.int8)


def _int8_is_fast(device: torch.device) -> bool:
    """Whether torch._int_mm runs on hardware made for it."""
    if not hasattr(torch, "_int_mm"):
        return False
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (7, 5)
    probe = getattr(torch.cpu, "_is_vnni_supported", None)
    return device.type == "cpu" and probe is not None and probe()


def intersections(flat1: Tensor, flat2: Tensor) -> Tensor:
    """|a AND b| of all pairs, exact: (N, M) int32, or float32 while sums stay below 2^24."""
    (n, pixels), m = flat1.shape, len(flat2)
    # Not for small products, where preparing an int8 kernel takes longer than float32 in all. (Nor
    # for one pixel, where torch 2.14 reads past the second operand on the CPU.)
    if n * m * pixels >= SMALL_PRODUCT and pixels >= 16 and _int8_is_fast(flat1.device):
        if flat1.is_cuda:  # cuBLAS wants more than 16 rows and multiples of 8
            flat1 = F.pad(flat1, (0, -pixels % 8, 0, max(24 - n, -n % 8)))
            flat2 = F.pad(flat2, (0, -pixels % 8, 0, max(24 - m, -m % 8)))
        return torch._int_mm(flat1, flat2.t())[:n, :m]
    exact = pixels <= EXACT_FLOAT
    total = torch.zeros(n, m, dtype=torch.float32 if exact else torch.int32, device=flat1.device)
    step = min(max(64, 2 * CHUNK // max(n, m, 1)), EXACT_FLOAT)
    with torch.autocast(flat1.device.type, enabled=False):
        for begin in range(0, pixels, step):
            left = flat1[:, begin : begin + step].float()
            right = left if flat1 is flat2 else flat2[:, begin : begin + step].float()
            if exact:
                total.addmm_(left, right.t())
            else:
                total += (left @ right.t()).to(torch.int32)
    return total


def _ratio(
    inter: Tensor, area1: Tensor, area2: Tensor, mode: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The overlap from exact numbers, 0 for 0/0: `dtype` (n, m); areas (n,), (m,)."""
    inter = inter.to(dtype)
    rows, columns = area1.to(dtype)[:, None], area2.to(dtype)[None, :]
    if mode == MODES["iou"]:
        denominator = (rows + columns).sub_(inter)
    elif mode == MODES["iomin"]:
        denominator = torch.minimum(rows, columns)
    else:
        denominator = rows if mode == MODES["ioa"] else columns
    return inter / denominator.clamp(min=1.0)


def _areas(flat: Tensor) -> Tensor:
    """Set pixels, float64 (N,): a product with ones, far faster than a sum over bytes."""
    return intersections(flat, flat.new_ones(16, flat.shape[1]))[:, 0].double()


def overlap(
    flat1: Tensor, labels1: Tensor | None, flat2: Tensor, labels2: Tensor | None, mode: int
) -> Tensor:
    """See unseg::mask_overlap: (N, M) float32, or int32 for mode inter."""
    inter = intersections(flat1, flat2)
    if flat1 is flat2:
        area1 = area2 = inter.diagonal().double()
    else:
        area1, area2 = _areas(flat1), _areas(flat2)
    if labels1 is not None and labels2 is not None:
        inter = inter * (labels1[:, None] == labels2[None, :])
    if mode == MODES["inter"]:
        return inter.to(torch.int32)
    # While float32 holds all sums, its one rounding gives what float64 rounded to float32 gives.
    dtype = torch.float32 if 2 * flat1.shape[1] <= EXACT_FLOAT else torch.float64
    out = torch.empty(inter.shape, dtype=torch.float32, device=inter.device)
    for rows in _row_chunks(*inter.shape, CHUNK // 8):
        out[rows] = _ratio(inter[rows], area1[rows], area2, mode, dtype)
    return out


def nms_keep(
    flat: Tensor,
    labels: Tensor | None,
    order: Tensor,
    iou_threshold: float,
    mode: int,
) -> Tensor:
    """See unseg::mask_nms: bool (N,), which masks are kept.

    In blocks of candidates: drop those that a kept mask suppresses, then resolve the rest among
    themselves on the host. Masks that were dropped are never compared again.
    """
    keep = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    area = _areas(flat)
    kept = order[:0]
    for begin in range(0, len(order), BLOCK):
        block = order[begin : begin + BLOCK]
        candidates = flat[block]
        if begin > 0:
            survives = torch.ones(len(block), dtype=torch.bool, device=flat.device)
            for part in kept.split(4 * BLOCK):
                hit = _exceeds(
                    flat[part], candidates, part, block, area, labels, mode, iou_threshold
                )
                survives &= ~hit.any(0)
            block, candidates = block[survives], candidates[survives]
        hit = _exceeds(candidates, candidates, block, block, area, labels, mode, iou_threshold)
        chosen = _resolve(hit.cpu())
        block = block[chosen.to(block.device)]
        keep[block] = True
        kept = torch.cat([kept, block])
    return keep


def _exceeds(
    flat1: Tensor,
    flat2: Tensor,
    index1: Tensor,
    index2: Tensor,
    area: Tensor,
    labels: Tensor | None,
    mode: int,
    threshold: float,
) -> Tensor:
    """Overlap above the threshold and of one label, bool (n, m)."""
    inter = intersections(flat1, flat2)
    hit = _ratio(inter, area[index1], area[index2], mode) > threshold
    if labels is not None:
        hit &= labels[index1][:, None] == labels[index2][None, :]
    return hit


def _resolve(hit: Tensor) -> Tensor:
    """Greedy choice among candidates in order; hit bool (n, n) on the CPU -> bool (n,)."""
    pairs = hit.numpy()
    chosen = torch.zeros(len(hit), dtype=torch.bool)
    dropped = np.zeros(len(pairs), bool)
    for k in range(len(pairs)):
        if not dropped[k]:
            chosen[k] = True
            dropped |= pairs[k]
    return chosen


def matrix_decay(
    flat: Tensor, labels: Tensor | None, order: Tensor, kernel: int, sigma: float
) -> Tensor:
    """See unseg::matrix_nms: the factors of the scores, float64 (N,), in input order.

    Only the upper triangle is computed, a block of columns at a time.
    """
    count = len(flat)
    flat = flat[order]
    labels = None if labels is None else labels[order]
    area = torch.zeros(count, dtype=torch.float64, device=flat.device)  # known block by block
    remember = count * count * 4 <= KEPT_BYTES
    step = min(BLOCK, max(64, CHUNK // max(count, 1)))
    blocks = [slice(b, min(b + step, count)) for b in range(0, count, step)]
    most = torch.zeros(count, dtype=torch.float64, device=flat.device)
    decay = torch.ones_like(most)
    known: list[Tensor] = []
    for columns in blocks:
        u = _upper_iou(flat, labels, area, columns)
        most[columns] = u.amax(0)
        if remember:
            known.append(u)
    for k, columns in enumerate(blocks):
        u = known[k] if remember else _upper_iou(flat, labels, area, columns)
        c = most[: columns.stop, None]
        if kernel == KERNELS["gaussian"]:
            gain = u.square_().sub_(c * c).amax(0).clamp_(min=0.0)
            decay[columns] = torch.exp(-sigma * gain)
        else:
            quotient = u.neg_().add_(1.0).div_(torch.where(c < 1.0, 1.0 - c, 1.0))
            quotient.masked_fill_(c >= 1.0, 1.0)
            decay[columns] = quotient.amin(0).clamp_(max=1.0)
    return torch.empty_like(decay).index_put_((order,), decay)


def _upper_iou(flat: Tensor, labels: Tensor | None, area: Tensor, columns: slice) -> Tensor:
    """IoU of masks i before j for a block of columns j: float64 (columns.stop, n), 0 elsewhere.

    `area` must hold the areas of the masks before the block, and gets those of the block.
    """
    rows = slice(0, columns.stop)
    left = flat[rows]
    inter = intersections(left, flat[columns] if columns.start else left)
    area[columns] = inter[columns.start :].diagonal().double()
    u = _ratio(inter, area[rows], area[columns], MODES["iou"])
    if labels is not None:
        u *= labels[rows, None] == labels[None, columns]
    u[columns.start :].triu_(1)
    return u
