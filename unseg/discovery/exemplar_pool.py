"""The exemplar pool's file: one .npz that says what it holds.

Legend: K exemplars, D embedding length, H W an object image's size (each has its own).

=================================  =================================================================
``info``                           JSON text: ``format``; ``info``, how the pool was made;
                                   ``exemplars``, of each its ``category``, ``file_name``, ``box``
                                   and ``mask_from`` (see :class:`unseg.structures.Exemplar`)
``embeddings``                     (K, D) float32
``image/00000``, ...               (H, W, 3) uint8, RGB
``mask/00000``, ...                (H, W) bool
=================================  =================================================================

``np.load(path, allow_pickle=False)`` reads it. Nothing in it depends on when it was written.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unseg.checkpoint.files import atomic_write
from unseg.structures import Exemplar, ExemplarPool

MASK_ORIGINS = ("refined", "coarse", "whole")
_FORMAT = "unseg exemplar pool 1"


class ExemplarError(ValueError):
    """Exemplars cannot be chosen, or their pool not read; the message names the file or key."""


def save_exemplar_pool(path: str | os.PathLike, pool: ExemplarPool) -> None:
    """Write a pool atomically; equal pools give equal bytes.

    Raises:
        ExemplarError: the pool is empty, an exemplar has no embedding or is malformed, or
            ``pool.info`` is not JSON-able. Nothing is written then.
    """
    path = Path(path)
    if not len(pool):
        raise ExemplarError(f"{path}: not written: the pool holds no exemplars")
    records = [
        {
            "category": exemplar.category,
            "file_name": exemplar.file_name,
            "box": [int(side) for side in exemplar.box],
            "mask_from": exemplar.mask_from,
        }
        for exemplar in pool.exemplars
    ]
    header = {"format": _FORMAT, "info": pool.info, "exemplars": records}
    try:
        # Sorted, as equal dictionaries may have their keys in another order.
        text = json.dumps(header, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ExemplarError(f"{path}: not written: the pool's info is not JSON: {error}") from error
    try:
        embeddings = np.asarray(pool.embeddings, dtype=np.float32)
    except ValueError as error:  # missing, or of several lengths
        raise ExemplarError(f"{path}: not written: {error}") from error
    arrays = {"info": np.array(text), "embeddings": embeddings}
    for index, exemplar in enumerate(pool.exemplars):
        arrays[f"image/{index:05d}"] = exemplar.image
        arrays[f"mask/{index:05d}"] = exemplar.mask
    _to_pool(arrays, f"{path}: not written")
    with atomic_write(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def load_exemplar_pool(path: str | os.PathLike, per_category: int = 0) -> ExemplarPool:
    """Read a pool, checking every exemplar.

    Args:
        path: a file of :func:`save_exemplar_pool`.
        per_category: how many exemplars of each category to keep, the first ones; 0: all.

    Raises:
        ExemplarError: there is no such file, or it is not a pool; the message names the file and
            the array or record.
        ValueError: `per_category` is negative.
    """
    path = Path(path)
    if not path.is_file():
        raise ExemplarError(f"{path}: no such exemplar pool (unseg.tools.build_exemplars makes it)")
    try:
        with open(path, "rb") as data, np.lib.npyio.NpzFile(data, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # of many kinds: the zip's, its decompressors', numpy's
        raise ExemplarError(f"{path}: not an exemplar pool, or damaged: {error}") from error
    return _to_pool(arrays, str(path)).first_of_each(per_category)


def _to_pool(arrays: Mapping[str, Any], where: str) -> ExemplarPool:
    """The pool in a file's arrays; raises ExemplarError as :func:`load_exemplar_pool` says."""
    header = _parse_header(arrays, where)
    records = header["exemplars"]
    if not records:
        raise ExemplarError(f"{where}: the pool holds no exemplars")
    embeddings = _array(arrays, "embeddings", "(K, D) float32", where)
    if len(embeddings) != len(records) or embeddings.shape[1] == 0:
        raise ExemplarError(
            f"{where}: 'embeddings' has shape {embeddings.shape} for {len(records)} exemplars"
        )
    if not np.isfinite(embeddings).all():
        raise ExemplarError(f"{where}: 'embeddings' holds NaN or infinite values")
    exemplars = []
    for index, (record, embedding) in enumerate(zip(records, embeddings, strict=True)):
        image = _array(arrays, f"image/{index:05d}", "(H, W, 3) uint8", where)
        mask = _array(arrays, f"mask/{index:05d}", "(H, W) bool", where)
        if mask.shape != image.shape[:2]:
            raise ExemplarError(
                f"{where}: 'mask/{index:05d}' is {mask.shape}, its image {image.shape[:2]}"
            )
        if not mask.any():
            raise ExemplarError(f"{where}: 'mask/{index:05d}' is empty")
        fields = _parse_record(record, f"{where}: exemplars[{index}]")
        exemplars.append(Exemplar(image=image, mask=mask, embedding=embedding, **fields))
    return ExemplarPool(tuple(exemplars), header["info"])


