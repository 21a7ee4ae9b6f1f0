"""COCO's run lengths: pixels in column order, runs of zeros and ones in turn, zeros first.

A mask is a dict of ``size`` (H, W) and ``counts``: a list of runs, or a compressed string or bytes
as pycocotools makes them (its maskApi.c, rleToString). Decoding here checks what it reads, which
pycocotools does not.

Dimensions: N masks, H W image, L characters or runs of all masks together.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_PIXELS = 2**31 - 1


def join(masks: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The runs of all masks in one vector.

    Args:
        masks: at least one dict of ``size`` and ``counts``, all of one size.

    Returns:
        data ``(L,)``: uint8 characters if all masks are compressed, else int64 runs;
        offsets int64 ``(N + 1,)``: mask n is ``data[offsets[n]:offsets[n + 1]]``; and (H, W).

    Raises:
        TypeError, ValueError: not such dicts, or malformed strings among lists of runs.
    """
    size = _common_size(masks)
    counts = [mask["counts"] for mask in masks]
    if all(isinstance(c, str | bytes) for c in counts):
        pieces = [to_bytes(c) for c in counts]
        data = np.frombuffer(bytearray().join(pieces), np.uint8)
    else:
        pieces = [_runs(c, n) for n, c in enumerate(counts)]
        data = np.concatenate(pieces)
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return torch.from_numpy(data), torch.from_numpy(offsets), size


def decode(data: Tensor, offsets: Tensor, size: tuple[int, int]) -> Tensor:
    """The masks that :func:`join` gave, as transposed images: bool ``(N, W, H)``.

    Raises:
        ValueError: runs that are malformed or do not add up to H x W.
    """
    height, width = size
    dense = np.zeros((len(offsets) - 1, width * height), bool)
    if data.dtype == torch.uint8:
        runs, starts, well_formed = parse(data.numpy(), offsets.numpy())
    else:
        runs, starts, well_formed = data.numpy(), offsets.numpy(), np.ones(len(dense), bool)
    for n, row in enumerate(dense):
        own = runs[starts[n] : starts[n + 1]]
        if not well_formed[n] or (own < 0).any() or int(own.sum()) != height * width:
            raise _malformed(n, f" or do not add up to {height} x {width} pixels")
        row[:] = np.repeat((np.arange(len(own)) & 1).astype(bool), own)
    return torch.from_numpy(dense.reshape(len(dense), width, height))


def parse(text: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The runs of compressed strings, all strings at once.

    Five bits a character, from ``chr(48)`` up, low bits first; bit 5 says that more follow and the
    top bit of the last character is the sign. From the fourth run on, the difference to the last
    run but one is stored.

    Args:
        text: uint8 ``(L,)``, characters of all strings.
        offsets: int64 ``(N + 1,)``: string n is ``text[offsets[n]:offsets[n + 1]]``.

    Returns:
        runs int64 ``(R,)``; starts int64 ``(N + 1,)``: those of string n are
        ``runs[starts[n]:starts[n + 1]]``; and well formed, bool ``(N,)``: False where a character
        is out of range, a number is unfinished or has more than 40 bits, or a run is negative or
        longer than an image can be. Such a string's runs mean nothing.
    """
    count = len(offsets) - 1
    well_formed = np.ones(count, bool)
    if len(text) == 0:
        return np.zeros(0, np.int64), np.zeros(count + 1, np.int64), well_formed
    codes = text.astype(np.int64) - 48
    owner = np.repeat(np.arange(count), np.diff(offsets))
    well_formed[owner[(codes < 0) | (codes > 63)]] = False
    is_last = (codes & 32) == 0
    tails = offsets[1:][np.diff(offsets) > 0] - 1
    well_formed[owner[tails[~is_last[tails]]]] = False
    is_last[tails] = True  # what is wrong with a string stays in it
    ends = np.flatnonzero(is_last)
    owner = owner[ends]
    begins = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - begins + 1
    well_formed[owner[lengths > 8]] = False
    place = np.minimum(np.arange(len(codes)) - np.repeat(begins, lengths), 8)
    runs = np.add.reduceat((codes & 31) << (5 * place), begins)
    runs -= ((codes[ends] & 16) > 0) * (np.int64(1) << (5 * np.minimum(lengths, 8)))
    starts = np.searchsorted(owner, np.arange(count + 1))
    # Undo the differences: runs 2, 4, 6, ... and 1, 3, 5, ... of a string are running sums.
    number = np.arange(len(runs)) - starts[owner]
    for first in (1, 2):
        chain = np.flatnonzero((number >= first) & ((number - first) % 2 == 0))
        sums = np.cumsum(runs[chain])
        heads = np.flatnonzero(number[chain] == first)
        before = np.repeat(sums[heads] - runs[chain[heads]], np.diff([*heads, len(chain)]))
        runs[chain] = sums - before
    well_formed[owner[(runs < 0) | (runs > MAX_PIXELS)]] = False
    return runs, starts, well_formed


def _malformed(n: int, why: str = "") -> ValueError:
    return ValueError(f"masks: the run lengths of RLE {n} are malformed{why}")


def _common_size(masks: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    sizes = set()
    for n, mask in enumerate(masks):
        # The usual types first: asking for the abstract ones takes ten times as long.
        if not isinstance(mask, dict | Mapping) or "size" not in mask or "counts" not in mask:
            raise TypeError(f"masks[{n}] must be a dict of 'size' and 'counts'")
        size = mask["size"]
        if not isinstance(size, list | tuple | Sequence | np.ndarray) or len(size) != 2:
            raise ValueError(f"masks[{n}]: size must be (H, W), not {size!r}")
        sizes.add((int(size[0]), int(size[1])))
    if len(sizes) > 1:
        raise ValueError(f"masks must have one size, not {sorted(sizes)}")
    height, width = sizes.pop()
    if height < 0 or width < 0 or height * width > MAX_PIXELS:
        raise ValueError(f"masks: size {(height, width)} is out of range")
    return height, width


def to_bytes(counts: str | bytes) -> bytes:
    """The characters of a compressed string; what is not ASCII becomes what no string may hold."""
    return counts.encode("ascii", "xmlcharrefreplace") if isinstance(counts, str) else counts


def _characters(counts: str | bytes) -> np.ndarray:
    return np.frombuffer(to_bytes(counts), np.uint8)


def _runs(counts: Any, n: int) -> np.ndarray:
    """The runs of mask n as int64, from a string or from a list of numbers."""
    if isinstance(counts, str | bytes):
        text = _characters(counts)
        runs, _, well_formed = parse(text, np.array([0, len(text)]))
        if not well_formed.all():
            raise _malformed(n)
        return runs
    runs = np.asarray(counts)
    if runs.size == 0:
        return np.zeros(0, np.int64)
    if runs.ndim != 1 or runs.dtype.kind not in "iu":
        raise TypeError(f"masks[{n}]: counts must be a string, bytes or a list of integers")
    return runs.astype(np.int64)
