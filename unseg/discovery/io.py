"""The pseudo-mask file: COCO JSON with one category, and embeddings in a sidecar.

What is written: XYWH tight boxes, areas, annotation ids from 1, every image listed (also those
without masks), one category ``{"id": 1, "name": "object"}``. Embeddings are a float16 array (one
row an annotation, in order) in ``<stem>.<hash>.npy`` beside the JSON. The sidecar is written first,
under its hash, and the JSON that names it is renamed into place last: a reader finds either the
old pair or the new one.

What is read besides: masks in any COCO JSON, and the released FreeSOLO files (XYXY boxes, no
areas, duplicate ids, 80 categories, embeddings as numbers). Boxes and areas come from the masks,
annotation ids and categories are not used, crowd regions are left out.
"""

import hashlib
import io
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from unseg.checkpoint.files import atomic_write
from unseg.discovery.rle import covers, malformed_counts, read_segmentation
from unseg.discovery.statistics import MaskStatistics
from unseg.structures import ImageRecord, PseudoMask

CATEGORY = {"id": 1, "name": "object", "supercategory": "object"}
_FORMAT = "unseg pseudo-masks 1"

logger = logging.getLogger(__name__)


class PseudoMaskError(ValueError):
    """A pseudo-mask file is malformed; the message names the file, the record and the field."""


def write_pseudo_masks(
    path: str | os.PathLike,
    records: Iterable[ImageRecord],
    *,
    info: dict[str, Any] | None = None,
    statistics: MaskStatistics | None = None,
) -> None:
    """Write a pseudo-mask file and its embeddings, atomically.

    Args:
        path: the JSON file.
        records: one per image, with unique ids. Read once: may be a generator.
        info: what to keep about the origin (settings, weights); nothing that changes between
            equal runs. Stored under ``info.unseg``.
        statistics: the records are added to it; stored under ``info.statistics``.

    Raises:
        ValueError: two images share an id, or only some masks have embeddings.
    """
    path = Path(path)
    images, annotations, vectors = [], [], []
    for record in records:
        if statistics is not None:
            statistics.add(record)
        images.append(
            {
                "id": record.image_id,
                "file_name": record.file_name,
                "height": record.height,
                "width": record.width,
            }
        )
        for mask in record.masks:
            annotations.append(_to_annotation(mask, len(annotations) + 1, record.image_id))
            vectors.append(mask.embedding)
    duplicates = [i for i, n in Counter(image["id"] for image in images).items() if n > 1]
    if duplicates:
        raise ValueError(f"image id {duplicates[0]} is used by several images")
    header = {"description": "pseudo-masks", "format": _FORMAT, "unseg": info or {}}
    if statistics is not None:
        header["statistics"] = statistics.to_json()
    sidecar = _write_embeddings(path, vectors)
    if sidecar:
        header["embeddings"] = sidecar
    previous = _sidecar_of(path)
    with atomic_write(path) as file:
        # By hand around json.dumps: its C encoder is twice as fast as json.dump, and the header
        # comes first, where `read_header` finds it without reading the masks.
        file.write(f'{{"info":{_dumps(header)},"licenses":[],"categories":{_dumps([CATEGORY])}')
        for key, entries in (("images", images), ("annotations", annotations)):
            file.write(f',"{key}":[')
            file.writelines((",\n" if n else "\n") + _dumps(e) for n, e in enumerate(entries))
            file.write("]")
        file.write("}\n")
    if previous is not None and previous.name != sidecar.get("file"):
        previous.unlink(missing_ok=True)


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def read_header(path: str | os.PathLike) -> dict[str, Any] | None:
    """The ``info`` of a file of :func:`write_pseudo_masks`, without reading its masks.

    Returns:
        None if there is no such file, or it is of another origin.
    """
    start = '{"info":'
    try:
        with open(path, encoding="utf-8") as file:
            head = file.readline(1 << 20)
        header = json.JSONDecoder().raw_decode(head.removeprefix(start))[0]
    except (OSError, ValueError):
        return None
    ours = head.startswith(start) and isinstance(header, dict) and header.get("format") == _FORMAT
    return header if ours else None


def _to_annotation(mask: PseudoMask, annotation_id: int, image_id: int) -> dict[str, Any]:
    counts = mask.rle["counts"]
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": CATEGORY["id"],
        "iscrowd": 0,
        "score": mask.score,
        "bbox": mask.box,
        "area": mask.area,
        "segmentation": {
            "size": list(mask.rle["size"]),
            "counts": counts.decode() if isinstance(counts, bytes) else counts,
        },
    }


def _write_embeddings(path: Path, vectors: Sequence[np.ndarray | None]) -> dict[str, Any]:
    """Write the sidecar; returns its entry in the header, empty without embeddings."""
    missing = sum(v is None for v in vectors)
    if missing == len(vectors):
        return {}
    if missing:
        raise ValueError(f"{missing} of {len(vectors)} masks have no embedding")
    buffer = io.BytesIO()
    np.save(buffer, np.stack(vectors).astype(np.float16))
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    name = f"{path.stem}.{digest[:16]}.npy"
    with atomic_write(path.with_name(name), "wb") as file:
        file.write(buffer.getvalue())
    return {"file": name, "sha256": digest}


def _sidecar_of(path: Path) -> Path | None:
    """The sidecar that an existing file names, to be removed once the file is replaced."""
    header = read_header(path)
    name = header.get("embeddings", {}).get("file") if header else None
    # Only a name that this module would have given: never a path to somewhere else.
    ours = isinstance(name, str) and Path(name).name == name and name.startswith(f"{path.stem}.")
    return path.with_name(name) if ours and name.endswith(".npy") else None


