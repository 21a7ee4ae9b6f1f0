"""The embedding store: what a model's embedding head says of all objects of a data set, on disk.

A folder of ``shard-00000.npz``, ... and ``manifest.json``, which names them with their hashes and
is written last: where it is, everything is. Rows are in order of image id, those of an image in the
order in which the model (or the data set) gives them. A shard holds

=================  =================================================================================
``image_ids``      (N,) int64, or text where the data set's ids are
``scores``         (N,) float32; 1 for annotations
``boxes``          (N, 4) float32, XYXY in pixels of the image file
``areas``          (N,) int64, pixels of the mask, or of the rounded box where there are no masks
``classes``        (N,) int64, 0-based; -1 for objects that a model found
``tangents``       (N, D) float32
``mask_sizes``     (N, 2) int32, height and width; this and the next two only if there are masks
``mask_counts``    (L,) uint8, compressed COCO run lengths, one mask after the other
``mask_ends``      (N,) int64, where each of them ends
=================  =================================================================================

Tangent vectors at the origin are kept, not points of the ball: near its rim float32 has no digits
left of 1 - c|x|^2, while all that is needed can be had from a tangent in float64.
``np.load(..., allow_pickle=False)`` reads every shard.

Legend: N rows, D embedding dimensions, L characters.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from unseg.checkpoint import atomic_write, file_hash
from unseg.discovery.rle import covers
from unseg.structures import RLE
from unseg.structures.clusters import GEOMETRIES

MANIFEST = "manifest.json"
_SHARD = "shard-{:05d}.npz"
_FORMAT = "unseg embeddings 1"
# Of each array: its axes after the first, and its type. D is the store's.
_COLUMNS: dict[str, tuple[tuple[int | str, ...], type]] = {
    "scores": ((), np.float32),
    "boxes": ((4,), np.float32),
    "areas": ((), np.int64),
    "classes": ((), np.int64),
    "tangents": (("D",), np.float32),
}
_MASK_COLUMNS: dict[str, tuple[tuple[int | str, ...], type]] = {
    "mask_sizes": ((2,), np.int32),
    "mask_ends": ((), np.int64),
}


class EmbeddingStoreError(ValueError):
    """A store cannot be written or read; the message names the file and the array or key."""


@dataclass(frozen=True, eq=False)
class EmbeddingRows:
    """Some rows of a store, with the arrays of the table above.

    Attributes:
        image_ids, scores, boxes, areas, classes, tangents: see there.
        masks: N compressed encodings, or None.
    """

    image_ids: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    classes: np.ndarray
    tangents: np.ndarray
    masks: list[RLE] | None = None

    def __len__(self) -> int:
        return len(self.image_ids)


@dataclass(frozen=True)
class _Shard:
    file: str
    rows: int
    sha256: str


class EmbeddingWriter:
    """Writes a store shard by shard; an earlier store in the folder is removed first."""

    def __init__(self, path: str | os.PathLike, *, dim: int, geometry: str, c: float):
        """
        Args:
            path: the folder.
            dim: D.
            geometry: one of :data:`unseg.structures.clusters.GEOMETRIES`.
            c: the ball's curvature is -c; not looked at for "euclidean".

        Raises:
            EmbeddingStoreError: `path` is a file, or one of the others is wrong.
        """
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise EmbeddingStoreError(f"{path}: not written: a file is there, not a folder")
        self.space = {"dim": dim, "geometry": geometry, "c": float(c)}
        _check_space(self.space, f"{path}: not written")
        self.shards: list[_Shard] = []
        self._has_masks: bool | None = None
        remove_store(self.path)

    def add(self, rows: EmbeddingRows) -> None:
        """Write one more shard.

        Raises:
            EmbeddingStoreError: an array has another shape or type than the store's, is NaN or
                infinite, or some shards have masks and others none. The shard is not written.
        """
        name = _SHARD.format(len(self.shards))
        where = f"{self.path / name}: not written"
        arrays = {field.name: getattr(rows, field.name) for field in fields(rows)}
        del arrays["masks"]
        if rows.masks is not None:
            arrays |= _pack_masks(rows.masks)
        has_masks = rows.masks is not None
        if len(rows):  # a shard without rows says nothing about masks
            if self._has_masks not in (None, has_masks):
                raise EmbeddingStoreError(f"{where}: some objects have masks, others have none")
            self._has_masks = has_masks
        _check_arrays(arrays, len(rows), self.space["dim"], has_masks, where)
        with atomic_write(self.path / name, "wb") as file:
            np.savez(file, **arrays)
        self.shards.append(_Shard(name, len(rows), file_hash(self.path / name)))

    def finish(self, info: Mapping[str, Any]) -> None:
        """Write the manifest, after which the store can be opened.

        Args:
            info: JSON-able, on where the embeddings come from; nothing that differs between equal
                runs.

        Raises:
            EmbeddingStoreError: `info` is not JSON-able.
        """
        manifest = {
            "format": _FORMAT,
            **self.space,
            "rows": sum(shard.rows for shard in self.shards),
            "has_masks": bool(self._has_masks),
            "info": dict(info),
            "shards": [vars(shard) for shard in self.shards],
        }
        path = self.path / MANIFEST
        try:
            text = json.dumps(manifest, indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise EmbeddingStoreError(f"{path}: not written: info is not JSON: {error}") from error
        with atomic_write(path) as file:
            file.write(text + "\n")


def remove_store(path: str | os.PathLike) -> None:
    """Remove a store's files, the manifest first: what is left must not be taken for whole."""
    (Path(path) / MANIFEST).unlink(missing_ok=True)
    for shard in sorted(Path(path).glob(_SHARD.replace("{:05d}", "[0-9]*"))):
        shard.unlink()


