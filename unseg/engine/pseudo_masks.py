"""Masks for a whole data set or folder from any model, as a pseudo-mask file."""

import base64
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Instances
from torch import nn

from unseg.checkpoint import weights_hash
from unseg.data import build_mapper, image_root_of
from unseg.data.build import skips_bad_images
from unseg.data.image import EXTENSIONS, ImageReadError, read_image_size
from unseg.discovery import write_pseudo_masks
from unseg.discovery.io import read_header
from unseg.discovery.statistics import MaskStatistics
from unseg.engine.sharded_map import WorkDir, sharded_map
from unseg.structures import ImageRecord, PseudoMask, make_pseudo_masks

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True)
class ImageSource:
    """The images to find masks in.

    Attributes:
        root: folder or URI prefix of the file names.
        images: records without masks, file names relative to the root.
        unreadable: images that were left out because their header could not be read.
    """

    root: str
    images: list[ImageRecord]
    unreadable: int = 0


def images_in_folder(folder: str | os.PathLike, *, skip_bad: bool = False) -> ImageSource:
    """All images below a folder, in the order of their paths, with ids from 1.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        ImageReadError: an image cannot be read, unless `skip_bad`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not paths:
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(EXTENSIONS)})")

    def size(path: Path) -> tuple[int, int] | None:
        try:
            return read_image_size(str(path))
        except ImageReadError as error:
            if not skip_bad:
                raise
            logger.warning("left out %s", error)
            return None

    with ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(size, paths))
    images = [
        ImageRecord(path.relative_to(folder).as_posix(), *hw, image_id=number)
        for number, (path, hw) in enumerate(zip(paths, sizes, strict=True), start=1)
        if hw is not None
    ]
    return ImageSource(str(folder), images, unreadable=len(paths) - len(images))


def images_of_dataset(name: str) -> ImageSource:
    """The images of a registered data set, with its ids and names relative to its root."""
    dicts = DatasetCatalog.get(name)
    if not dicts:
        raise ValueError(f"data set {name} holds no image")
    root = image_root_of(name)
    images = []
    for d in dicts:
        file_name = d["file_name"]
        if root and file_name.startswith(root + "/"):
            file_name = file_name[len(root) + 1 :]
        images.append(ImageRecord(file_name, d["height"], d["width"], d["image_id"]))
    return ImageSource(root, images)


class ImageLoader:
    """Loads unit i: a fixed batch from the list of images sorted by size."""

    def __init__(self, cfg: CfgNode, source: ImageSource):
        self.mapper = build_mapper(cfg, False)
        self.root = source.root
        self.skip_bad = skips_bad_images(cfg)
        images = source.images
        order = sorted(range(len(images)), key=lambda i: (images[i].height, images[i].width, i))
        size = cfg.DISCOVERY.BATCH_SIZE
        self.units = [order[i : i + size] for i in range(0, len(order), size)]
        self.images = images

    def __call__(self, unit: int) -> list[tuple[int, dict[str, Any] | None]]:
        return [(index, self._load(self.images[index])) for index in self.units[unit]]

    def _load(self, image: ImageRecord) -> dict[str, Any] | None:
        path = f"{self.root}/{image.file_name}" if self.root else image.file_name
        record = {"file_name": path, "height": image.height, "width": image.width}
        try:
            return self.mapper(record)
        except ImageReadError as error:
            if not self.skip_bad:
                raise
            logger.warning("left out %s", error)
            return None


class _Labeller:
    """Runs the model on a loaded unit and keeps the masks that the config lets pass."""

    def __init__(self, cfg: CfgNode, model: nn.Module):
        self.model = model.eval()
        self.score_threshold = cfg.DISCOVERY.SCORE_THRESHOLD
        self.max_masks = cfg.DISCOVERY.MAX_MASKS_PER_IMAGE
        self.max_width = cfg.DISCOVERY.MAX_WIDTH

    def __call__(self, loaded: list[tuple[int, dict | None]]) -> tuple[dict[str, Any], int]:
        good = [(index, x) for index, x in loaded if x is not None]
        dropped: Counter[str] = Counter()
        found = self._find([x for _, x in good], dropped) if good else []
        images = {
            str(index): [_to_json(mask) for mask in self._select(masks, dropped)]
            for (index, _), masks in zip(good, found, strict=True)
        }
        return {"images": images, "dropped": dropped}, len(loaded)

    @torch.no_grad()
    def _find(self, inputs: list[dict], dropped: Counter) -> list[list[PseudoMask]]:
        if hasattr(self.model, "discover"):
            self.model.dropped.clear()
            found = self.model.discover(inputs)
            dropped.update(self.model.dropped)
            return found
        return [_from_instances(output["instances"]) for output in self.model(inputs)]

    def _select(self, masks: list[PseudoMask], dropped: Counter) -> list[PseudoMask]:
        confident = [m for m in masks if m.score >= self.score_threshold]
        # Before the best are chosen: an image-wide mask takes no object's place.
        narrow = [m for m in confident if not self._is_wide(m)]
        kept = [m for m in narrow if m.area > 0]
        kept = sorted(kept, key=lambda m: -m.score)[: self.max_masks]
        dropped["below DISCOVERY.SCORE_THRESHOLD"] += len(masks) - len(confident)
        dropped["as wide as DISCOVERY.MAX_WIDTH"] += len(confident) - len(narrow)
        dropped["empty or beyond the best"] += len(narrow) - len(kept)
        return kept

    def _is_wide(self, mask: PseudoMask) -> bool:
        image_width = mask.rle["size"][1]
        return self.max_width > 0 and mask.box[2] >= self.max_width * image_width


def _from_instances(instances: Instances) -> list[PseudoMask]:
    embeddings = instances.pred_embeddings if instances.has("pred_embeddings") else None
    return make_pseudo_masks(instances.pred_masks, instances.scores, embeddings)


def _to_json(mask: PseudoMask) -> dict[str, Any]:
    counts = mask.rle["counts"]
    result = {
        "size": list(mask.rle["size"]),
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
        "score": mask.score,
    }
    if mask.embedding is not None:
        half = np.asarray(mask.embedding, dtype=np.float16)
        result["embedding"] = base64.b64encode(half.tobytes()).decode()
    return result


def _from_json(entry: dict[str, Any]) -> PseudoMask:
    rle = {"size": entry["size"], "counts": entry["counts"].encode()}
    embedding = None
    if "embedding" in entry:
        data = base64.b64decode(entry["embedding"])
        embedding = np.frombuffer(data, dtype=np.float16).astype(np.float32)
    return PseudoMask(rle, entry["score"], embedding)


class PseudoMaskJob:
    """Finds masks in all images of a source and writes them to one file.

    Work in progress lies in ``<output>.parts``. Any number of processes, on any number of machines
    that share the folder, may each work on a shard; the file is the same whatever their number.
    """

    def __init__(
        self,
        cfg: CfgNode,
        source: ImageSource,
        output: str | os.PathLike,
        *,
        weights: str | None = None,
    ):
        """
        Args:
            cfg: model, mapper and DISCOVERY settings.
            source: the images.
            output: the JSON file to write.
            weights: path of the weights the model was built with; their hash becomes part of
                the job. Default ``cfg.MODEL.WEIGHTS``.
        """
        self.source = source
        self.output = Path(output)
        self.loader = ImageLoader(cfg, source)
        self.cfg = cfg
        self.info = {
            "settings": job_settings(cfg),
            "weights": weights_hash(cfg.MODEL.WEIGHTS if weights is None else weights),
            "images": list_hash(source.images),
        }
        self.work_dir = WorkDir(f"{self.output}.parts", self.info, len(self.loader.units))

    def is_written(self) -> bool:
        """Whether the output is there already, made by a job with the same settings."""
        header = read_header(self.output)
        return header is not None and header.get("unseg") == self.info

    def start(self, *, resume: bool) -> None:
        """Open the work folder; see :meth:`WorkDir.open`. One process does this, before all."""
        self.work_dir.open(resume=resume)

    def run(self, model: nn.Module, units: Sequence[int] | None = None, *, name: str = "0") -> None:
        """Work through some units, by default all missing ones, as the process of that name.

        Needs :meth:`start` first.
        """
        sharded_map(
            self.loader,
            _Labeller(self.cfg, model),
            self.work_dir,
            self.work_dir.missing() if units is None else units,
            name=name,
            num_workers=self.cfg.DATALOADER.NUM_WORKERS,
        )

    def collect_if_complete(self) -> MaskStatistics | None:
        """:meth:`collect` once every unit is finished, by whichever process gets here first.

        Returns:
            None if units are still missing (the log says how many) or another process collected.
        """
        return collect_if_complete(self.work_dir, self.output, self.collect)

    def collect(self) -> MaskStatistics:
        """Write the output file from the finished units and remove the work folder."""
        dropped: Counter[str] = Counter()
        images: dict[int, list[PseudoMask]] = {}
        for result in self.work_dir.results():
            dropped.update(result["dropped"])
            for index, entries in result["images"].items():
                images[int(index)] = [_from_json(entry) for entry in entries]
        statistics = MaskStatistics(dropped=dropped)
        statistics.unreadable_images = self.source.unreadable + (
            len(self.source.images) - len(images)
        )
        records = self._records(images)
        write_pseudo_masks(self.output, records, info=self.info, statistics=statistics)
        self.work_dir.remove()
        return statistics

    def _records(self, images: dict[int, list[PseudoMask]]) -> Iterator[ImageRecord]:
        for index, image in enumerate(self.source.images):
            if index in images:
                yield ImageRecord(
                    image.file_name, image.height, image.width, image.image_id, images[index]
                )


def collect_if_complete(
    work_dir: WorkDir, output: str | os.PathLike, collect: Callable[[], _T]
) -> _T | None:
    """What `collect`, which ends with the removal of the work folder, makes of finished work.

    Returns:
        None if units are still missing (the log says how many) or another process collected.
    """
    with work_dir.lock() as locked:
        if not locked:
            logger.info("another process has written %s", output)
            return None
        missing = len(work_dir.missing())
        if missing:
            logger.info(
                "%d of %d batches are still to be done by other processes; run one of them "
                "again if it has died",
                missing,
                work_dir.num_units,
            )
            return None
        return collect()


def job_settings(cfg: CfgNode) -> dict[str, Any]:
    """The parts of a config that masks depend on, without paths and process counts, as JSON has
    them."""
    content = cfg.clone()
    content.defrost()
    content.MODEL.WEIGHTS = ""
    content.MODEL.DEVICE = ""
    content.MODEL.EXEMPLAR.POOL = ""
    return plain({key: content[key] for key in ("MODEL", "INPUT", "TEST", "DISCOVERY")})


def plain(value: Any) -> Any:
    """A config node as dicts and lists, equal to itself once written to JSON and read again."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def list_hash(images: Sequence[ImageRecord]) -> str:
    """sha256 of names, sizes and ids."""
    digest = hashlib.sha256()
    for image in images:
        entry = (image.file_name, image.height, image.width, image.image_id)
        digest.update(repr(entry).encode())
    return digest.hexdigest()