def load_pseudo_masks(path: str | os.PathLike) -> list[ImageRecord]:
    """Read a pseudo-mask file, checking every record.

    Masks without a pixel and crowd regions are left out, with one warning that counts them.

    Args:
        path: a JSON file as :func:`write_pseudo_masks` writes it, any COCO instance JSON, or a
            released FreeSOLO file.

    Returns:
        one record per image, in the order of the file; embeddings float16 from a sidecar, float32
        from FreeSOLO's files.

    Raises:
        FileNotFoundError: there is no such file.
        PseudoMaskError: the file is malformed; the message names the record and the field.
    """
    path = Path(path)
    return parse_pseudo_masks(read_mask_json(path), path)


def read_mask_json(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a COCO-like file with ``images`` and ``annotations``.

    Raises:
        FileNotFoundError: there is no such file.
        PseudoMaskError: it is none.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PseudoMaskError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise PseudoMaskError(f"{path}: the top level is not an object")
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list):
            raise PseudoMaskError(f"{path}: '{key}' is missing or not a list")
    return content


def parse_pseudo_masks(content: dict[str, Any], path: Path) -> list[ImageRecord]:
    """:func:`load_pseudo_masks` on what :func:`read_mask_json` read from `path`."""
    records = {}
    for index, image in enumerate(content["images"]):
        record = _parse_image(image, f"{path}: images[{index}]")
        if record.image_id in records:
            raise PseudoMaskError(
                f"{path}: images[{index}]: id {record.image_id} is used by an earlier image"
            )
        records[record.image_id] = record
    embeddings = _read_embeddings(path, content)
    parsed = []
    for index, annotation in enumerate(content["annotations"]):
        embedding = None if embeddings is None else embeddings[index]
        where = f"{path}: annotations[{index}]"
        parsed.append(_parse_annotation(annotation, where, records, embedding))
    good = covers([m.rle["counts"] for _, m in parsed], [r.height * r.width for r, _ in parsed])
    if not good.all():
        index = int(np.flatnonzero(~good)[0])
        record, annotation = parsed[index][0], content["annotations"][index]
        raise PseudoMaskError(
            f"{path}: annotations[{index}] (id {annotation.get('id')}, image {record.image_id}): "
            f"{malformed_counts(record.height, record.width)}"
        )
    left_out = 0
    for annotation, (record, mask) in zip(content["annotations"], parsed, strict=True):
        if not annotation.get("iscrowd") and mask_util.area(mask.rle):
            record.masks.append(mask)
        else:
            left_out += 1
    if left_out:
        logger.warning("%s: left out %d crowd regions and masks without a pixel", path, left_out)
    return list(records.values())


def _require(record: Any, key: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """``record[key]`` if it is of one of these types (a bool is not a number here)."""
    if not isinstance(record, dict):
        raise PseudoMaskError(f"{where} is not an object")
    value = record.get(key)
    if not isinstance(value, kinds) or isinstance(value, bool):
        found = "is missing" if key not in record else f"is {value!r:.60}"
        raise PseudoMaskError(f"{where}: '{key}' {found}")
    return value


def _parse_image(image: Any, where: str) -> ImageRecord:
    image_id = _require(image, "id", (int, str), where)
    where = f"{where} (id {image_id})"
    height, width = (_require(image, key, int, where) for key in ("height", "width"))
    if min(height, width) < 1 or height * width >= 2**31:
        raise PseudoMaskError(f"{where}: size {height}x{width} is not that of an image")
    return ImageRecord(_require(image, "file_name", str, where), height, width, image_id)


def _parse_annotation(
    annotation: Any, where: str, records: dict[Any, ImageRecord], embedding: np.ndarray | None
) -> tuple[ImageRecord, PseudoMask]:
    image_id = _require(annotation, "image_id", (int, str), where)
    where = f"{where} (id {annotation.get('id')}, image {image_id})"
    if image_id not in records:
        raise PseudoMaskError(f"{where}: no image has that id")
    record = records[image_id]
    score = annotation.get("score", 1.0)
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise PseudoMaskError(f"{where}: 'score' is {score!r:.60}")
    segmentation = _require(annotation, "segmentation", (dict, list), where)
    try:
        rle = read_segmentation(segmentation, record.height, record.width)
    except ValueError as error:
        raise PseudoMaskError(f"{where}: {error}") from error
    if embedding is None and "emb" in annotation:  # FreeSOLO's own files
        embedding = _parse_vector(annotation["emb"], where)
    return record, PseudoMask(rle, float(score), embedding)


def _parse_vector(values: Any, where: str) -> np.ndarray:
    try:
        vector = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise PseudoMaskError(f"{where}: 'emb' is not a list of numbers") from error
    if vector.ndim != 1 or not np.isfinite(vector).all():
        raise PseudoMaskError(f"{where}: 'emb' is not a list of finite numbers")
    return vector


def _read_embeddings(path: Path, content: dict[str, Any]) -> np.ndarray | None:
    """The sidecar's array (annotations, D), or None if the file names none."""
    info = content.get("info")
    entry = info.get("embeddings") if isinstance(info, dict) else None
    if entry is None:
        return None
    where = f"{path}: info.embeddings"
    name = _require(entry, "file", str, where)
    if Path(name).name != name:
        raise PseudoMaskError(f"{where}: 'file' must lie beside the JSON, it is {name!r}")
    sidecar = path.with_name(name)
    if not sidecar.is_file():
        raise PseudoMaskError(f"{where}: {sidecar} does not exist (copy it with the JSON)")
    data = sidecar.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise PseudoMaskError(f"{where}: {sidecar} is not the file that was written with the JSON")
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if array.ndim != 2 or len(array) != len(content["annotations"]):
        raise PseudoMaskError(
            f"{where}: {sidecar} has shape {array.shape} for {len(content['annotations'])} masks"
        )
    return array
