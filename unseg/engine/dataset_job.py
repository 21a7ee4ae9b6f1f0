"""A model run over all images of a folder or a data set: what jobs of that kind share.

A job is killed and resumed, and divided among processes, as :mod:`unseg.engine.sharded_map` does
it. What becomes of a unit's images, and of all results, is the subclass's.
"""

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import nn

from unseg.checkpoint import file_hash, weights_hash
from unseg.data import build_mapper, image_root_of
from unseg.data.build import skips_bad_images
from unseg.data.image import EXTENSIONS, ImageReadError, read_image_size
from unseg.engine.sharded_map import WorkDir, sharded_map
from unseg.structures import ImageRecord

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
LoadedUnit = list[tuple[int, dict[str, Any] | None]]


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

    def __init__(self, cfg: CfgNode, source: ImageSource, block: int | None = None):
        """
        Args:
            cfg: the mapper's and DISCOVERY.BATCH_SIZE.
            source: the images.
            block: sort only so many consecutive images among themselves, and end a batch with them;
                None: all.
        """
        self.mapper = build_mapper(cfg, False)
        self.root = source.root
        self.skip_bad = skips_bad_images(cfg)
        images = source.images
        size, block = cfg.DISCOVERY.BATCH_SIZE, block or max(len(images), 1)
        self.units: list[list[int]] = []
        for start in range(0, len(images), block):
            own = range(start, min(start + block, len(images)))
            order = sorted(own, key=lambda i: (images[i].height, images[i].width, i))
            self.units += [order[i : i + size] for i in range(0, len(order), size)]
        self.images = images

    def __call__(self, unit: int) -> LoadedUnit:
        return [(index, self._load(self.images[index])) for index in self.units[unit]]

    def _load(self, image: ImageRecord) -> dict[str, Any] | None:
        path = f"{self.root}/{image.file_name}" if self.root else image.file_name
        record = {"file_name": path, "height": image.height, "width": image.width}
        record["image_id"] = image.image_id
        try:
            return self.mapper(record)
        except ImageReadError as error:
            if not self.skip_bad:
                raise
            logger.warning("left out %s", error)
            return None


class DatasetJob(ABC, Generic[_T]):
    """Runs a model on all images of a source and writes what comes of it.

    Work in progress lies in ``<output>.parts``. Any number of processes, on any number of machines
    that share the folder, may each work on a shard; the output is the same whatever their number.
    """

    # See ImageLoader.
    block: int | None = None

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
            output: what to write.
            weights: path of the weights the model was built with; their hash becomes part of
                the job. Default ``cfg.MODEL.WEIGHTS``.
        """
        self.source = source
        self.output = Path(output)
        self.loader = ImageLoader(cfg, source, self.block)
        self.cfg = cfg
        self.info = {
            "settings": job_settings(cfg),
            "weights": weights_hash(cfg.MODEL.WEIGHTS if weights is None else weights),
            "images": list_hash(source.images),
        }
        self.work_dir = WorkDir(f"{self.output}.parts", self.info, len(self.loader.units))

    @abstractmethod
    def is_written(self) -> bool:
        """Whether the output is there already, made by a job with the same settings."""

    @abstractmethod
    def processor(self, model: nn.Module) -> Callable[[LoadedUnit], tuple[Any, int]]:
        """What turns a loaded unit into a JSON-able result and its number of images."""

    @abstractmethod
    def collect(self) -> _T:
        """Write the output from the finished units and remove the work folder."""

    def start(self, *, resume: bool) -> None:
        """Open the work folder; see :meth:`WorkDir.open`. One process does this, before all."""
        self.work_dir.open(resume=resume)

    def run(self, model: nn.Module, units: Sequence[int] | None = None, *, name: str = "0") -> None:
        """Work through some units, by default all missing ones, as the process of that name.

        Needs :meth:`start` first.
        """
        sharded_map(
            self.loader,
            self.processor(model),
            self.work_dir,
            self.work_dir.missing() if units is None else units,
            name=name,
            num_workers=self.cfg.DATALOADER.NUM_WORKERS,
        )

    def collect_if_complete(self) -> _T | None:
        """:meth:`collect` once every unit is finished, by whichever process gets here first.

        Returns:
            None if units are still missing (the log says how many) or another process collected.
        """
        return collect_if_complete(self.work_dir, self.output, self.collect)


class EntriesOfModel:
    """A :meth:`DatasetJob.processor` that keeps an entry of every image of a unit, under its
    number; None of images that could not be read."""

    def __init__(self, model: nn.Module, entry: Callable[[Any, tuple[int, int]], Any]):
        """
        Args:
            model: Detectron2's.
            entry: a JSON-able entry of the model's output for an image of (H, W) pixels. Its
                ValueErrors are raised with the name of the image's file.
        """
        self.model = model.eval()
        self.entry = entry

    @torch.no_grad()
    def __call__(self, loaded: LoadedUnit) -> tuple[dict[str, Any], int]:
        good = [(index, x) for index, x in loaded if x is not None]
        inputs = [x for _, x in good]
        outputs = self.model(inputs) if inputs else []
        if len(outputs) != len(inputs):
            names = ", ".join(x["file_name"] for x in inputs)
            raise ValueError(
                f"the model returned {len(outputs)} outputs for {len(inputs)} images: {names}"
            )
        entries: dict[str, Any] = {str(index): None for index, x in loaded if x is None}
        for (index, x), output in zip(good, outputs, strict=True):
            try:
                entries[str(index)] = self.entry(output, (x["height"], x["width"]))
            except ValueError as error:
                raise ValueError(f"{x['file_name']}: {error}") from error
        return entries, len(loaded)


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
    embedding = content.MODEL.HIERARCHICAL_EMBEDDING
    if embedding.CLUSTERS:
        embedding.CLUSTERS = file_hash(embedding.CLUSTERS)
    del embedding["CLUSTERING"], embedding["NAMING"]  # of what is done with a model's output
    return plain({key: content[key] for key in ("MODEL", "INPUT", "TEST", "DISCOVERY")})


def entries_in_order(results: Iterable[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
    """Number and entry of every image, in the data set's order, of results that are dicts of
    entries under image numbers; those of one :attr:`DatasetJob.block` are held at a time."""
    held: dict[int, Any] = {}
    following = 0
    for result in results:
        held |= {int(index): entry for index, entry in result.items()}
        while following in held:
            yield following, held.pop(following)
            following += 1


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
