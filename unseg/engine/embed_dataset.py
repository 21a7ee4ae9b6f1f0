"""Embeddings of everything that a model finds in a data set, or of its annotations, as a store."""

import argparse
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from numbers import Integral
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes
from torch import Tensor, nn

from unseg.data import (
    EmbeddingStoreError,
    EmbeddingWriter,
    open_embeddings,
    register_if_file,
)
from unseg.data.embeddings import remove_store
from unseg.engine.dataset_job import (
    DatasetJob,
    EntriesOfModel,
    ImageSource,
    LoadedUnit,
    entries_in_order,
)
from unseg.engine.embedded_objects import (
    HEADS,
    Objects,
    annotated_objects,
    decode_masks,
    found_objects,
    to_entry,
    to_rows,
)
from unseg.engine.find_masks import run_job
from unseg.engine.sharded_map import WorkDir
from unseg.structures import ImageRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbeddingCounts:
    """What was written.

    Attributes:
        images: of the data set.
        objects: embedded, of all images.
        images_without_objects: among them those that could not be read.
        unreadable_images: left out as ``INPUT.ON_BAD_IMAGE`` skip says.
        left_out_annotations: crowd regions, and annotations without a pixel.
    """

    images: int
    objects: int
    images_without_objects: int
    unreadable_images: int
    left_out_annotations: int


class _AnnotationEmbedder:
    """Embeds the annotated objects of a loaded unit."""

    def __init__(self, model: nn.Module, annotations: Sequence[Sequence[dict[str, Any]]]):
        """
        Args:
            model: gives embeddings.
            annotations: of each image, by its number, in Detectron2's format.

        Raises:
            ValueError: the model gives no embeddings.
        """
        self.model = model.eval()
        self.annotations = annotations
        if not hasattr(getattr(model, "roi_heads", None), "embed"):
            raise ValueError(f"{type(model).__name__} embeds no given masks: {HEADS}")

    @torch.no_grad()
    def __call__(self, loaded: LoadedUnit) -> tuple[dict[str, Any], int]:
        entries: dict[str, Any] = {str(index): None for index, x in loaded if x is None}
        good = [(index, x) for index, x in loaded if x is not None]
        objects, left_out = [], []
        for index, x in good:
            try:
                found = annotated_objects(self.annotations[index], (x["height"], x["width"]))
            except ValueError as error:
                raise ValueError(f"{x['file_name']}: {error}") from error
            objects.append(found[0])
            left_out.append(found[1])
        tangents = embed_objects(self.model, [x for _, x in good], objects) if good else []
        for (index, x), own, rows, count in zip(good, objects, tangents, left_out, strict=True):
            array = rows.float().cpu().numpy()
            if not np.isfinite(array).all():
                raise ValueError(f"{x['file_name']}: the embeddings are NaN/inf")
            entries[str(index)] = to_entry(own, array) | {"left_out": count}
        return entries, len(loaded)


def embed_objects(
    model: nn.Module, inputs: Sequence[dict[str, Any]], objects: Sequence[Objects]
) -> list[Tensor]:
    """Tangents (N, D) of given objects of a batch of images.

    Args:
        model: Detectron2's GeneralizedRCNN, with HierarchicalEmbedding... heads.
        inputs: of the model.
        objects: of each image, with masks.
    """
    images = model.preprocess_image(inputs)
    features = model.backbone(images.tensor)
    # What it finds is embedded with such masks, and annotations are to be compared with that.
    whole_boxes = getattr(model.roi_heads, "mask_source", "pred") == "box"
    boxes, masks = [], []
    for x, size, own in zip(inputs, images.image_sizes, objects, strict=True):
        corners = Boxes(torch.from_numpy(own.boxes).clone())  # scaled in place
        corners.scale(size[1] / x["width"], size[0] / x["height"])
        boxes.append(corners.to(images.tensor.device))
        dense = decode_masks(own.masks, x["height"], x["width"])
        if whole_boxes:
            dense = _fill_boxes(own.boxes, x["height"], x["width"])
        masks.append(dense.to(images.tensor.device))
    return model.roi_heads.embed(images, features, boxes, masks)


def _fill_boxes(boxes: np.ndarray, height: int, width: int) -> Tensor:
    """bool (N, height, width), the pixels whose centres are in the boxes (N, 4) XYXY."""
    corners = torch.from_numpy(boxes)[:, :, None]
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    columns = (x >= corners[:, 0]) & (x < corners[:, 2])
    rows = (y >= corners[:, 1]) & (y < corners[:, 3])
    return rows[:, :, None] & columns[:, None, :]


