"""Masks for a whole data set or folder from any model, as a pseudo-mask file."""

import base64
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import nn

from unseg.discovery import write_pseudo_masks
from unseg.discovery.io import read_header
from unseg.discovery.statistics import MaskStatistics
from unseg.engine.dataset_job import DatasetJob, LoadedUnit
from unseg.structures import ImageRecord, PseudoMask, WindowMasks, make_pseudo_masks


class _Labeller:
    """Runs the model on a loaded unit and keeps the masks that the config lets pass."""

    def __init__(self, cfg: CfgNode, model: nn.Module):
        self.model = model.eval()
        self.score_threshold = cfg.DISCOVERY.SCORE_THRESHOLD
        self.max_masks = cfg.DISCOVERY.MAX_MASKS_PER_IMAGE
        self.max_width = cfg.DISCOVERY.MAX_WIDTH

    def __call__(self, loaded: LoadedUnit) -> tuple[dict[str, Any], int]:
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
    masks = instances.pred_masks
    masks = masks.to_rle() if isinstance(masks, WindowMasks) else masks
    return make_pseudo_masks(masks, instances.scores, embeddings)


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


class PseudoMaskJob(DatasetJob[MaskStatistics]):
    """Finds masks in all images of a source and writes them to one JSON file."""

    def is_written(self) -> bool:
        """Whether the output is there already, made by a job with the same settings."""
        header = read_header(self.output)
        return header is not None and header.get("unseg") == self.info

    def processor(self, model: nn.Module) -> _Labeller:
        """Finds the masks of a unit."""
        return _Labeller(self.cfg, model)

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