def _parse_header(arrays: Mapping[str, Any], where: str) -> dict[str, Any]:
    text = arrays.get("info")
    if not isinstance(text, np.ndarray) or text.dtype.kind != "U" or text.ndim:
        raise ExemplarError(f"{where}: not an exemplar pool: no text 'info' in it")
    try:
        header = json.loads(text.item())
    except ValueError as error:
        raise ExemplarError(f"{where}: 'info' is not JSON: {error}") from error
    found = header.get("format") if isinstance(header, dict) else None
    if found != _FORMAT:
        raise ExemplarError(f"{where}: the format is {found!r:.60}, not {_FORMAT!r}")
    for key, kind in (("info", dict), ("exemplars", list)):
        if not isinstance(header.get(key), kind):
            raise ExemplarError(f"{where}: '{key}' in 'info' is missing or not a {kind.__name__}")
    return header


# What an array is called in messages: its number of axes, last axis (None: any) and type.
_KINDS = {
    "(K, D) float32": (2, None, np.float32),
    "(H, W, 3) uint8": (3, 3, np.uint8),
    "(H, W) bool": (2, None, np.bool_),
}


def _array(arrays: Mapping[str, Any], key: str, kind: str, where: str) -> np.ndarray:
    array = arrays.get(key)
    if array is None:
        raise ExemplarError(f"{where}: the array '{key}' is missing")
    axes, last, dtype = _KINDS[kind]
    fits = isinstance(array, np.ndarray) and array.ndim == axes and array.dtype == dtype
    if not fits or (last is not None and array.shape[-1] != last):
        found = f"{array.shape} {array.dtype}" if isinstance(array, np.ndarray) else "no array"
        raise ExemplarError(f"{where}: '{key}' must be {kind}, it is {found}")
    return array


def _parse_record(record: Any, where: str) -> dict[str, Any]:
    """The fields of an exemplar that are not arrays."""
    if not isinstance(record, dict):
        raise ExemplarError(f"{where} is not an object")
    for key in ("category", "file_name"):
        if not isinstance(record.get(key), str):
            raise ExemplarError(f"{where}: '{key}' is missing or not text")
    box = record.get("box")
    if not isinstance(box, list) or len(box) != 4 or any(type(side) is not int for side in box):
        raise ExemplarError(f"{where}: 'box' must be four integers, it is {box!r:.60}")
    if min(box) < 0 or box[0] >= box[2] or box[1] >= box[3]:
        raise ExemplarError(f"{where}: 'box' {box} is not (x0, y0, x1, y1)")
    if record.get("mask_from") not in MASK_ORIGINS:
        raise ExemplarError(f"{where}: 'mask_from' must be one of {MASK_ORIGINS}")
    return {
        "category": record["category"],
        "file_name": record["file_name"],
        "box": tuple(box),
        "mask_from": record["mask_from"],
    }
