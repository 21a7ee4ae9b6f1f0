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
        pieces = [_characters(c) for c in counts]
    else:
        pieces = [_runs(c, n) for n, c in enumerate(counts)]
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return torch.from_numpy(np.concatenate(pieces)), torch.from_numpy(offsets), size


def decode(data: Tensor, offsets: Tensor, size: tuple[int, int]) -> Tensor:
    """The masks that :func:`join` gave, as transposed images: bool ``(N, W, H)``.

    Raises:
        ValueError: runs that are malformed or do not add up to H x W.
    """
    height, width = size
    bounds = offsets.tolist()
    dense = np.zeros((len(bounds) - 1, width * height), bool)
    for n, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:])):
        piece = data[begin:end].numpy()
        runs = parse(piece, n) if piece.dtype == np.uint8 else piece
        if (runs < 0).any() or int(runs.sum()) != height * width:
            raise ValueError(
                f"masks: the run lengths of RLE {n} are malformed or do not add up to "
                f"{height} x {width} pixels"
            )
        dense[n] = np.repeat((np.arange(len(runs)) & 1).astype(bool), runs)
    return torch.from_numpy(dense.reshape(len(dense), width, height))


def parse(text: np.ndarray, n: int = 0) -> np.ndarray:
    """The runs of one compressed string, int64.

    Five bits a character, from ``chr(48)`` up; bit 5 says that more follow and the last character
    carries the sign. From the fourth run on, the difference to the last run but one is stored.

    Args:
        text: uint8 characters.
        n: number of the mask, for messages.

    Raises:
        ValueError: a character out of range, a string that ends early, a negative or huge run.
    """
    error = ValueError(f"masks: the run lengths of RLE {n} are malformed")
    pieces = text.astype(np.int64) - 48
    if pieces.size and (pieces.min() < 0 or pieces.max() > 63 or pieces[-1] & 32):
        raise error
    runs: list[int] = []
    value = shift = 0
    for piece in pieces.tolist():
        value |= (piece & 31) << shift
        shift += 5
        if piece & 32:
            continue
        if piece & 16:
            value -= 1 << shift
        run = value + (runs[-2] if len(runs) > 2 else 0)
        if not 0 <= run <= MAX_PIXELS:
            raise error
        runs.append(run)
        value = shift = 0
    return np.array(runs, np.int64)


def _common_size(masks: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    sizes = set()
    for n, mask in enumerate(masks):
        if not isinstance(mask, Mapping) or "size" not in mask or "counts" not in mask:
            raise TypeError(f"masks[{n}] must be a dict of 'size' and 'counts'")
        size = mask["size"]
        if not isinstance(size, Sequence | np.ndarray) or len(size) != 2:
            raise ValueError(f"masks[{n}]: size must be (H, W), not {size!r}")
        sizes.add((int(size[0]), int(size[1])))
    if len(sizes) > 1:
        raise ValueError(f"masks must have one size, not {sorted(sizes)}")
    height, width = sizes.pop()
    if height < 0 or width < 0 or height * width > MAX_PIXELS:
        raise ValueError(f"masks: size {(height, width)} is out of range")
    return height, width


def _characters(counts: str | bytes) -> np.ndarray:
    raw = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
    return np.frombuffer(raw, np.uint8)


def _runs(counts: Any, n: int) -> np.ndarray:
    """The runs of mask n as int64, from a string or from a list of numbers."""
    if isinstance(counts, str | bytes):
        return parse(_characters(counts), n)
    runs = np.asarray(counts)
    if runs.size == 0:
        return np.zeros(0, np.int64)
    if runs.ndim != 1 or runs.dtype.kind not in "iu":
        raise TypeError(f"masks[{n}]: counts must be a string, bytes or a list of integers")
    return runs.astype(np.int64)