def open_embeddings(path: str | os.PathLike) -> "EmbeddingStore":
    """Open a store; its shards are read, and checked, when they are needed.

    Raises:
        EmbeddingStoreError: there is no store, it was not finished, the manifest is malformed, or
            a shard is missing.
    """
    path = Path(path)
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise EmbeddingStoreError(
            f"{path}: no embedding store: {MANIFEST} is missing (unseg.tools.embed_dataset makes "
            "it; it is written last)"
        )
    try:
        content = json.loads(manifest.read_text())
    except ValueError as error:  # also UnicodeDecodeError
        raise EmbeddingStoreError(f"{manifest}: not JSON: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != _FORMAT:
        raise EmbeddingStoreError(f"{manifest}: the format is {found!r:.60}, not {_FORMAT!r}")
    for key, kind in (("rows", int), ("has_masks", bool), ("info", dict), ("shards", list)):
        if type(content.get(key)) is not kind:
            raise EmbeddingStoreError(f"{manifest}: '{key}' is missing or no {kind.__name__}")
    space = {key: content.get(key) for key in ("dim", "geometry", "c")}
    _check_space(space, str(manifest))
    shards = [_parse_shard(s, f"{manifest}: shards[{n}]") for n, s in enumerate(content["shards"])]
    if sum(shard.rows for shard in shards) != content["rows"]:
        raise EmbeddingStoreError(
            f"{manifest}: 'rows' is {content['rows']}, the shards have "
            f"{sum(shard.rows for shard in shards)}"
        )
    for shard in shards:
        if not (path / shard.file).is_file():
            raise EmbeddingStoreError(f"{manifest}: {shard.file} is missing")
    return EmbeddingStore(path, content["info"] | space, shards, content["has_masks"])


class EmbeddingStore:
    """An opened store; :func:`open_embeddings` makes it.

    Columns are read once and kept; :meth:`column` and :meth:`read` keep nothing.

    Attributes:
        path: the folder.
        info: where the embeddings come from, with ``dim``, ``geometry`` and ``c``.
        has_masks: whether objects have masks.
    """

    def __init__(self, path: Path, info: dict[str, Any], shards: Sequence[_Shard], has_masks: bool):
        self.path, self.info, self.has_masks = path, info, has_masks
        self._shards = tuple(shards)
        self._verified: set[str] = set()

    def __len__(self) -> int:
        return sum(shard.rows for shard in self._shards)

    @property
    def dim(self) -> int:
        """D."""
        return self.info["dim"]

    @property
    def geometry(self) -> str:
        """One of :data:`unseg.structures.clusters.GEOMETRIES`."""
        return self.info["geometry"]

    @property
    def c(self) -> float:
        """The ball's curvature is -c."""
        return self.info["c"]

    @cached_property
    def image_ids(self) -> np.ndarray:
        """int64 (N,), or text."""
        return self.column("image_ids")

    @cached_property
    def scores(self) -> np.ndarray:
        """float32 (N,)."""
        return self.column("scores")

    @cached_property
    def boxes(self) -> np.ndarray:
        """float32 (N, 4) XYXY."""
        return self.column("boxes")

    @cached_property
    def areas(self) -> np.ndarray:
        """int64 (N,)."""
        return self.column("areas")

    @cached_property
    def classes(self) -> np.ndarray:
        """int64 (N,), -1 where unknown."""
        return self.column("classes")

    @cached_property
    def tangents(self) -> np.ndarray:
        """float32 (N, D)."""
        return self.column("tangents")

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` (default: all) of one array; other shards are not read.

        Raises:
            KeyError: there is no array of that name.
            EmbeddingStoreError: a shard is damaged or not this store's.
        """
        if name not in {"image_ids", *_COLUMNS}:
            raise KeyError(f"no column {name!r}: image_ids, {', '.join(_COLUMNS)}")
        stop = len(self) if stop is None else min(stop, len(self))
        parts, first = [], 0
        for shard in self._shards:
            low, high = max(start - first, 0), min(stop - first, shard.rows)
            if low < high:
                parts.append(self._arrays(shard, (name,))[name][low:high])
            first += shard.rows
        if parts:
            return np.concatenate(parts)
        tail, dtype = _COLUMNS.get(name, ((), np.int64))
        return np.zeros((0, *(self.dim if axis == "D" else axis for axis in tail)), dtype)

    def shards(self) -> Iterator[EmbeddingRows]:
        """All rows, a shard at a time, with masks.

        Raises:
            EmbeddingStoreError: see :meth:`column`; also malformed masks.
        """
        keys = ("image_ids", *_COLUMNS)
        for shard in self._shards:
            # A shard without rows may have been written without masks, too.
            has_masks = self.has_masks and shard.rows > 0
            mask_keys = (*_MASK_COLUMNS, "mask_counts") if has_masks else ()
            arrays = self._arrays(shard, (*keys, *mask_keys))
            masks = [] if self.has_masks else None
            if has_masks:
                masks = _unpack_masks(arrays, str(self.path / shard.file))
            yield EmbeddingRows(**{key: arrays[key] for key in keys}, masks=masks)

    def _arrays(self, shard: _Shard, keys: Sequence[str]) -> dict[str, np.ndarray]:
        path = self.path / shard.file
        try:
            if shard.file not in self._verified and file_hash(path) != shard.sha256:
                raise EmbeddingStoreError(
                    f"{path}: damaged, or not the file that was written with {MANIFEST}"
                )
            self._verified.add(shard.file)
            with open(path, "rb") as data, np.lib.npyio.NpzFile(data, allow_pickle=False) as file:
                arrays = {key: file[key] for key in keys if key in file.files}
        except EmbeddingStoreError:
            raise
        except Exception as error:  # of many kinds: the zip's, numpy's, the file system's
            raise EmbeddingStoreError(f"{path}: not a shard, or damaged: {error}") from error
        for key in keys:
            if key not in arrays:
                raise EmbeddingStoreError(f"{path}: the array '{key}' is missing")
        _check_arrays(arrays, shard.rows, self.dim, "mask_counts" in arrays, str(path))
        return arrays


def _check_space(space: Mapping[str, Any], where: str) -> None:
    dim, geometry, c = (space.get(key) for key in ("dim", "geometry", "c"))
    if type(dim) is not int or dim < 1:
        raise EmbeddingStoreError(f"{where}: 'dim' must be at least 1, it is {dim!r:.60}")
    if geometry not in GEOMETRIES:
        raise EmbeddingStoreError(f"{where}: 'geometry' must be one of {GEOMETRIES}, {geometry!r}")
    if isinstance(c, bool) or not isinstance(c, int | float) or not 0 < c < float("inf"):
        raise EmbeddingStoreError(f"{where}: 'c' must be above 0, it is {c!r:.60}")


def _parse_shard(entry: Any, where: str) -> _Shard:
    kinds = {"file": str, "rows": int, "sha256": str}
    if not isinstance(entry, dict) or any(type(entry.get(k)) is not v for k, v in kinds.items()):
        raise EmbeddingStoreError(f"{where}: 'file', 'rows' and 'sha256' are needed")
    # Only a name beside the manifest: never a path to somewhere else.
    if Path(entry["file"]).name != entry["file"] or entry["rows"] < 0:
        raise EmbeddingStoreError(f"{where}: {entry['file']!r:.60} with {entry['rows']} rows")
    return _Shard(**{key: entry[key] for key in kinds})


def _check_arrays(
    arrays: Mapping[str, np.ndarray], rows: int, dim: int, has_masks: bool, where: str
) -> None:
    """Shapes, types and values of those of a shard's arrays that are there."""
    kinds = _COLUMNS | (_MASK_COLUMNS if has_masks else {})
    for key, (tail, dtype) in kinds.items():
        if key not in arrays:
            continue
        shape = (rows, *(dim if axis == "D" else axis for axis in tail))
        array = arrays[key]
        if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
            raise EmbeddingStoreError(
                f"{where}: '{key}' must be {shape} {np.dtype(dtype)}, it is {_kind(array)}"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise EmbeddingStoreError(f"{where}: '{key}' holds NaN or infinite values")
    ids = arrays.get("image_ids")
    if ids is None:
        return
    if ids.shape != (rows,) or (ids.dtype != np.int64 and ids.dtype.kind != "U"):
        raise EmbeddingStoreError(
            f"{where}: 'image_ids' must be ({rows},) int64 or text, it is {_kind(ids)}"
        )
    if (ids[1:] < ids[:-1]).any():
        raise EmbeddingStoreError(f"{where}: 'image_ids' are not in order")


def _kind(array: Any) -> str:
    return f"{array.shape} {array.dtype}" if isinstance(array, np.ndarray) else "no array"


def _pack_masks(masks: Sequence[RLE]) -> dict[str, np.ndarray]:
    counts = [m["counts"].encode() if isinstance(m["counts"], str) else m["counts"] for m in masks]
    return {
        "mask_sizes": np.array([m["size"] for m in masks], dtype=np.int32).reshape(-1, 2),
        "mask_counts": np.frombuffer(b"".join(counts), dtype=np.uint8),
        "mask_ends": np.cumsum([len(c) for c in counts], dtype=np.int64),
    }


def _unpack_masks(arrays: Mapping[str, np.ndarray], where: str) -> list[RLE]:
    """The masks of a shard, whose other arrays have been checked."""
    text, sizes = arrays["mask_counts"], arrays["mask_sizes"].astype(np.int64)
    ends = [0, *arrays["mask_ends"].tolist()]
    if text.dtype != np.uint8 or text.ndim != 1:
        raise EmbeddingStoreError(f"{where}: 'mask_counts' must be (L,) uint8, it is {_kind(text)}")
    if any(b < a for a, b in pairwise(ends)) or ends[-1] != len(text):
        raise EmbeddingStoreError(f"{where}: 'mask_ends' do not divide 'mask_counts'")
    data = text.tobytes()
    counts = [data[a:b] for a, b in pairwise(ends)]
    good = covers(counts, sizes.prod(axis=1)) & (sizes > 0).all(axis=1)
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise EmbeddingStoreError(f"{where}: 'mask_counts': the mask of row {row} is malformed")
    return [{"size": size, "counts": c} for size, c in zip(sizes.tolist(), counts, strict=True)]