class EmbeddingJob(DatasetJob[EmbeddingCounts]):
    """Writes the embeddings of what a model finds in a data set, or of its annotations, to a store.

    In memory are at most the objects of 500 images. MODEL.HIERARCHICAL_EMBEDDING.CLUSTERS is not
    used: what clusters leave out is embedded, too.
    """

    block: int = 500  # images in a shard

    def __init__(
        self,
        cfg: CfgNode,
        source: ImageSource,
        output: str | os.PathLike,
        *,
        weights: str | None = None,
        origin: dict[str, Any] | None = None,
        ground_truth: str = "",
    ):
        """
        Args:
            cfg, weights: see :class:`DatasetJob`.
            source: the images; those of `ground_truth`, if it is given.
            output: the folder.
            origin: JSON-able, kept in the store's info.
            ground_truth: a registered data set whose annotations are embedded; "": what the model
                finds.

        Raises:
            ValueError: two images share an id.
        """
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.HIERARCHICAL_EMBEDDING.CLUSTERS = ""
        ids = [image.image_id for image in source.images]
        if not all(isinstance(image_id, Integral) for image_id in ids):
            ids = [str(image_id) for image_id in ids]
        if len(set(ids)) < len(ids):
            raise ValueError("the data set's image ids are not unique")
        order = sorted(range(len(ids)), key=ids.__getitem__)
        images = [replace(source.images[i], image_id=ids[i]) for i in order]
        super().__init__(cfg, replace(source, images=images), output, weights=weights)
        self.origin = origin or {}
        self.annotations: list[list[dict[str, Any]]] | None = None
        if ground_truth:
            own = {d["image_id"]: d.get("annotations") for d in DatasetCatalog.get(ground_truth)}
            self.annotations = [own[source.images[i].image_id] or [] for i in order]
        digest = hashlib.sha256(repr(self.annotations).encode()).hexdigest()
        self.info["annotations"] = digest if ground_truth else None
        self.work_dir = WorkDir(f"{self.output}.parts", self.info, len(self.loader.units))

    def is_written(self) -> bool:
        """Whether the store is there already, made by a job with the same settings."""
        try:
            return open_embeddings(self.output).info.get("unseg") == self.info
        except EmbeddingStoreError:
            return False

    def processor(self, model: nn.Module) -> Callable[[LoadedUnit], tuple[Any, int]]:
        """Embeds the objects of a unit."""
        if self.annotations is None:
            return EntriesOfModel(model, lambda *x: to_entry(*found_objects(*x)))
        return _AnnotationEmbedder(model, self.annotations)

    def collect(self) -> EmbeddingCounts:
        """Write the store from the finished units and remove the work folder.

        Raises:
            ValueError: some objects have masks and others none, or embeddings of several
                dimensions. There is no store then.
        """
        node = self.cfg.MODEL.HIERARCHICAL_EMBEDDING
        dim = next((x["dim"] for _, x in self._entries() if x is not None), node.EMBED_DIM)
        writer = EmbeddingWriter(self.output, dim=dim, geometry=node.GEOMETRY, c=node.CURVATURE)
        try:
            counts = self._write(writer, dim)
        except ValueError:
            remove_store(self.output)
            raise
        origin = self.origin | {"model": self.cfg.MODEL.META_ARCHITECTURE}
        writer.finish(origin | {"counts": asdict(counts), "unseg": self.info})
        self.work_dir.remove()
        return counts

    def _write(self, writer: EmbeddingWriter, dim: int) -> EmbeddingCounts:
        """All shards."""
        tally: Counter[str] = Counter()
        entries = self._entries()
        while block := list(islice(entries, self.block)):
            read = [(image, entry) for image, entry in block if entry is not None]
            rows = to_rows(read, dim)
            writer.add(rows)
            tally["objects"] += len(rows)
            tally["unreadable"] += len(block) - len(read)
            tally["empty"] += len(block) - len(np.unique(rows.image_ids))
            tally["left out"] += sum(entry.get("left_out", 0) for _, entry in read)
        return EmbeddingCounts(
            images=len(self.source.images),
            objects=tally["objects"],
            images_without_objects=tally["empty"],
            unreadable_images=tally["unreadable"],
            left_out_annotations=tally["left out"],
        )

    def _entries(self) -> Iterator[tuple[ImageRecord, dict[str, Any] | None]]:
        """All images with their entries, in order."""
        for index, entry in entries_in_order(self.work_dir.results()):
            yield self.source.images[index], entry


def embed_dataset(args: argparse.Namespace, log: str | None = None) -> None:
    """One process of the job.

    Args:
        args: of :func:`unseg.engine.find_masks_parser`, with ``ground_truth``: embed the
            annotations; ``output`` is a folder.
        log: a file for the log beside the standard output, ending in ``.txt``.

    Raises:
        ValueError: annotations are asked for, and there is no data set.
    """
    if args.ground_truth and not args.dataset:
        raise ValueError("--ground-truth needs a --dataset, which has annotations")
    ground_truth = register_if_file(args.dataset) if args.ground_truth else ""
    origin = {
        "config": args.config_file,
        "dataset": args.dataset or args.images,
        "ground_truth": args.ground_truth,
    }
    counts = run_job(partial(EmbeddingJob, origin=origin, ground_truth=ground_truth), args, log)
    if counts is None:
        return
    logger.info("wrote %s: %d objects of %d images", args.output, counts.objects, counts.images)
    if counts.left_out_annotations:
        logger.info(
            "left out %d annotations: crowd regions, or without a pixel",
            counts.left_out_annotations,
        )
    if counts.images_without_objects:
        logger.warning(
            "%d of %d images have no object (%d could not be read)",
            counts.images_without_objects,
            counts.images,
            counts.unreadable_images,
        )
