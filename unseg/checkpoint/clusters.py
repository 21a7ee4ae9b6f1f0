"""The file of clusters: one .npz, or a .pth that ``torch.load(weights_only=True)`` reads.

================  ==================================================================================
``info``          JSON text: ``format``, ``geometry``, ``c`` and ``info``, how they were made
``centroids``     (K, D) float64
``classes``       (K,) int64, -1 for a cluster without a name; not there if none was named
================  ==================================================================================

See :class:`unseg.structures.Clusters`. Legend: K clusters, D dimensions.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unseg.checkpoint.files import atomic_write
from unseg.checkpoint.safe import CheckpointError, load_weights_file
from unseg.structures import Clusters

_FORMAT = "unseg clusters 1"
_SUFFIXES = (".npz", ".pth")


def save_clusters(
    path: str | os.PathLike, clusters: Clusters, info: Mapping[str, Any] | None = None
) -> None:
    """Write clusters atomically; to a .npz, equal clusters give equal bytes.

    Args:
        path: ends in .npz or .pth.
        clusters: on any device.
        info: JSON-able, on how they were made.

    Raises:
        CheckpointError: `path` ends otherwise, or `info` is not JSON-able. Nothing is written then.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise CheckpointError(f"{path}: not written: it must end in {' or '.join(_SUFFIXES)}")
    header = {
        "format": _FORMAT,
        "geometry": clusters.geometry,
        "c": float(clusters.c),
        "info": dict(info or {}),
    }
    try:
        text = json.dumps(header, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not written: info is not JSON: {error}") from error
    tensors = {"centroids": clusters.centroids.detach().cpu().contiguous()}
    if clusters.classes is not None:
        tensors["classes"] = clusters.classes.cpu().contiguous()
    with atomic_write(path, "wb") as file:
        if path.suffix == ".npz":
            np.savez(file, info=np.array(text), **{k: v.numpy() for k, v in tensors.items()})
        else:
            torch.save({"info": text} | tensors, file)


def load_clusters(path: str | os.PathLike) -> tuple[Clusters, dict[str, Any]]:
    """Read a file of :func:`save_clusters`.

    Returns:
        the clusters, on the CPU, and the `info` they were saved with.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged or holds something else; the message names the key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file of clusters (unseg.tools.cluster_embeddings makes it)"
        )
    if path.suffix not in _SUFFIXES:
        raise CheckpointError(f"{path}: a file of clusters ends in {' or '.join(_SUFFIXES)}")
    content = _read_npz(path) if path.suffix == ".npz" else load_weights_file(path)
    header = _parse_header(content, path)
    tensors = {key: content.get(key) for key in ("centroids", "classes")}
    if not isinstance(tensors["centroids"], torch.Tensor):
        raise CheckpointError(f"{path}: 'centroids' is missing or no array")
    if not isinstance(tensors["classes"], torch.Tensor | None):
        raise CheckpointError(f"{path}: 'classes' is no array")
    try:
        clusters = Clusters(geometry=header["geometry"], c=header["c"], **tensors)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return clusters, header["info"]


def _read_npz(path: Path) -> dict[str, Any]:
    """Its text, and its arrays of numbers as tensors."""
    try:
        with open(path, "rb") as data, np.lib.npyio.NpzFile(data, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return {
            key: array.item() if array.dtype.kind == "U" and not array.ndim else _tensor(array)
            for key, array in arrays.items()
        }
    except Exception as error:  # of many kinds: the zip's, its decompressors', numpy's
        raise CheckpointError(f"{path}: no file of clusters, or damaged: {error}") from error


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _parse_header(content: Any, path: Path) -> dict[str, Any]:
    text = content.get("info") if isinstance(content, dict) else None
    if not isinstance(text, str):
        raise CheckpointError(f"{path}: no file of clusters: no text 'info' in it")
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: 'info' is not JSON: {error}") from error
    found = header.get("format") if isinstance(header, dict) else None
    if found != _FORMAT:
        raise CheckpointError(f"{path}: the format is {found!r:.60}, not {_FORMAT!r}")
    for key, kinds in (("geometry", (str,)), ("c", (int, float)), ("info", (dict,))):
        if type(header.get(key)) not in kinds:
            raise CheckpointError(f"{path}: '{key}' in 'info' is missing or of another type")
    return header
